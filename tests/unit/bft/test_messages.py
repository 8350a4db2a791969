"""Encodings: bytes from strangers raise BadError or decode, nothing else; what was encoded comes back."""

from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from hypothesis import example, given, reject
from hypothesis import strategies as st

from cloudfit_orchestrator.bft import messages
from cloudfit_orchestrator.bft.batch import BundleChecker, batch_digest, make_batch, split_batch
from cloudfit_orchestrator.bft.messages import (
    Bundle,
    BundleBody,
    Request,
    bundle_bytes,
    decode_bundle_body,
    decode_client,
    encode,
)
from cloudfit_orchestrator.bft.usig.journal import decode_entry
from cloudfit_orchestrator.bft.usig.messages import (
    Header,
    PeerMessage,
    Prepare,
    decode_header,
    decode_merge,
    decode_peer,
)
from cloudfit_orchestrator.model.errors import BadError
from tests.unit.bft.house import House

DECODERS = [decode_header, decode_peer, decode_client, decode_merge, decode_bundle_body, decode_entry, split_batch]
packed = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=40) | st.text(max_size=8),
    lambda x: st.lists(x, max_size=9),
    max_leaves=20,
).map(msgspec.msgpack.encode)
tagged_ = st.tuples(
    st.integers(0, 45), st.lists(st.integers(-1, 5) | st.binary(max_size=33) | st.text(max_size=4), max_size=10)
)
framed = tagged_.map(lambda x: msgspec.msgpack.encode([x[0], *x[1]]))


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=200) | packed | framed)
@example(data=b"\x91" * 5000)  # nested deeper than a stack
@example(data=b"\x98\x14\x01\xa2\xff\xfe\x01\xc4\x00\xc4\x00\xc4\x00\xc4\x00")  # a name that is no UTF-8
@example(data=b"\xdd\xff\xff\xff\xff")  # an array that promises 2^32 items
def test_random_bytes_only_raise_bad_error(decode, data: bytes) -> None:
    with suppress(BadError):
        decode(data)


def packable(message: msgspec.Struct) -> bytes:
    """Its bytes; messages with numbers that msgpack does not know are no messages."""
    try:
        return encode(message)
    except OverflowError:
        reject()


@given(st.from_type(Header))
def test_headers_come_back_unless_a_number_is_out_of_range(header: Header) -> None:
    data = packable(header)
    with suppress(BadError):
        assert decode_header(data) == header
        return
    assert any(isinstance(x, int) and not 0 <= x < 1 << 63 for x in msgspec.structs.astuple(header))


@given(st.from_type(PeerMessage))
def test_peer_messages_come_back(message: PeerMessage) -> None:
    assert decode_peer(packable(message)) == message


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_counters_that_no_struct_holds_reach_none(n: int) -> None:
    data = encode(Prepare(1, 0, n, b""))
    if 0 <= n < 1 << 63:
        assert decode_header(data) == Prepare(1, 0, n, b"")
    else:
        with pytest.raises(BadError):
            decode_header(data)


def test_names_and_results_are_not_mixed_up() -> None:
    with pytest.raises(BadError):
        decode_client(encode(messages.Beacon(1, 1, 1)))
    with pytest.raises(BadError):
        decode_header(encode(messages.Beacon(1, 1, 1)))


# ------------------------------------------------------------------------------------------------------------- batches
HOUSE = House(3, clients=2, parameters={"max_batch_requests": 4, "max_batch_bytes": 4096})
CHECKER = BundleChecker(HOUSE.record, HOUSE.keys)


def signed(
    *requests: tuple[int, bytes], group: str = HOUSE.record.life, client: int = 0, signer: int | None = None
) -> bytes:
    key = HOUSE.client_keys[client]
    body = encode(BundleBody(group, key.public, tuple(Request(n, op) for n, op in requests)))
    return encode(Bundle(body, HOUSE.client_keys[client if signer is None else signer].sign(bundle_bytes(body))))


def test_a_valid_batch_is_its_bundles_in_order() -> None:
    batch = make_batch([signed((1, b"a"), (2, b"b")), signed((1, b"c"), client=1)])
    checked = CHECKER.valid(batch)
    assert checked is not None
    assert checked.digest == batch_digest(batch)
    assert [[r.operation for r in body.requests] for body in checked.bodies] == [[b"a", b"b"], [b"c"]]


STRANGER = House(3, clients=3, c=2).client_keys[2]
GOOD = signed((1, b"a"))
INVALID = {
    "empty": make_batch([]),
    "no msgpack": b"\xc1",
    "not a list": encode(Bundle(b"", b"")),
    "a bundle that is none": make_batch([GOOD, b"junk"]),
    "another message": make_batch([encode(messages.Overloaded((1,)))]),
    "a forged signature": make_batch([signed((1, b"a"), signer=1)]),
    "another group": make_batch([signed((1, b"a"), group="other")]),
    "no requests": make_batch([signed()]),
    "numbers that fall": make_batch([signed((2, b"a"), (1, b"b"))]),
    "a number twice": make_batch([signed((1, b"a"), (1, b"b"))]),
    "number 0": make_batch([signed((0, b"a"))]),
    "a number beyond the tables": make_batch([signed((1 << 62, b"a"))]),
    "too many requests": make_batch([signed(*((n, b"") for n in range(1, 6)))]),
    "too many in all": make_batch([signed((1, b""), (2, b""), (3, b"")), signed((1, b""), (2, b""), client=1)]),
    "too many bytes": make_batch([signed((1, bytes(5000)))]),
    "a bundle that is not canonical": make_batch([GOOD.replace(b"\xc4\x40", b"\xc5\x00\x40")]),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_batch_is_invalid_for_everybody(name: str) -> None:
    assert CHECKER.valid(INVALID[name]) is None
    assert BundleChecker(HOUSE.record, HOUSE.keys).valid(INVALID[name]) is None


def test_a_client_that_is_not_admitted_has_no_say() -> None:
    body = encode(BundleBody(HOUSE.record.life, STRANGER.public, (Request(1, b""),)))
    with pytest.raises(BadError, match="not admitted"):
        CHECKER.check(encode(Bundle(body, STRANGER.sign(bundle_bytes(body)))))


def test_a_verdict_is_remembered_for_these_bytes_only() -> None:
    checker = BundleChecker(HOUSE.record, HOUSE.keys)
    checker.check(GOOD)
    with pytest.raises(BadError, match="wrong signature"):
        checker.check(GOOD[:-1] + bytes([GOOD[-1] ^ 1]))


def test_a_request_to_a_destroyed_group_is_none_to_its_successor_in_name() -> None:
    anew = replace(HOUSE.record, c=9, born=9)
    old = signed((1, b"pay"))
    assert CHECKER.check(old).requests[0].number == 1
    with pytest.raises(BadError, match="is for group"):
        BundleChecker(anew, HOUSE.keys).check(old)
