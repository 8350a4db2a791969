"""The controller's socket: one JSON object a line (docs/contracts.md), decoded here, carried out by `agent.Agent`."""

import asyncio
import base64
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from cloudfit_orchestrator.model.errors import (
    BadError,
    BadInputError,
    CloudfitError,
    PermanentError,
    RefusedError,
    TemporaryError,
    UnknownError,
)
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.ui import EpochEnd
from cloudfit_orchestrator.wormhole.agent import Admission, Agent, MachineRef
from cloudfit_orchestrator.wormhole.guests import NoEpochError, NotAdmittedError
from cloudfit_orchestrator.wormhole.identity import Identity

MAX_LINE_BYTES = 2 << 20  # an envelope of 1 MiB in base64, and more
MAX_CONNECTIONS = 64
MAX_WAIT_S = 60.0  # of one `reports`
MAX_LEASE_S = 366 * 86400.0
# The first class that an error is of names its code; `admit` says `measurement` instead of `bad`.
CODES: tuple[tuple[type[CloudfitError], str], ...] = (
    (NotAdmittedError, "not-admitted"),
    (NoEpochError, "no-epoch"),
    (RefusedError, "refused"),
    (BadInputError, "bad-input"),
    (BadError, "bad"),
    (TemporaryError, "temporary"),
    (UnknownError, "unknown"),
    (PermanentError, "permanent"),
)

_log = logging.getLogger(__name__)

Answer = dict[str, Any]
Handler = Callable[["Arguments"], Awaitable[Answer]]


