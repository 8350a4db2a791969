"""Certificates, REQs and attestations (protocol §4, §5): f+1 distinct members, none forged, bounded."""

from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.batch import BundleChecker
from cloudfit_orchestrator.bft.batches import Batches
from cloudfit_orchestrator.bft.checkpoints import MAX_CHECKPOINT_SLOTS
from cloudfit_orchestrator.bft.messages import Named, Signed
from cloudfit_orchestrator.bft.usig.evidence import MAX_VIEW, Attestations, Statements
from cloudfit_orchestrator.bft.usig.messages import Req, Stable, StreamMessage
from cloudfit_orchestrator.model.statement import Kind
from tests.unit.bft.house import House

HOUSE = House(3, window=8, period=4)
FIVE = House(5, f=2, window=8, period=4)
D, OTHER = b"d" * 32, b"o" * 32


def statements(house: House = HOUSE) -> Statements:
    return Statements(house.record, house.keys)


# ------------------------------------------------------------------------------------------------ CHECKPOINTs, STABLE
def test_f_plus_1_equal_checkpoints_of_distinct_members_are_a_certificate() -> None:
    s = statements()
    assert s.add(HOUSE.statement("r0", Kind.CHECKPOINT, 4, D), 0)
    assert s.add(HOUSE.statement("r0", Kind.CHECKPOINT, 4, D), 0)
    assert s.add(HOUSE.statement("r1", Kind.CHECKPOINT, 4, OTHER), 0)
    assert s.newest is None
    assert s.add(HOUSE.statement("r2", Kind.CHECKPOINT, 4, D), 0)
    assert s.newest is not None
    assert (s.newest.slot, s.newest.digest, [x.replica for x in s.newest.signatures]) == (4, D, ["r0", "r2"])
    assert s.valid_certificate(4, D, s.newest.signatures)


def test_forged_certificates_are_none() -> None:
    s = statements()
    good = HOUSE.checkpoint(4, D, "r0", "r1")
    assert s.valid_certificate(4, D, good)
    assert not s.valid_certificate(4, OTHER, good)
    assert not s.valid_certificate(8, D, good)
    assert not s.valid_certificate(4, b"short", good)
    assert not s.valid_certificate(4, D, good[:1])
    assert not s.valid_certificate(4, D, (good[0], good[0])), "one member twice"
    assert not s.valid_certificate(4, D, (good[0], Signed("r1", good[0].signature)))
    assert not s.valid_certificate(4, D, (good[0], Signed("stranger", good[1].signature)))
    assert not s.valid_certificate(4, D, (*good, *good)), "more signatures than members"
    other_epoch = House(3, c=2, keys=HOUSE.keys)
    assert not s.valid_certificate(4, D, other_epoch.checkpoint(4, D, "r0", "r1")), "signed under another c"


def test_a_checkpoint_with_a_wrong_signature_is_refused() -> None:
    s = statements()
    message = HOUSE.statement("r1", Kind.CHECKPOINT, 4, D)
    stolen = type(message)(message.c, "r0", message.kind, message.body, message.signature)
    assert not s.add(stolen, 0)
    assert not s.add(type(message)(1, "r1", message.kind, message.body, bytes(64)), 0)
    assert not s.add(type(message)(1, "r1", message.kind, message.body + b"x", message.signature), 0)
    assert not s.add(type(message)(1, "r1", 99, message.body, message.signature), 0)


def test_a_faulty_members_slot_of_10_to_the_9_pushes_out_nothing() -> None:
    s = statements()
    for i in range(3 * MAX_CHECKPOINT_SLOTS):
        s.add(HOUSE.statement("r2", Kind.CHECKPOINT, 10**9 + 4 * i, D), 0)
    for r in ("r0", "r1"):
        assert s.add(HOUSE.statement(r, Kind.CHECKPOINT, 4, D), 0)
    assert s.newest is not None
    assert s.newest.slot == 4


def test_a_checkpoint_between_periods_is_nobodys() -> None:
    s = statements()
    assert not s.add(HOUSE.statement("r2", Kind.CHECKPOINT, 5, D), 0)


# --------------------------------------------------------------------------------------------------------------- REQs
def test_f_plus_1_reqs_for_different_views_are_a_certificate_for_the_lower() -> None:
    s = statements(FIVE)
    for r, target in (("r0", 3), ("r1", 9), ("r2", 5)):
        assert s.add(FIVE.statement(r, Kind.REQ, target), 0)
    target, certificate = s.view_wanted()
    assert target == 3
    assert s.valid_requests(3, certificate)
    assert s.valid_requests(2, certificate)
    assert not s.valid_requests(4, certificate)


