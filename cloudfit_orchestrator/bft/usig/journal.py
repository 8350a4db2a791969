"""What the USIG engine keeps in the write-ahead log: its streams, as they were accepted (protocol §2)."""

from cloudfit_orchestrator.bft.journal import entry_decoder
from cloudfit_orchestrator.bft.messages import Frozen
from cloudfit_orchestrator.bft.usig.messages import EpochEndMessage, StreamMessage


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


class LogView(Frozen, frozen=True, tag=10):
    """A NEW-VIEW that stands and whose stream was cut behind it. `batches`, `views`: see `stream.Weighed`."""

    message: StreamMessage
    batches: tuple[bytes, ...] = ()
    views: tuple[int, ...] = ()


class LogCited(Frozen, frozen=True, tag=13):
    """Logs of VIEW-CHANGEs that the NEW-VIEW of view g was computed from: who missed them needs them to judge it,
    perhaps long after. g = WEDGE: that of a wedge or closed epoch whose stream was jumped over; an S may be
    confirmed that follows from it.
    """

    c: int
    g: int
    logs: tuple[tuple[StreamMessage, ...], ...]


class LogEnd(Frozen, frozen=True, tag=11):
    """An EPOCH-END that verified."""

    end: EpochEndMessage


class LogBreach(Frozen, frozen=True, tag=14):
    """A message that ended its stream: what cites what follows is judged by it, and nobody else may have it."""

    message: StreamMessage


ENTRIES: tuple[type[Frozen], ...] = (LogMessage, LogAnchor, LogBody, LogUI, LogView, LogCited, LogEnd, LogBreach)


def decode_entry(data: bytes) -> Frozen:
    """Any entry of a log that was written under this engine. Raises BadError."""
    return entry_decoder(ENTRIES)(data)
