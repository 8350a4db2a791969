"""Messages of the replication protocol and their encoding (msgpack arrays, tagged by a small integer).

Stream messages (protocol §3) are a header, a payload and a UI over H(header ‖ H(payload)). The header is kept as the
bytes received: those were signed. Only a NEW-VIEW has a payload; so a COMMIT that carries header and UI of a PREPARE or
SKIP carries the whole message. A batch is named in the PREPARE by its digest and travels beside it.
"""

from typing import Final

import msgspec
from msgspec import Struct

from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import sha256, tagged
from cloudfit_orchestrator.model.ui import message_digest

MAX_PEER_FRAME: Final = 8 << 20  # one chunk of state, or a batch of 1 MiB with its PREPARE
MAX_CLIENT_FRAME: Final = 1 << 20  # one bundle
MAX_FETCH: Final = 256  # messages asked for at once
MAX_CHUNKS_ASKED: Final = 64
NOOP: Final = sha256(b"cloudfit/noop/v1")  # the digest that stands for "no request"; no batch has it


class Frozen(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


# ---------------------------------------------------------------------------------------- headers of stream messages
class Prepare(Frozen, frozen=True, tag=1):
    """PREPARE(c, g, s, D): the proposer of s proposes the batch with digest D."""

    c: int
    g: int
    s: int
    batch: bytes


class Skip(Frozen, frozen=True, tag=2):
    """SKIP(c, g, s1..s2): the proposer of s1 and s2 proposes no-ops for all its slots of the range."""

    c: int
    g: int
    s1: int
    s2: int


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

    c: int
    g: int
    entries: tuple[Entry, ...]


class Named(Frozen, frozen=True):
    """A stream message by its place: (replica, counter, message digest)."""

    replica: str
    cv: int
    digest: bytes


class Signed(Frozen, frozen=True):
    """A replica's signature over a statement whose body the context gives."""

    replica: str
    signature: bytes


class Stable(Frozen, frozen=True, tag=4):
    """STABLE(c, h', certificate, v, e, p, blacklist, retired, vector): states the whole state of its stream."""

    c: int
    h: int
    digest: bytes
    certificate: tuple[Signed, ...]
    v: int
    e: int
    p: int
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

    c: int
    g: int
    certificate: tuple[Req, ...]
    retires: tuple[bytes, ...]


class Wedge(Frozen, frozen=True, tag=6):
    """VIEW-CHANGE(c', 0): the last message of a stream of c; `prepared` is the envelope of PREPARED(c')."""

    c: int
    prepared: bytes


class NewView(Frozen, frozen=True, tag=7):
    """NEW-VIEW(c, g, h*, s_max, blacklist', retired'); payload `Merge`."""

    c: int
    g: int
    h: int
    s_max: int
    blacklist: tuple[str, ...]
    retired: tuple[str, ...]


class CommitNewView(Frozen, frozen=True, tag=8):
    """COMMIT(NEW-VIEW): carries header and UI of the NEW-VIEW by leader(c, g)."""

    c: int
    g: int
    cv: int
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


class StatementMessage(Frozen, frozen=True, tag=21):
    """A KSS-signed statement; `kind` and `body` as in model.statement."""

    c: int
    replica: str
    kind: int
    body: bytes
    signature: bytes


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


class FetchBatches(Frozen, frozen=True, tag=24):
    """Ask for batches by digest."""

    digests: tuple[bytes, ...]


class BatchMessage(Frozen, frozen=True, tag=25):
    """A batch; its digest is computed."""

    batch: bytes


class Forward(Frozen, frozen=True, tag=26):
    """A client's bundle, handed on to a proposer."""

    bundle: bytes


class StateQuery(Frozen, frozen=True, tag=27):
    """Ask for the chunk hashes of the state with Merkle root `root`; an empty root asks an exporter for all it has."""

    root: bytes


class StateIndex(Frozen, frozen=True, tag=28):
    """Answer: the concatenated chunk hashes (32 bytes each)."""

    root: bytes
    slot: int
    hashes: bytes


class ChunkQuery(Frozen, frozen=True, tag=29):
    """Ask for chunks `indices` of the state with that root."""

    root: bytes
    indices: tuple[int, ...]


class Chunk(Frozen, frozen=True, tag=30):
    """Answer: one chunk; empty `data` and `missing` if the holder cannot read it."""

    root: bytes
    index: int
    data: bytes
    missing: bool = False


class WedgeSet(Frozen, frozen=True, tag=31):
    """A set of wedges on base c from which the sender computed S for `successor`."""

    c: int
    successor: int
    wedges: tuple[Named, ...]


class Beacon(Frozen, frozen=True, tag=34):
    """An unsigned hint, repeated: the sender's stream is at `cv` in c, its state after `slot`. Shows lost tails."""

    c: int
    cv: int
    slot: int


class EpochEndMessage(Frozen, frozen=True, tag=32):
    """EPOCH-END of a stopped member, handed round as its vote."""

    c: int
    replica: str
    cv_end: int
    last_digest: bytes
    last_certificate: bytes
    signature: bytes


PeerMessage = (
    StreamMessage
    | StatementMessage
    | Fetch
    | Discarded
    | FetchNewView
    | LogProof
    | FetchBatches
    | BatchMessage
    | Forward
    | StateQuery
    | StateIndex
    | ChunkQuery
    | Chunk
    | WedgeSet
    | Beacon
    | EpochEndMessage
)


# --------------------------------------------------------------------------------------------------- client messages
class Request(Frozen, frozen=True):
    """One operation of a client; `number` increases, and stays inside the client's window."""

    number: int
    operation: bytes


class BundleBody(Frozen, frozen=True):
    """What a client signs, once for many requests. `group`: `ConfigRecord.life`."""

    group: str
    client: bytes
    requests: tuple[Request, ...]


class Bundle(Frozen, frozen=True, tag=40):
    """A signed bundle: `body` is an encoded BundleBody, `signature` by the client's key under the tag `bundle`."""

    body: bytes
    signature: bytes


class Result(Frozen, frozen=True):
    """The result of one request."""

    number: int
    result: bytes


class Replies(Frozen, frozen=True, tag=41):
    """Results of one client in one slot. `signature`: the replica's KSS statement REPLY(c, slot, root); the client's
    leaf and `path` lead to the root.
    """

    replica: str
    c: int
    slot: int
    results: tuple[Result, ...]
    path: tuple[tuple[bool, bytes], ...]  # (sibling is left, sibling hash), from the leaf up
    signature: bytes


class Overloaded(Frozen, frozen=True, tag=42):
    """The replica has no room for these requests now; ask again later. Not an answer."""

    numbers: tuple[int, ...]


ClientMessage = Bundle | Replies | Overloaded


# ------------------------------------------------------------------------------------------------------------ codecs
_encode = msgspec.msgpack.Encoder().encode
_headers: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)
_peers: msgspec.msgpack.Decoder[PeerMessage] = msgspec.msgpack.Decoder(PeerMessage)
_clients: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_merges = msgspec.msgpack.Decoder(Merge)
_bodies = msgspec.msgpack.Decoder(BundleBody)
_MALFORMED = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


