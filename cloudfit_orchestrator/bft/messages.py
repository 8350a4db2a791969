"""Messages that every ordering engine shares, and the encoding of all (msgpack arrays, tagged by a small integer).

An engine adds messages of its own (`Ordering.MESSAGES`): the tags 20-39 are taken here and by the USIG engine, 40-49 by
messages of clients, 50-59 by PBFT; an engine from elsewhere takes tags from 100 on.
"""

from collections.abc import Callable
from functools import cache, reduce
from operator import or_
from typing import Final

import msgspec
from msgspec import Struct

from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import sha256, tagged

MAX_PEER_FRAME: Final = 8 << 20  # one chunk of state, or a batch of 1 MiB with its PREPARE
MAX_CLIENT_FRAME: Final = 1 << 20  # one bundle
MAX_FETCH: Final = 256  # messages asked for at once
MAX_CHUNKS_ASKED: Final = 64
NOOP: Final = sha256(b"cloudfit/noop/v1")  # the digest that stands for "no request"; no batch has it


class Frozen(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages. They are trees: the collector of garbage, which looks for cycles, need not visit them."""


class Value(Struct, frozen=True, gc=False):
    """Base of what the core makes for itself many times a slot, of trees as well: a dataclass that is frozen takes ten
    times as long.
    """


# ----------------------------------------------------------------------------------------------------- wire messages
class Named(Frozen, frozen=True):
    """A signed message by its place: (replica, counter, message digest); the counter is 0 where an engine has none."""

    replica: str
    cv: int
    digest: bytes


class Signed(Frozen, frozen=True):
    """A replica's signature over a statement whose body the context gives."""

    replica: str
    signature: bytes


class StatementMessage(Frozen, frozen=True, tag=21):
    """A KSS-signed statement; `kind` and `body` as in model.statement."""

    c: int
    replica: str
    kind: int
    body: bytes
    signature: bytes


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


SharedMessage = (
    StatementMessage
    | FetchBatches
    | BatchMessage
    | Forward
    | StateQuery
    | StateIndex
    | ChunkQuery
    | Chunk
    | WedgeSet
    | Beacon
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


class Read(Frozen, frozen=True, tag=43):
    """Operations that change nothing, to be answered from the state as it is; `number` is used once. Unsigned: who is
    admitted may read, and the connection says who asks.
    """

    number: int
    operations: tuple[bytes, ...]


class Seen(Frozen, frozen=True):
    """What one operation of a `Read` gave; `slot`: nothing that it read was written after it."""

    slot: int
    result: bytes


class ReadReply(Frozen, frozen=True, tag=44):
    """Answers to all operations of a `Read`, in order; none, and no signature, if the replica may not answer now.
    `signature`: the replica's KSS statement READ(c, client, number, slot, digest of what was seen).
    """

    replica: str
    c: int
    number: int
    slot: int
    seen: tuple[Seen, ...]
    signature: bytes


ClientMessage = Bundle | Replies | Overloaded | Read | ReadReply


# ------------------------------------------------------------------------------------------------------------ codecs
_encode = msgspec.msgpack.Encoder().encode
_clients: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_bodies = msgspec.msgpack.Decoder(BundleBody)
_READ_TAG = bytes([43])
MALFORMED: Final = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


def encode(message: Struct) -> bytes:
    """The bytes of any message here."""
    return _encode(message)


@cache
def peer_decoder(types: tuple[type[Frozen], ...]) -> Callable[[bytes], Frozen]:
    """Decodes `SharedMessage`s and messages of `types`; what it returns raises BadError."""
    decode = msgspec.msgpack.Decoder(reduce(or_, types, SharedMessage)).decode

    def decode_peer(data: bytes) -> Frozen:
        try:
            message: Frozen = decode(data)
        except MALFORMED as error:
            raise BadError(f"peer message is malformed: {error}") from error
        return message

    return decode_peer


def decode_client(data: bytes) -> ClientMessage:
    """Raises BadError."""
    try:
        return _clients.decode(data)
    except MALFORMED as error:
        raise BadError(f"client message is malformed: {error}") from error


def as_read(data: bytes) -> Read | None:
    """The `Read` that a client's frame is; None if it is anything else."""
    if data[1:2] != _READ_TAG:  # an array's second byte is its tag: most frames are bundles, and need not be decoded
        return None
    try:
        message = decode_client(data)
    except BadError:
        return None
    return message if isinstance(message, Read) else None


def decode_bundle_body(data: bytes) -> BundleBody:
    """Raises BadError."""
    try:
        return _bodies.decode(data)
    except MALFORMED as error:
        raise BadError(f"bundle body is malformed: {error}") from error


def bundle_bytes(body: bytes) -> bytes:
    """What a client's key signs."""
    return tagged("bundle", body)


def reply_leaf(client: bytes, results: tuple[Result, ...]) -> bytes:
    """The leaf of one client's results in the Merkle tree of a slot's replies."""
    return sha256(b"cloudfit/reply-leaf/v1\0", client, encode(_Results(results)))


def reply_node(left: bytes, right: bytes) -> bytes:
    """An inner node of that tree."""
    return sha256(b"cloudfit/reply-node/v1\0", left, right)


def seen_digest(operations: tuple[bytes, ...], seen: tuple[Seen, ...]) -> bytes:
    """What a READ statement covers: questions and answers."""
    return sha256(b"cloudfit/seen/v1\0", encode(_Seen(operations, seen)))


class _Seen(Frozen, frozen=True):
    operations: tuple[bytes, ...]
    seen: tuple[Seen, ...]


class _Results(Frozen, frozen=True):
    results: tuple[Result, ...]
