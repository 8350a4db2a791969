"""Client of a wormhole agent's controller socket (docs/contracts.md), local or through SSH. Blocking and thread-safe.

Each call has a connection of its own while it lasts; idle ones are kept, so a long `reports` hinders nobody.
"""

import base64
import contextlib
import json
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import paramiko
from paramiko.common import cMSG_CHANNEL_OPEN

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

MAX_LINE_BYTES = 2 << 20
MAX_IDLE = 4  # connections kept for later calls
CALL_TIMEOUT_S = 30.0
ADMIT_TIMEOUT_S = 300.0  # it reads and hashes a whole image, perhaps behind two others
READ_BYTES = 64 << 10


class NotAdmittedError(RefusedError):
    """The agent knows no such guest: it was never admitted, or the agent has been restarted since."""


class NoEpochError(RefusedError):
    """The agent has no keys of that configuration: never prepared, or gone with a restart. They do not come back."""


class MeasurementError(BadError):
    """The machine, or its image, is not what the signed manifest says; the text names the part."""


_ERRORS: dict[str, type[CloudfitError]] = {
    "not-admitted": NotAdmittedError,
    "no-epoch": NoEpochError,
    "measurement": MeasurementError,
    "refused": RefusedError,
    "bad-input": BadInputError,
    "bad": BadError,
    "temporary": TemporaryError,
    "unknown": UnknownError,
    "permanent": PermanentError,
}


@dataclass(frozen=True, slots=True)
class GuestRef:
    """Whom an order is about."""

    group: str
    replica: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a guest told the controller."""

    seq: int
    guest: GuestRef
    topic: str
    body: dict[str, Any]


def libvirt_machine(uri: str, uuid: str) -> dict[str, Any]:
    """`machine` of `admit`: a domain, by a URI as the agent's host sees it."""
    return {"driver": "libvirt", "uri": uri, "uuid": uuid}


def process_machine(pid: int, channel: Path) -> dict[str, Any]:
    """`machine` of `admit`: a local process that listens on the unix socket `channel`."""
    return {"driver": "process", "pid": pid, "socket": str(channel)}


class Stream(Protocol):
    """What a socket and a paramiko channel have in common."""

    def sendall(self, data: bytes, /) -> object:
        """Send everything or raise."""
        ...

    def recv(self, count: int, /) -> bytes:
        """Up to `count` bytes; empty at the end."""
        ...

    def settimeout(self, seconds: float | None, /) -> object:
        """Bound each of the other calls."""
        ...

    def close(self) -> object:
        """Let go."""
        ...


class Dialer(ABC):
    """Opens connections to one agent's socket. `help`: the command to run when nobody answers."""

    help = "cloudfit agent run"

    @abstractmethod
    def dial(self) -> Stream:
        """A new connection. Raises OSError, EOFError or paramiko.SSHException."""

    @abstractmethod
    def __str__(self) -> str:
        """Where that is, for errors."""


class UnixDialer(Dialer):
    """An agent on this host."""

    def __init__(self, path: Path) -> None:
        """`path`: the agent's socket."""
        self._path = path

    def dial(self) -> Stream:
        """See `Dialer`."""
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.settimeout(CALL_TIMEOUT_S)
            stream.connect(str(self._path))
        except OSError:
            stream.close()
            raise
        return stream

    def __str__(self) -> str:
        return str(self._path)