def encode(message: Struct) -> bytes:
    """The bytes of any message here."""
    return _encode(message)


def decode_header(data: bytes) -> Header:
    """Raises BadError."""
    try:
        header = _headers.decode(data)
    except _MALFORMED as error:
        raise BadError(f"header is malformed: {error}") from error
    _check_ints(header)
    return header


def decode_peer(data: bytes) -> PeerMessage:
    """Raises BadError."""
    try:
        return _peers.decode(data)
    except _MALFORMED as error:
        raise BadError(f"peer message is malformed: {error}") from error


def decode_client(data: bytes) -> ClientMessage:
    """Raises BadError."""
    try:
        return _clients.decode(data)
    except _MALFORMED as error:
        raise BadError(f"client message is malformed: {error}") from error


def decode_merge(data: bytes) -> Merge:
    """Raises BadError."""
    try:
        return _merges.decode(data)
    except _MALFORMED as error:
        raise BadError(f"merge payload is malformed: {error}") from error


def decode_bundle_body(data: bytes) -> BundleBody:
    """Raises BadError."""
    try:
        return _bodies.decode(data)
    except _MALFORMED as error:
        raise BadError(f"bundle body is malformed: {error}") from error


def _check_ints(header: Header) -> None:
    """Counters are unsigned 64 bit: what a struct cannot hold must not reach one."""
    for name in ("c", "g", "s", "s1", "s2", "h", "v", "e", "p", "s_max", "cv"):
        value = getattr(header, name, 0)
        if not 0 <= value < 1 << 63:
            raise BadError(f"{type(header).__name__}.{name} is out of range")


def bundle_bytes(body: bytes) -> bytes:
    """What a client's key signs."""
    return tagged("bundle", body)


def reply_leaf(client: bytes, results: tuple[Result, ...]) -> bytes:
    """The leaf of one client's results in the Merkle tree of a slot's replies."""
    return sha256(b"cloudfit/reply-leaf/v1\0", client, encode(_Results(results)))


def reply_node(left: bytes, right: bytes) -> bytes:
    """An inner node of that tree."""
    return sha256(b"cloudfit/reply-node/v1\0", left, right)


class _Results(Frozen, frozen=True):
    results: tuple[Result, ...]
