"""Frames between a guest and its wormhole over one virtio-serial port (or, for local processes, one unix socket).

A frame is `length u32 ‖ kind u8 ‖ request u32 ‖ body ‖ END`, big endian, `length` counting kind, request and body. The
guest chooses `request` (not 0) and the answer repeats it; the agent's own pushes carry 0. Answers come in the order of
the requests. Bodies of the hot path have a fixed layout; the others are JSON.

**Greeting.** A virtio-serial port has no connections: when the process that had it open dies, its successor shares the
byte stream with it, in both directions, perhaps from the middle of a frame. So:

- The guest opens the port, chooses a random `request` (u32, not 0), writes `hello(request)`, which begins with RESYNC,
  and reads through `FrameReader(MAX_AGENT_FRAME, welcome=request)`: it yields nothing until the WELCOME that answers
  this very HELLO, whatever an earlier process left behind. HELLO ends all sessions of the guest's epochs.
- The agent does the same: `FrameReader(MAX_GUEST_FRAME, stale=True)` yields nothing until the first RESYNC of a new
  connection, and at a later one forgets the half frame before it. It answers HELLO by `RESYNC ‖ WELCOME`.
- End of file, or an I/O error, at the guest's end means that the agent let go (malformed input, its own restart): close
  the port, open it again, greet again, with a bounded back-off. Nothing that was sent before is answered any more.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum

from cloudfit_orchestrator.model.errors import BadError

PORT_NAME = "org.cloudfit.wormhole.0"  # of the virtio-serial port in the guest
MAX_GUEST_FRAME = 64 << 10  # guest -> agent: the largest is a REPORT
MAX_AGENT_FRAME = 2 << 20  # agent -> guest: the largest is a RECORD, an envelope of at most 1 MiB
VERSION = 1  # of this protocol, sent in HELLO

# Marks where a stream begins anew. An honest sender's frame never holds it: it is no UTF-8, so no JSON; it has no zero
# byte, so it does not fit across a u64 that counts something; what is left are hashes, signatures and keys, of
# which nobody can choose 24 bytes or more. At a frame's beginning it reads as a length beyond every limit.
RESYNC = bytes.fromhex("fffebd0ff52a6a2ccf70decc15a9835131ec22383524a8e3282969490f3791bd")
# Ends each frame, and is no byte of RESYNC: where a frame was cut short and RESYNC follows, the bytes that complete it
# end in one of RESYNC's. Without it the half CREATE_UI of a killed process would certify a digest that nobody chose.
END = b"\x17"
_HEAD = struct.Struct(">IBI")
_INNER = _HEAD.size - 4
_LOOK_AGAIN = -1


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
    return _HEAD.pack(_INNER + len(body), kind, request) + body + END


def hello(request: int) -> bytes:
    """What a guest writes first after it opened the port; `request`: random, 1 to 2**32 - 1."""
    return RESYNC + frame(FrameKind.HELLO, request, bytes([VERSION]))


class FrameReader:
    """Incremental decoder. Feed bytes, iterate frames.

    A frame over `limit`, under 5 bytes or without its END raises BadError, unless a RESYNC explains it: after it the
    stream has no boundaries any more and the reader must be thrown away with its connection.
    """

    def __init__(self, limit: int, *, stale: bool = False, welcome: int | None = None) -> None:
        """`limit`: the largest frame accepted, in bytes. `stale`: discard everything before the first RESYNC.

        `welcome`: the guest's side; discard everything before the WELCOME that answers the HELLO of this request.
        """
        self._limit = limit
        self._stale = stale or welcome is not None
        self._welcome = welcome
        self._buffer = bytearray()
        self._searched = 0  # no RESYNC begins before this offset of the buffer
        self.discarded = 0  # bytes that belonged to no frame of this stream, all in all

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield (kind, request, body) of each frame that `data` completes. `kind` may be none of FrameKind."""
        self._buffer += data
        while self._aligned() and (end := self._next_end()) is not None:
            if end == _LOOK_AGAIN:
                continue
            _, kind, request = _HEAD.unpack_from(self._buffer)
            body = bytes(self._buffer[_HEAD.size : end])
            self._drop(end + 1, discarded=0)
            if self._welcome is not None:
                if (kind, request) != (FrameKind.WELCOME, self._welcome):
                    continue
                self._welcome = None
            yield kind, request, body

    def _aligned(self) -> bool:
        """Bring the buffer to a frame's beginning. False if that, or the frame's length, needs more bytes."""
        buffer = self._buffer
        if self._stale:
            start = buffer.find(RESYNC)
            self._drop(start if start >= 0 else max(0, len(buffer) - len(RESYNC) + 1))
            self._stale = start < 0
        while buffer.startswith(RESYNC):
            self._drop(len(RESYNC), discarded=0)
        return not self._stale and len(buffer) >= 4 and not RESYNC.startswith(buffer)

    def _next_end(self) -> int | None:
        """Where the END of the frame that the buffer begins with is; None if it is not there yet; or _LOOK_AGAIN."""
        length = int.from_bytes(self._buffer[:4], "big")
        end = 4 + length
        possible = _INNER <= length <= self._limit
        resync = self._buffer.find(RESYNC, self._searched, (end if possible else 3) + len(RESYNC))
        if resync >= 0:  # a successor began in the middle of this frame
            self._drop(resync)
            return _LOOK_AGAIN
        if possible and len(self._buffer) <= end:
            self._searched = max(0, len(self._buffer) - len(RESYNC) + 1)
            return None
        if possible and self._buffer[end] == END[0]:
            return end
        if self._may_become_resync(end if possible else 3):
            return None
        fact = "does not end where it says" if possible else f"is not of {_INNER} to {self._limit} bytes"
        if self._welcome is None:
            raise BadError(f"frame of {length} bytes {fact}")
        self._stale = True  # still among what an earlier process left
        return _LOOK_AGAIN

    def _may_become_resync(self, last: int) -> bool:
        """Whether the buffer's tail is the beginning of a RESYNC that starts at offset `last` or before."""
        first = max(1, len(self._buffer) - len(RESYNC) + 1)
        return any(RESYNC.startswith(self._buffer[i:]) for i in range(first, min(last + 1, len(self._buffer))))

    def _drop(self, count: int, *, discarded: int | None = None) -> None:
        del self._buffer[:count]
        self._searched = 0
        self.discarded += count if discarded is None else discarded