class StreamlocalTransport(paramiko.Transport):
    """An SSH transport that can open a unix socket of the other host (OpenSSH PROTOCOL §2.4), which paramiko cannot."""

    _KIND = "direct-streamlocal@openssh.com"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `paramiko.Transport`; `SSHClient.connect(transport_factory=StreamlocalTransport)` makes one."""
        super().__init__(*args, **kwargs)
        self._streamlocal_lock = threading.Lock()
        self._streamlocal_path = ""

    def open_streamlocal(self, path: str) -> paramiko.Channel:
        """A channel to the unix socket `path` over there. Raises paramiko.SSHException."""
        with self._streamlocal_lock:
            self._streamlocal_path = path
            return self.open_channel(self._KIND, timeout=CALL_TIMEOUT_S)

    def _send_user_message(self, data: paramiko.Message) -> None:
        kind = self._KIND.encode()
        head = bytes(cMSG_CHANNEL_OPEN) + len(kind).to_bytes(4, "big") + kind
        if data.asbytes().startswith(head):
            data.add_string(self._streamlocal_path)
            data.add_string("")  # reserved
            data.add_int(0)  # reserved
        super()._send_user_message(data)  # type: ignore[misc]  # private, not in the stubs


class SshDialer(Dialer):
    """An agent on another host, through a connected `paramiko.SSHClient`."""

    def __init__(self, client: paramiko.SSHClient, path: str) -> None:
        """`client` was connected with `transport_factory=StreamlocalTransport`; `path`: the agent's socket there."""
        self._client = client
        self._path = path

    def dial(self) -> Stream:
        """See `Dialer`."""
        transport = self._client.get_transport()
        if not isinstance(transport, StreamlocalTransport):
            raise EOFError(  # noqa: TRY004  what is wrong is the connection
                f"no SSH connection that can reach {self._path}"
            )
        channel = transport.open_streamlocal(self._path)
        channel.settimeout(CALL_TIMEOUT_S)
        return channel

    def __str__(self) -> str:
        return f"{self._path} through SSH"


class _Connection:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._number = 0
        self._rest = b""

    def call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self._number += 1
        line = json.dumps({"id": self._number} | request).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise BadInputError(f"a request of {len(line)} bytes, the limit is {MAX_LINE_BYTES}")
        deadline = time.monotonic() + timeout_s
        self._stream.settimeout(timeout_s)
        self._stream.sendall(line)
        answer = json.loads(self._line(deadline))
        if not isinstance(answer, dict) or answer.get("id") != self._number:
            raise EOFError("the answer is not to the request")
        return answer

    def _line(self, deadline: float) -> bytes:
        parts = [self._rest]
        size = len(self._rest)
        while b"\n" not in parts[-1]:
            left_s = deadline - time.monotonic()
            if left_s <= 0:  # one that sends a byte now and then is as late as one that sends none
                raise TimeoutError("the answer did not come in time")
            self._stream.settimeout(left_s)
            part = self._stream.recv(READ_BYTES)
            size += len(part)
            if not part:
                raise EOFError("the agent closed the connection")
            if size > 2 * MAX_LINE_BYTES:
                raise EOFError("the answer has no end")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        self._stream.close()


