"""Messages of the PBFT engine (protocol §5): votes of three phases, VIEW-CHANGE, NEW-VIEW, and what fetches them.

All are signed by the KSS as statements of kind PBFT over a digest, so they may be handed on by anybody. A vote's digest
covers its fields in a fixed layout: a certificate can then hold signatures only. A VIEW-CHANGE's and a NEW-VIEW's
covers the bytes received. The statement itself names group, replica and configuration.
"""

import struct
from enum import IntEnum

import msgspec

from cloudfit_orchestrator.bft.messages import MALFORMED, Frozen, Named, Signed
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, sha256

WEDGE = (1 << 63) - 1  # the target of a wedge: above all views of its configuration
_VOTE = struct.Struct(">BQQ32s")


class Phase(IntEnum):
    """Of the three-phase agreement (§4.2 of the paper)."""

    PRE_PREPARE = 1  # by the leader of the view alone; it is its PREPARE, too
    PREPARE = 2  # by the others
    COMMIT = 3


class Vote(Frozen, frozen=True, tag=50):
    """PRE-PREPARE, PREPARE or COMMIT(c, g, s, D). A PRE-PREPARE brings its `batch`, which is not signed, where it is
    held.
    """

    c: int
    replica: str
    phase: int
    g: int
    s: int
    digest: bytes
    signature: bytes
    batch: bytes = b""


class Prepared(Frozen, frozen=True):
    """A prepared certificate of slot s: the PRE-PREPARE of leader(c, g) and matching PREPAREs of Q-1 others."""

    s: int
    g: int
    digest: bytes
    proposal: bytes
    prepares: tuple[Signed, ...]


class ViewChange(Frozen, frozen=True, tag=1):
    """VIEW-CHANGE(c, target): the own stable checkpoint with its certificate, and a prepared certificate of each slot
    above it that is prepared here, of the highest view. Target `WEDGE`: the last word in this configuration.
    """

    replica: str  # so that no two members' have one name
    target: int
    h: int
    digest: bytes
    certificate: tuple[Signed, ...]
    prepared: tuple[Prepared, ...]


class NewView(Frozen, frozen=True, tag=2):
    """NEW-VIEW(c, g): names the VIEW-CHANGEs it follows from; everyone computes the rest."""

    replica: str
    g: int
    view_changes: tuple[Named, ...]


class Change(Frozen, frozen=True, tag=51):
    """A signed VIEW-CHANGE or NEW-VIEW: `body` is encoded."""

    c: int
    replica: str
    body: bytes
    signature: bytes


class Decided(Frozen, frozen=True, tag=52):
    """A commit certificate of slot s: COMMIT(c, g, s, D) by Q members."""

    c: int
    g: int
    s: int
    digest: bytes
    commits: tuple[Signed, ...]


class FetchSlots(Frozen, frozen=True, tag=53):
    """Ask what is known of slots first..last, by one who is in view g."""

    c: int
    g: int
    first: int
    last: int


class FetchChanges(Frozen, frozen=True, tag=54):
    """Ask for VIEW-CHANGEs by the digests that a NEW-VIEW or a set of wedges names."""

    c: int
    digests: tuple[bytes, ...]


class Stable(Frozen, frozen=True, tag=55):
    """A checkpoint certificate: a faulty member may withhold from one what makes it a certificate for others."""

    c: int
    slot: int
    digest: bytes
    certificate: tuple[Signed, ...]


MESSAGES: tuple[type[Frozen], ...] = (Vote, Change, Decided, FetchSlots, FetchChanges, Stable)
_bodies: msgspec.msgpack.Decoder[ViewChange | NewView] = msgspec.msgpack.Decoder(ViewChange | NewView)


def decode_body(data: bytes) -> ViewChange | NewView:
    """The body of a Change. Raises BadError."""
    try:
        return _bodies.decode(data)
    except MALFORMED as error:
        raise BadError(f"VIEW-CHANGE or NEW-VIEW is malformed: {error}") from error


def vote_statement(phase: int, g: int, s: int, digest: bytes) -> bytes:
    """What a vote's signature covers, as the body of a PBFT statement (32 bytes). Raises BadError if a field has no
    place in it.
    """
    if not (0 < phase < 256 and 0 <= g < WEDGE and 0 <= s < WEDGE and len(digest) == DIGEST_BYTES):
        raise BadError(f"no vote has phase {phase}, view {g}, slot {s} and a digest of {len(digest)} bytes")
    return sha256(b"cloudfit/pbft-vote/v1\0", _VOTE.pack(phase, g, s, digest))


def change_statement(body: bytes) -> bytes:
    """What the signature of a VIEW-CHANGE or NEW-VIEW covers; its name in NEW-VIEWs and sets of wedges."""
    return sha256(b"cloudfit/pbft-change/v1\0", body)