def test_f_members_alone_change_no_view() -> None:
    s = statements()
    s.add(HOUSE.statement("r2", Kind.REQ, 10**9), 0)
    assert s.view_wanted() == (0, ())
    s.add(HOUSE.statement("r0", Kind.REQ, 2), 0)
    assert s.view_wanted()[0] == 2, "a faulty member's target draws nobody further than a correct one's"


def test_forged_requests_are_none() -> None:
    s = statements()
    good = HOUSE.requests(3, "r0", "r1")
    assert s.valid_requests(3, good)
    assert not s.valid_requests(3, good[:1])
    assert not s.valid_requests(3, (good[0], good[0]))
    assert not s.valid_requests(3, (good[0], replace_target(good[1], 4)))
    assert not s.valid_requests(3, (good[0], Req("r1", 3, good[0].signature)))
    assert not s.valid_requests(3, (*good, *HOUSE.requests(3, "r2"))), "exactly f+1: what is passed on is all good"
    assert not s.valid_requests(3, (good[0], Req("r1", 1 << 70, good[1].signature)))
    assert not s.valid_requests(3, (good[0], Req("r1", -1, good[1].signature)))


def replace_target(req: Req, target: int) -> Req:
    return Req(req.replica, target, req.signature)


def test_a_later_request_replaces_an_earlier_one_and_never_goes_back() -> None:
    s = statements()
    for target in (5, 2, 7):
        assert s.add(HOUSE.statement("r0", Kind.REQ, target), 0)
    assert s.requests["r0"][0] == 7
    assert not s.add(HOUSE.statement("r0", Kind.REQ, MAX_VIEW), 0)


# ------------------------------------------------------------------------------------------------------- attestations
def attest(attestations: Attestations, who: str, **seen: int) -> None:
    vector = tuple(Named(owner, cv, bytes(32)) for owner, cv in seen.items())
    stable = Stable(1, 4, D, (), 0, 0, 0, (), (), vector)
    attestations.add(StreamMessage(1, who, 1, who.encode(), b"", b""), stable)


def test_a_stable_is_attested_by_its_owner_and_f_others() -> None:
    a = Attestations(FIVE.record)
    attest(a, "r1", r0=7)
    assert a.attested("r0") == 0
    assert a.proof("r0", 7) == ()
    attest(a, "r2", r0=5)
    assert a.attested("r0") == 5, "attesting a later one attests the earlier"
    assert [m.replica for m in a.proof("r0", 5)] == ["r1", "r2"]
    assert a.proof("r0", 6) == ()


def test_f_false_vectors_attest_nothing_of_a_faulty_stream() -> None:
    a = Attestations(FIVE.record)
    attest(a, "r3", r4=10**9)  # r3, r4: faulty, in collusion
    attest(a, "r0", r4=3)
    assert a.attested("r4") == 3
    attest(a, "r4", r4=10**9)  # the own word does not count twice
    attest(a, "r3", r4=10**9)
    assert a.attested("r4") == 3
    attest(a, "r3", stranger=10**9)
    assert a.attested("stranger") == 0


@given(st.lists(st.tuples(st.sampled_from(["r1", "r2", "r3", "r4"]), st.integers(0, 20)), max_size=12))
def test_the_order_of_attestations_does_not_matter(said: list[tuple[str, int]]) -> None:
    a, b = Attestations(FIVE.record), Attestations(FIVE.record)
    for who, cv in said:
        attest(a, who, r0=cv)
    for who, cv in reversed(said):
        attest(b, who, r0=cv)
    best: dict[str, int] = {}
    for who, cv in said:
        best[who] = max(cv, best.get(who, 0))
    ranked = sorted(best.values(), reverse=True)
    assert a.attested("r0") == b.attested("r0") == (ranked[1] if len(ranked) > 1 else 0)


# ------------------------------------------------------------------------------------------------------------- batches
def test_batches_are_held_with_their_verdict_and_bounded_until_named() -> None:
    house = House(3, window=8)
    batches = Batches(BundleChecker(house.record, house.keys), 2)
    good, bad = house.batch(), house.batch(valid=False)
    for digest in (good, bad):
        assert batches.add(digest, house.batches[digest])
        assert not batches.add(digest, house.batches[digest])
    assert (batches.valid(good), batches.valid(bad), batches.valid(bytes(32))) == (True, False, None)
    batches.name(good, 3)
    for _ in range(4):
        extra = house.batch(valid=False)
        batches.add(extra, house.batches[extra])
    assert batches.data(good) is not None, "what a proposal names is not pushed out"
    assert batches.data(bad) is None
    batches.drop(2)
    assert batches.data(good) is not None
    batches.drop(3)
    assert batches.data(good) is None
