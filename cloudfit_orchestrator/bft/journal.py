"""Records of a replica's write-ahead log: the inputs that made its state, in the order of processing.

Reading the log again through the same code rebuilds the state (protocol §2, restart within an epoch). The log is
trusted by its owner only; nobody else takes its word. Entries here are shared by all ordering engines; each adds its
own (`Ordering.ENTRIES`): the tags up to 19 are taken here and by the USIG engine, 20-29 by PBFT, others take them from
100 on.
"""

from collections.abc import Callable
from functools import cache, reduce
from operator import or_

import msgspec

from cloudfit_orchestrator.bft.messages import MALFORMED, Frozen, Named
from cloudfit_orchestrator.model.errors import BadError


class LogRecord(Frozen, frozen=True, tag=1):
    """A configuration record was installed."""

    envelope: bytes


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


class LogShown(Frozen, frozen=True, tag=12):
    """From here on slots up to `slot` may be shown to clients: after a restart nothing is read before they are here."""

    slot: int


SharedEntry = LogRecord | LogBatch | LogState | LogDecision | LogWedges | LogShown
_encode = msgspec.msgpack.Encoder().encode


def encode_entry(entry: Frozen) -> bytes:
    """The bytes of a log record."""
    return _encode(entry)


@cache
def entry_decoder(types: tuple[type[Frozen], ...]) -> Callable[[bytes], Frozen]:
    """Decodes `SharedEntry`s and entries of `types`; what it returns raises BadError: the log is damaged where its
    checksums say it is not.
    """
    decode = msgspec.msgpack.Decoder(reduce(or_, types, SharedEntry)).decode

    def decode_entry(data: bytes) -> Frozen:
        try:
            entry: Frozen = decode(data)
        except MALFORMED as error:
            raise BadError(f"log record is malformed: {error}") from error
        return entry

    return decode_entry
