"""Records of a replica's write-ahead log: the inputs that made its state, in the order of processing.

Reading the log again through the same code rebuilds the state (protocol §2, restart within an epoch). The log is
trusted by its owner only; nobody else takes its word.
"""

import msgspec

from cloudfit_orchestrator.bft.messages import EpochEndMessage, Frozen, Named, StreamMessage
from cloudfit_orchestrator.model.errors import BadError


class LogRecord(Frozen, frozen=True, tag=1):
    """A configuration record was installed."""

    envelope: bytes


class LogMessage(Frozen, frozen=True, tag=2):
    """A stream message of another member was accepted."""

    message: StreamMessage


class LogAnchor(Frozen, frozen=True, tag=3):
    """A cursor jumped to this attested STABLE (or the log was cut there)."""

    message: StreamMessage


class LogBody(Frozen, frozen=True, tag=4):
    """An own body was made; its UI was asked for after this record was durable."""

    c: int
    cv: int
    header: bytes
    payload: bytes


class LogUI(Frozen, frozen=True, tag=5):
    """The UI of an own body arrived."""

    c: int
    cv: int
    certificate: bytes


class LogBatch(Frozen, frozen=True, tag=6):
    """A batch was taken in."""

    c: int
    batch: bytes


class LogState(Frozen, frozen=True, tag=7):
    """The state is that of the persisted snapshot (c, slot), with that root."""

    c: int
    slot: int
    root: bytes


class LogDecision(Frozen, frozen=True, tag=8):
    """Slot s was decided; its votes are no longer in the log."""

    c: int
    s: int
    batch: bytes


class LogWedges(Frozen, frozen=True, tag=9):
    """S for `successor` was computed from these wedges, and may have been confirmed."""

    successor: int
    wedges: tuple[Named, ...]


class LogView(Frozen, frozen=True, tag=10):
    """A NEW-VIEW that stands and whose stream was cut behind it."""

    message: StreamMessage


class LogEnd(Frozen, frozen=True, tag=11):
    """An EPOCH-END that verified."""

    end: EpochEndMessage


Entry = (
    LogRecord
    | LogMessage
    | LogAnchor
    | LogBody
    | LogUI
    | LogBatch
    | LogState
    | LogDecision
    | LogWedges
    | LogView
    | LogEnd
)
_decoder: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)
_encode = msgspec.msgpack.Encoder().encode


def encode_entry(entry: Entry) -> bytes:
    """The bytes of a log record."""
    return _encode(entry)


def decode_entry(data: bytes) -> Entry:
    """Raises BadError: the log is damaged where its checksums say it is not."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadError(f"log record is malformed: {error}") from error
