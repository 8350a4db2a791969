"""Messages of the USIG engine (protocol §3): what members say in their streams, and how streams are fetched.

Stream messages are a header, a payload and a UI over H(header ‖ H(payload)). The header is kept as the bytes received:
those were signed. Only a NEW-VIEW has a payload; so a COMMIT that carries header and UI of a PREPARE or SKIP carries
the whole message. A batch is named in the PREPARE by its digest and travels beside it.
"""

from typing import Annotated, cast

import msgspec

from cloudfit_orchestrator.bft.messages import MALFORMED, Frozen, Named, SharedMessage, Signed, peer_decoder
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.ui import message_digest

# What a struct cannot hold must not reach one: the decoder refuses other values in a header.
Counter = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


# ---------------------------------------------------------------------------------------- headers of stream messages
class Prepare(Frozen, frozen=True, tag=1):
    """PREPARE(c, g, s, D): the proposer of s proposes the batch with digest D."""

    c: Counter
    g: Counter
    s: Counter
    batch: bytes


class Skip(Frozen, frozen=True, tag=2):
    """SKIP(c, g, s1..s2): the proposer of s1 and s2 proposes no-ops for all its slots of the range."""

    c: Counter
    g: Counter
    s1: Counter
    s2: Counter


class Entry(Frozen, frozen=True):
    """One vote in a COMMIT: it carries the PREPARE or SKIP with its UI; s1 = s2 = s for a PREPARE."""

    s1: int
    s2: int
    proposer: str
    cv: int
    header: bytes
    certificate: bytes


class Commit(Frozen, frozen=True, tag=3):
    """COMMIT(c, g, entries): at most L entries."""

    c: Counter
    g: Counter
    entries: tuple[Entry, ...]


class Stable(Frozen, frozen=True, tag=4):
    """STABLE(c, h', certificate, v, e, p, blacklist, retired, vector): states the whole state of its stream."""

    c: Counter
    h: Counter
    digest: bytes
    certificate: tuple[Signed, ...]
    v: Counter
    e: Counter
    p: Counter
    blacklist: tuple[str, ...]
    retired: tuple[str, ...]
    vector: tuple[Named, ...]


class Req(Frozen, frozen=True):
    """A member's REQ for view `target`, inside a certificate."""

    replica: str
    target: int
    signature: bytes


class ViewChange(Frozen, frozen=True, tag=5):
    """VIEW-CHANGE(c, g, certificate, known RETIREs). Its log O is the sender's stream before it: a stream has one
    message per counter, so every judge that has read it to here holds O, and none needs it carried.
    """

    c: Counter
    g: Counter
    certificate: tuple[Req, ...]
    retires: tuple[bytes, ...]


class Wedge(Frozen, frozen=True, tag=6):
    """VIEW-CHANGE(c', 0): the last message of a stream of c; `prepared` is the envelope of PREPARED(c')."""

    c: Counter
    prepared: bytes


class NewView(Frozen, frozen=True, tag=7):
    """NEW-VIEW(c, g, h*, s_max, blacklist', retired'); payload `Merge`."""

    c: Counter
    g: Counter
    h: Counter
    s_max: Counter
    blacklist: tuple[str, ...]
    retired: tuple[str, ...]


class CommitNewView(Frozen, frozen=True, tag=8):
    """COMMIT(NEW-VIEW): carries header and UI of the NEW-VIEW by leader(c, g)."""

    c: Counter
    g: Counter
    cv: Counter
    header: bytes
    payload_hash: bytes
    certificate: bytes


Header = Prepare | Skip | Commit | Stable | ViewChange | Wedge | NewView | CommitNewView


# ----------------------------------------------------------------------------------------------------- wire messages
class StreamMessage(Frozen, frozen=True, tag=20):
    """Message `cv` of `replica`'s stream in c. `batch` is outside the UI: it comes with a PREPARE where it is held."""

    c: int
    replica: str
    cv: int
    header: bytes
    payload: bytes
    certificate: bytes
    batch: bytes = b""

    @property
    def digest(self) -> bytes:
        """What the UI certifies."""
        return message_digest(self.header, self.payload)


class Choice(Frozen, frozen=True):
    """One slot of S: the proposal of the highest view `g`, or NOOP."""

    s: int
    g: int
    batch: bytes


class Merge(Frozen, frozen=True):
    """Payload of a NEW-VIEW: the VIEW-CHANGEs it is computed from, and S."""

    view_changes: tuple[Named, ...]
    choices: tuple[Choice, ...]


class Fetch(Frozen, frozen=True, tag=22):
    """Ask for messages first..last of a stream."""

    c: int
    replica: str
    first: int
    last: int


class Discarded(Frozen, frozen=True, tag=23):
    """Answer to a FETCH of a discarded counter: the newest attested STABLE that is kept, with its attestation."""

    stable: StreamMessage
    attestation: tuple[StreamMessage, ...]


class FetchNewView(Frozen, frozen=True, tag=33):
    """Ask for the NEW-VIEW(c, g) message, which is kept while its view is current."""

    c: int
    g: int


class LogProof(Frozen, frozen=True, tag=35):
    """The log of a VIEW-CHANGE, from a permitted anchor (or the epoch's start) to the VIEW-CHANGE itself."""

    messages: tuple[StreamMessage, ...]


class EpochEndMessage(Frozen, frozen=True, tag=32):
    """EPOCH-END of a stopped member, handed round as its vote."""

    c: int
    replica: str
    cv_end: int
    last_digest: bytes
    last_certificate: bytes
    signature: bytes


MESSAGES: tuple[type[Frozen], ...] = (StreamMessage, Fetch, Discarded, FetchNewView, LogProof, EpochEndMessage)
PeerMessage = SharedMessage | StreamMessage | Fetch | Discarded | FetchNewView | LogProof | EpochEndMessage


# ------------------------------------------------------------------------------------------------------------ codecs
_headers: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)
_merges = msgspec.msgpack.Decoder(Merge)


def decode_peer(data: bytes) -> PeerMessage:
    """Any message between members that use this engine. Raises BadError."""
    return cast("PeerMessage", peer_decoder(MESSAGES)(data))


def decode_header(data: bytes) -> Header:
    """Raises BadError."""
    try:
        return _headers.decode(data)
    except MALFORMED as error:
        raise BadError(f"header is malformed: {error}") from error


def decode_merge(data: bytes) -> Merge:
    """Raises BadError."""
    try:
        return _merges.decode(data)
    except MALFORMED as error:
        raise BadError(f"merge payload is malformed: {error}") from error
