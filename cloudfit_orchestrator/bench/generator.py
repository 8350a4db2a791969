"""Load: concurrent callers, each with one operation under way (closed loop), in a process of their own.

A worker of `processes.Worker`. First object: where to (`target`); answered by {"ready": true} once connected. Each
further one is a round `Load`, answered by its `figures`. Operations are counted in the phase in which they *end*; what
ends before the first mark is warm-up, what ends after the last one is not counted. All times are CLOCK_MONOTONIC
seconds, which processes of one host share.
"""

import asyncio
import base64
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import uvloop

from cloudfit_orchestrator.bench.etcd_client import EtcdTarget
from cloudfit_orchestrator.bench.latencies import histogram
from cloudfit_orchestrator.bench.profiles import new_profile, top
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.gateway.client import Client
from cloudfit_orchestrator.gateway.kv import KvClient
from cloudfit_orchestrator.gateway.numbers import FileNumbers
from cloudfit_orchestrator.model.errors import BadInputError, CloudfitError

TIMEOUT_S = 20.0  # of one operation: above a view change with its doubled time-outs
PER_ROUND = ("answered", "bundles", "resent", "overloaded", "deadlines")  # of the client SDK's figures
MAX_ERRORS = 100  # a process's callers give up beyond: a target that refuses at once would be asked in a hot loop


class Target(Protocol):
    """What is driven. Both calls raise CloudfitError."""

    async def put(self, key: bytes, value: bytes) -> object: ...

    async def get(self, key: bytes) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """One round of one process. `marks`: ends of warm-up and phases; `reads`: percent of all operations."""

    callers: int
    marks: tuple[float, ...]
    payload: int
    keys: int
    reads: int
    seed: int
    profile: bool = False

    def order(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def key_of(number: int) -> bytes:
    """Key `number` of the key space."""
    return b"key-%08d" % number


def value_for(key: bytes, size: int, source: random.Random) -> bytes:
    """`size` bytes, random but for their beginning, which says whose value it is."""
    return key[:size] + source.randbytes(max(0, size - len(key)))


class Callers:
    """The closed loop."""

    def __init__(self, load: Load, target: Target, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives the time of `load.marks`."""
        self._load = load
        self._target = target
        self._clock = clock
        self._random = random.Random(load.seed)
        self._phases = [array("I") for _ in load.marks[1:]]
        self.errors = 0
        self.first_error = ""

    async def run(self) -> dict[str, Any]:
        """All callers, to the last mark. Returns operations and latencies of each phase, and errors of all time."""
        profile = new_profile()
        if self._load.profile:
            profile.enable()
        await asyncio.gather(*(self._caller() for _ in range(self._load.callers)))
        profile.disable()
        return {
            **({"profile": top(profile)} if self._load.profile else {}),
            "phases": [{"operations": len(p), "latencies_us": histogram(p)} for p in self._phases],
            "errors": self.errors,
            "first_error": self.first_error,
        }

    async def _caller(self) -> None:
        marks, clock = self._load.marks, self._clock
        while (began_s := clock()) < marks[-1] and self.errors < MAX_ERRORS:
            try:
                await self._operation()
            except CloudfitError as error:
                self._wrong(error.fact)
                continue
            ended_s = clock()
            for phase, latencies in enumerate(self._phases):
                if marks[phase] <= ended_s < marks[phase + 1]:
                    latencies.append(round(1e6 * (ended_s - began_s)))

    async def _operation(self) -> None:
        key = key_of(self._random.randrange(self._load.keys))
        if self._load.reads and self._random.randrange(100) < self._load.reads:
            value = await self._target.get(key)
            if value is not None and not (len(value) == self._load.payload and value.startswith(key[: len(value)])):
                self._wrong(f"key {key.decode()} holds {value[:16]!r}, which nobody wrote")
        else:
            await self._target.put(key, value_for(key, self._load.payload, self._random))

    def _wrong(self, what: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or what


def group_order(
    home: Home,
    client: str,
    envelope: bytes,
    trusted: Iterable[bytes],
    *,
    numbers: Path | None = None,
    near: str | None = None,
    routes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The order for a `GroupTarget`: as that client of `home`, of the group whose ACTIVE record is `envelope`.

    `numbers`: see gateway/numbers; None for a key that lives no longer than the group. `near` and `routes`: as `Client`
    takes them.
    """
    return {
        "kind": "group",
        "home": str(home.root),
        "client": client,
        "numbers": str(numbers) if numbers else None,
        "envelope": base64.b64encode(envelope).decode(),
        "controller_keys": [base64.b64encode(key).decode() for key in trusted],
        "near": near,
        "routes": routes or {},
    }


class GroupTarget:
    """A replica group's kv service through the client SDK."""

    def __init__(self, order: dict[str, Any]) -> None:
        """`order`: see `group_order`."""
        identity = Home(Path(order["home"])).client(order["client"])
        routes = order["routes"]
        self._client = Client(
            base64.b64decode(order["envelope"]),
            [base64.b64decode(key) for key in order["controller_keys"]],
            admitted=identity.public,
            key=identity.key,
            numbers=FileNumbers(Path(order["numbers"])) if order["numbers"] else None,
            near=order["near"],
            route=routes.get,
        )
        self._kv = KvClient(self._client, timeout_s=TIMEOUT_S)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.__aexit__(*error)

    async def put(self, key: bytes, value: bytes) -> None:
        """See `Target`."""
        await self._kv.put(key, value)

    async def get(self, key: bytes) -> bytes | None:
        """See `Target`."""
        return await self._kv.get(key)

    @property
    def figures(self) -> dict[str, Any]:
        """What the client SDK counted since the start."""
        return {**asdict(self._client.figures), "transport": dict(self._client.counters)}


def open_target(order: dict[str, Any]) -> GroupTarget | EtcdTarget:
    """Raises BadInputError for a kind that there is not."""
    if order["kind"] == "group":
        return GroupTarget(order)
    if order["kind"] == "etcd":
        return EtcdTarget(order["address"], order["connections"], timeout_s=TIMEOUT_S)
    raise BadInputError(f"no target is of kind {order['kind']!r}")


async def serve() -> None:
    """Rounds, until standard input ends."""
    lines = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    order = json.loads(await lines.readline())
    opened: AbstractAsyncContextManager[GroupTarget | EtcdTarget] = open_target(order)
    async with opened as target:
        await target.get(key_of(0))  # connected, and somebody answers
        _say({"ready": True})
        while line := await lines.readline():
            before = target.figures if isinstance(target, GroupTarget) else {}
            found = await Callers(Load(**json.loads(line)), target).run()
            if isinstance(target, GroupTarget):
                now = target.figures
                found["client"] = now | {name: now[name] - before[name] for name in PER_ROUND}
            _say({"figures": found})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(serve())
