"""Every decoder of the replication library on raw bytes: a message that means one thing, or BadError."""

from collections.abc import Callable
from typing import Any

from cloudfit_orchestrator.bft.batch import bundle_body, make_batch, split_batch
from cloudfit_orchestrator.bft.journal import encode_entry
from cloudfit_orchestrator.bft.messages import Overloaded, Replies, decode_bundle_body, decode_client, encode
from cloudfit_orchestrator.bft.store import decode_chunk
from cloudfit_orchestrator.bft.usig.journal import decode_entry
from cloudfit_orchestrator.bft.usig.messages import Header, PeerMessage, decode_header, decode_merge, decode_peer
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.testing.crypto import KeyRing
from tests.fuzz.choices import Choices

DECODERS: tuple[tuple[Callable[[bytes], Any], Callable[[Any], bytes] | None], ...] = (
    (decode_peer, encode),
    (decode_header, encode),
    (decode_client, encode),
    (decode_merge, encode),
    (decode_bundle_body, encode),
    (decode_entry, encode_entry),
    (split_batch, make_batch),
    (bundle_body, None),
    (decode_chunk, None),
)
KEYS = KeyRing()


def run(data: bytes) -> None:
    """The first byte chooses the decoder."""
    decode, back = DECODERS[(data or b"\0")[0] % len(DECODERS)]
    try:
        found = decode(data[1:])
    except BadError as error:
        assert len(str(error)) < 1000
        return
    if back is not None:
        again = back(found)
        assert decode(again) == found, "what was decoded is not what is passed on"
        assert len(again) <= len(data), "passing a message on makes it larger"


def seeds() -> list[bytes]:
    """One of each message."""
    found = []
    for number, kinds in ((0, PeerMessage), (1, Header), (2, Replies | Overloaded)):
        for i in range(len(kinds.__args__)):
            built = Choices(bytes([i]) + bytes(range(60, 124))).build(kinds)
            found.append(bytes([number]) + encode(built))
    return found