class Arguments:
    """Typed access to a request. Raises BadInputError naming the argument."""

    def __init__(self, doc: dict[str, Any]) -> None:
        self._doc = doc

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The argument, of exactly this type (an integer is also a float)."""
        value = self._doc.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise BadInputError(f"argument {name!r} is no {kind.__name__}")
        return value

    def raw(self, name: str) -> bytes:
        """A byte string, base64 in the request."""
        try:
            return base64.b64decode(self.take(name, str), validate=True)
        except ValueError as error:
            raise BadInputError(f"argument {name!r} is no base64") from error

    def guest(self) -> Identity:
        """Who is meant."""
        return Identity(self.take("group", str), self.take("replica", str), self.take("incarnation", int))


class Control:
    """Serves the controller's connections. Orders of one connection are carried out one after the other."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._connections: set[asyncio.Task[None]] = set()
        self._handlers: dict[str, Handler] = {
            "status": self._status,
            "admit": self._admit,
            "prepare": self._prepare,
            "install": self._install,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "close": self._close,
            "command": self._command,
            "reports": self._reports,
            "evict": self._evict,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end. `reader` must have MAX_LINE_BYTES as its limit."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) > MAX_CONNECTIONS:
                writer.write(_line(None, _failure(RefusedError(f"{MAX_CONNECTIONS} connections are open"), "")))
                return
            while line := await reader.readline():
                writer.write(await self._answer(line))
                await writer.drain()
        except ValueError:  # a line beyond the limit
            self._agent.counters["control-oversize"] += 1
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def stop(self) -> None:
        """Close all connections."""
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, line: bytes) -> bytes:
        number, op = None, ""
        try:
            doc = json.loads(line)
            number, op = doc.pop("id"), doc.pop("op")
            handler = self._handlers[op]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._agent.counters["control-malformed"] += 1
            return _line(number, _failure(BadInputError(f"no such request: {line[:80]!r}"), ""))
        try:
            answer = await handler(Arguments(doc))
        except CloudfitError as error:
            failure = _failure(error, op)
            _log.info("refused", extra={"op": op, "code": failure["code"], "why": error.fact[:500]})
            return _line(number, failure)
        except Exception:  # noqa: BLE001  the process boundary: one bad order must not end all guests' epochs
            self._agent.counters["control-internal"] += 1
            _log.exception("order failed", extra={"op": op})
            return _line(number, {"ok": False, "code": "internal", "error": f"{op} failed; the agent's log says why"})
        if op not in ("status", "reports"):
            _log.info(
                "done", extra={"op": op} | {k: doc[k] for k in ("group", "replica", "incarnation", "c") if k in doc}
            )
        return _line(number, {"ok": True} | answer)

    async def _status(self, _: Arguments) -> Answer:
        return self._agent.status()

    async def _admit(self, a: Arguments) -> Answer:
        try:
            role = Role(a.take("role", str))
        except ValueError as error:
            raise BadInputError(f"{a.take('role', str)!r:.40} is no role") from error
        lease_s = a.take("lease_s", float)
        if not 0 < lease_s <= MAX_LEASE_S:
            raise BadInputError(f"a lease of {lease_s:g} s: allowed are up to {MAX_LEASE_S:g}")
        order = Admission(
            identity=a.guest(),
            role=role,
            machine=_machine(Arguments(a.take("machine", dict))),
            manifest=a.raw("manifest"),
            allow_adversary=a.take("allow_adversary", bool, default=False),
            lease_s=lease_s,
            welcome=a.take("welcome", dict, default={}),
        )
        return {"launch": _text(await self._agent.admit(order))}

    async def _prepare(self, a: Arguments) -> Answer:
        epoch = self._agent.prepare(a.guest(), a.take("c", int))
        return {"usig_key": _text(epoch.usig_key), "kss_key": _text(epoch.kss_key)}

    async def _install(self, a: Arguments) -> Answer:
        self._agent.install(a.take("group", str), a.raw("envelope"))
        return {}

    async def _freeze(self, a: Arguments) -> Answer:
        return {"cv": self._agent.table.get(a.guest()).epoch(a.take("c", int)).freeze()}

    async def _thaw(self, a: Arguments) -> Answer:
        return {"cv": self._agent.table.get(a.guest()).epoch(a.take("c", int)).thaw()}

    async def _close(self, a: Arguments) -> Answer:
        return {"end": end_json(self._agent.table.close(a.guest(), a.take("c", int)))}

    async def _command(self, a: Arguments) -> Answer:
        self._agent.command(a.guest(), a.take("body", dict))
        return {}

    async def _reports(self, a: Arguments) -> Answer:
        wait_s = min(max(a.take("wait_s", float, default=0.0), 0.0), MAX_WAIT_S)
        group = a.take("group", str, default="") or None
        found, following = await self._agent.reports.wait(a.take("since", int), group, wait_s)
        reports = [
            {
                "seq": r.seq,
                "group": r.guest.group,
                "replica": r.guest.replica,
                "incarnation": r.guest.incarnation,
                "topic": r.topic,
                "body": r.body,
            }
            for r in found
        ]
        return {"reports": reports, "next": following}

    async def _evict(self, a: Arguments) -> Answer:
        await self._agent.evict(a.guest())
        return {}


def end_json(end: EpochEnd) -> Answer:
    """EPOCH-END as JSON."""
    return {
        "replica": end.replica,
        "c": end.c,
        "cv_end": end.cv_end,
        "last_digest": _text(end.last_digest),
        "last_certificate": _text(end.last_certificate),
        "signature": _text(end.signature),
    }


def _machine(a: Arguments) -> MachineRef:
    driver = a.take("driver", str)
    if driver == "libvirt":
        return MachineRef(driver, uri=a.take("uri", str), uuid=a.take("uuid", str).lower())
    if driver == "process":
        pid = a.take("pid", int)
        if not 1 < pid < 1 << 31:
            raise BadInputError(f"{pid} is no process id")
        return MachineRef(driver, pid=pid, socket=a.take("socket", str))
    if driver == "inside":
        return MachineRef(driver)
    raise BadInputError(f"{driver!r:.40} is no driver: libvirt, process or inside")


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _failure(error: CloudfitError, op: str) -> Answer:
    code = next((code for kind, code in CODES if isinstance(error, kind)), "internal")
    if code == "bad" and op == "admit":
        code = "measurement"
    return {"ok": False, "code": code, "error": error.fact, "next_command": error.next_command}


def _line(number: Any, answer: Answer) -> bytes:
    return json.dumps({"id": number} | answer).encode() + b"\n"