class AgentClient:
    """One agent. Every method raises the error that the agent named, or TemporaryError when it cannot be reached."""

    inside = False

    def __init__(self, dialer: Dialer) -> None:
        """Dials at the first call."""
        self._dialer = dialer
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    @classmethod
    def unix(cls, path: Path) -> Self:
        """Of an agent on this host."""
        return cls(UnixDialer(path))

    @classmethod
    def ssh(cls, client: paramiko.SSHClient, path: str) -> Self:
        """Of an agent behind SSH; see `SshDialer`."""
        return cls(SshDialer(client, path))

    def close(self) -> None:
        """Close idle connections. The client can be used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """`agent`, `key`, `guests`, `groups`, `counters`."""
        return self._call({"op": "status"})

    def key_of(self, guest: GuestRef) -> bytes:
        """The key that launch certificates of its guests are signed with."""
        del guest
        return _raw(self.status()["key"])

    def admit(
        self,
        guest: GuestRef,
        *,
        role: Role,
        machine: dict[str, Any],
        manifest: bytes,
        lease_s: float,
        welcome: dict[str, Any],
        image_dir: Path | None = None,
        allow_adversary: bool = False,
    ) -> bytes:
        """Measure and admit a machine; the launch certificate's envelope. Safe to repeat. Raises MeasurementError."""
        request = {
            "op": "admit",
            "role": role.value,
            "machine": machine,
            "manifest": _text(manifest),
            "image_dir": str(image_dir or ""),
            "allow_adversary": allow_adversary,
            "lease_s": lease_s,
            "welcome": welcome,
        }
        return _raw(self._call(request | _names(guest), ADMIT_TIMEOUT_S)["launch"])

    def prepare(self, guest: GuestRef, c: int) -> tuple[bytes, bytes]:
        """(USIG key, KSS key), raw public keys of configuration c; made once."""
        answer = self._call({"op": "prepare", "c": c} | _names(guest))
        return _raw(answer["usig_key"]), _raw(answer["kss_key"])

    def install(self, group: str, envelope: bytes) -> None:
        """Show the agent a configuration record. Safe to repeat; raises RefusedError if it would go back."""
        self._call({"op": "install", "group": group, "envelope": _text(envelope)})

    def freeze(self, guest: GuestRef, c: int) -> int:
        """Silence an epoch until `thaw`; its counter."""
        return int(self._call({"op": "freeze", "c": c} | _names(guest))["cv"])

    def thaw(self, guest: GuestRef, c: int) -> int:
        """Undo `freeze`; the counter."""
        return int(self._call({"op": "thaw", "c": c} | _names(guest))["cv"])

    def close_epoch(self, guest: GuestRef, c: int) -> EpochEnd:
        """Close an epoch for good; the same EPOCH-END on repetition."""
        end = self._call({"op": "close", "c": c} | _names(guest))["end"]
        return EpochEnd(
            replica=end["replica"],
            c=end["c"],
            cv_end=end["cv_end"],
            last_digest=_raw(end["last_digest"]),
            last_certificate=_raw(end["last_certificate"]),
            signature=_raw(end["signature"]),
        )

    def command(self, guest: GuestRef, body: dict[str, Any]) -> None:
        """Push a command as soon as the guest has greeted. Where the answer is lost it may have been pushed."""
        self._call({"op": "command", "body": body} | _names(guest))

    def reports(self, since: int, wait_s: float = 0.0, group: str | None = None) -> tuple[list[Report], int]:
        """Reports with seq > `since`, waiting up to `wait_s` for the first; and the next `since`."""
        request = {"op": "reports", "since": since, "wait_s": wait_s, "group": group or ""}
        answer = self._call(request, CALL_TIMEOUT_S + wait_s)
        found = [
            Report(r["seq"], GuestRef(r["group"], r["replica"], r["incarnation"]), r["topic"], r["body"])
            for r in answer["reports"]
        ]
        return found, answer["next"]

    def evict(self, guest: GuestRef) -> None:
        """Destroy the guest's keys; unknown is no error."""
        self._call({"op": "evict"} | _names(guest))

    def _call(self, request: dict[str, Any], timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        answer = None
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        # An idle connection may be to an agent that has been restarted. All orders but one are safe to repeat.
        if connection is not None and request["op"] != "command":
            with contextlib.suppress(TemporaryError):
                answer = self._exchange(connection, request, timeout_s)
            connection = None
        if answer is None:
            answer = self._exchange(connection or self._dial(), request, timeout_s)
        if answer.get("ok") is True:
            return answer
        kind = _ERRORS.get(str(answer.get("code")), PermanentError)
        raise kind(
            f"agent at {self._dialer}: {request['op']}: {answer.get('error')}",
            next_command=str(answer.get("next_command", "")),
        )

    def _dial(self) -> _Connection:
        try:
            return _Connection(self._dialer.dial())
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise TemporaryError(
                f"agent at {self._dialer} cannot be reached: {error}", next_command=self._dialer.help
            ) from error

    def _exchange(self, connection: _Connection, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One request and its answer; the connection is then idle, or closed if anything went wrong."""
        try:
            answer = connection.call(request, timeout_s)
        except (OSError, EOFError, ValueError, paramiko.SSHException) as error:
            connection.close()
            raise TemporaryError(
                f"agent at {self._dialer}: {request['op']}: {error or type(error).__name__}",
                next_command="cloudfit agent status",
            ) from error
        except BaseException:
            connection.close()
            raise
        with self._lock:
            keep = len(self._idle) < MAX_IDLE
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        return answer


def _names(guest: GuestRef) -> dict[str, Any]:
    return {"group": guest.group, "replica": guest.replica, "incarnation": guest.incarnation}


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
