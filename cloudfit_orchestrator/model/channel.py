"""Frames between a guest and its wormhole over one virtio-serial port (or, for local processes, one unix socket).

A frame is `length u32 ‖ kind u8 ‖ request u32 ‖ body`, big endian, `length` counting kind, request and body. The guest
chooses `request` (not 0) and the answer repeats it; the agent's own pushes carry 0. Answers come in the order of the
requests. Bodies of the hot path have a fixed layout; the others are JSON.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum

from cloudfit_orchestrator.model.errors import BadError

PORT_NAME = "org.cloudfit.wormhole.0"  # of the virtio-serial port in the guest
MAX_GUEST_FRAME = 64 << 10  # guest -> agent: the largest is a REPORT
MAX_AGENT_FRAME = 2 << 20  # agent -> guest: the largest is a RECORD, an envelope of at most 1 MiB
_HEAD = struct.Struct(">IBI")
_INNER = _HEAD.size - 4


class FrameKind(IntEnum):
    """Kinds, with body layouts. JSON bodies are UTF-8 objects."""

    HELLO = 1  # guest: version u8 (1). Answer WELCOME
    WELCOME = 2  # JSON {group, replica, incarnation, role, network: {address, prefix, gateway}, port, options: {…}}
    OPEN_SESSION = 3  # guest: c u64. Answer SESSION
    SESSION = 4  # session u64 ‖ next cv u64
    CREATE_UI = 5  # guest: session u64 ‖ c u64 ‖ cv u64 ‖ digest 32. Answer UI_CERT
    UI_CERT = 6  # cv u64 ‖ certificate 64
    RECENT = 7  # guest: session u64 ‖ c u64. Answer RECENT_UIS
    RECENT_UIS = 8  # repeated (cv u64 ‖ digest 32 ‖ certificate 64), oldest first
    SIGN = 9  # guest: c u64 ‖ statement kind u8 ‖ body. Answer SIGNATURE
    SIGNATURE = 10  # signature 64
    ISSUE = 11  # guest: DER SubjectPublicKeyInfo of its TLS key. Answer CERTIFICATE
    CERTIFICATE = 12  # DER X.509 certificate, issued by the incarnation's channel CA
    END_EPOCH = 13  # guest: c u64; granted only if the agent itself holds a record that supersedes c. Answer EPOCH_END
    EPOCH_END = 14  # cv_end u64 ‖ last digest 32 ‖ last certificate 64 ‖ signature 64
    REPORT = 15  # guest: JSON {topic, …}, kept for the controller (bounded, oldest dropped). Answer OK
    OK = 16  # empty
    RECORD = 17  # agent push: envelope of a configuration record that the agent has verified
    COMMAND = 18  # agent push: JSON {op, …} from the controller
    ERROR = 255  # code u16 ‖ UTF-8 text


class ErrorCode(IntEnum):
    """Why the wormhole refused. None of them can be worked around by asking again, but THROTTLED."""

    MALFORMED = 1
    NO_EPOCH = 2
    STALE_SESSION = 3
    WRONG_COUNTER = 4
    FROZEN = 5
    ENDED = 6
    NOT_ACTIVE = 7
    LEASE_OVER = 8
    THROTTLED = 9
    FORBIDDEN = 10


CREATE_UI = struct.Struct(">QQQ32s")
UI_CERT = struct.Struct(">Q64s")
SESSION = struct.Struct(">QQ")
RECENT = struct.Struct(">QQ")
RECENT_ITEM = struct.Struct(">Q32s64s")
EPOCH_END = struct.Struct(">Q32s64s64s")
EPOCH = struct.Struct(">Q")
SIGN_HEAD = struct.Struct(">QB")


def frame(kind: FrameKind, request: int, body: bytes = b"") -> bytes:
    """One frame's bytes."""
    return _HEAD.pack(_INNER + len(body), kind, request) + body


class FrameReader:
    """Incremental decoder. Feed bytes, iterate frames. A frame over `limit` or under 5 bytes raises BadError: after
    it the stream has no boundaries any more and the reader must be thrown away with its connection.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the largest frame accepted, in bytes."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield (kind, request, body) of each frame that `data` completes. `kind` may be none of FrameKind."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if not _INNER <= length <= self._limit:
                raise BadError(f"frame of {length} bytes, allowed are {_INNER} to {self._limit}")
            if len(self._buffer) < 4 + length:
                return
            _, kind, request = _HEAD.unpack_from(self._buffer)
            body = bytes(self._buffer[_HEAD.size : 4 + length])
            del self._buffer[: 4 + length]
            yield kind, request, body
