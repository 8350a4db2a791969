"""Executions that broke an earlier wording of the protocol (§3-§5), each with its rule and, where cheap, without it.

A test that is parametrised by `rule` runs the same execution twice: with the rule in force, and with the rule taken out
by a patch, where the damage must show. So each test proves that its rule is what holds.
"""

from dataclasses import replace

import pytest
from msgspec import structs

from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.ordering import AgreementError
from cloudfit_orchestrator.bft.usig import configuration as room
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.evidence import Attestations
from cloudfit_orchestrator.bft.usig.judge import Broken, StreamState
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    Discarded,
    Entry,
    Prepare,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.stream import Offered
from cloudfit_orchestrator.model.record import Algorithm
from tests.unit.bft.house import WEDGE, House, entry_of

MINBFT = Algorithm.MINBFT
with_and_without = pytest.mark.parametrize("rule", [True, False], ids=["rule", "mutant"])


def drop_rule(monkeypatch: pytest.MonkeyPatch, name: str, kind: type) -> None:
    """Take a rule out for one type of message: what it would end stands, and changes nothing but the count."""
    real = room.judge

    def lenient(record, state, *rest):
        outcome = real(record, state, *rest)
        header = rest[2]
        if isinstance(outcome, Broken) and outcome.rule.startswith(name) and isinstance(header, kind):
            return structs.replace(state, since=state.since + 1)
        return outcome

    monkeypatch.setattr(room, "judge", lenient)


def batch_of(message: StreamMessage) -> bytes:
    header = decode_header(message.header)
    assert isinstance(header, Prepare)
    return header.batch


def jumped(house: House, stable: StreamMessage, *proofs: StreamMessage) -> Configuration:
    """A judge who was away, and goes on from an anchor."""
    judge = house.judge()
    assert judge.offer_jump(Discarded(stable, proofs))
    return judge


def verdict(judge: Configuration, replica: str) -> tuple[int | None, StreamState]:
    stream = judge.streams[replica]
    return stream.ended, stream.state


# ----- R4: a judge who starts at an attested STABLE agrees with one who has read everything
def patch_stated(monkeypatch: pytest.MonkeyPatch, **unsaid: object) -> None:
    real = room.stated
    monkeypatch.setattr(room, "stated", lambda stable: structs.replace(real(stable), **unsaid))


@with_and_without
def test_a_stable_states_the_last_slot_proposed(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    """n=4, 2/3: faulty r1 proposes slot 1 a second time, behind its anchor."""
    house = House(4)
    first = house.prepare("r1", 0, 1)
    house.commit("r0", first)
    anchor = house.stable("r1", 1)
    proof = house.stable("r0", 1)
    if not rule:
        patch_stated(monkeypatch, p=0)
    away = jumped(house, anchor, proof)
    second = house.prepare("r1", 0, 1)
    whole = house.full_judge()
    assert whole.streams["r1"].ended == second.cv
    if rule:
        house.tell(away)
        assert verdict(away, "r1") == verdict(whole, "r1")
    else:
        with pytest.raises(AgreementError):
            house.tell(away)


def two_views() -> tuple[House, StreamMessage, StreamMessage]:
    """Members enter view 2, decide slot 1 there, and r1 and r0 say STABLE(1)."""
    house = House(3, algorithm=MINBFT, window=4)
    view = house.new_view("r2", 2, [house.view_change(r, 2) for r in ("r0", "r2")])
    for r in ("r0", "r1"):
        house.commit_view(r, view)
    p = house.prepare("r2", 2, 1)
    house.commit("r0", p)
    house.commit("r1", p)
    return house, house.stable("r1", 1), house.stable("r0", 1)


@with_and_without
def test_a_stable_states_the_view_entered_last(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    house, anchor, proof = two_views()
    if not rule:
        patch_stated(monkeypatch, e=0)
    away = jumped(house, anchor, proof)
    house.commit("r1", house.prepare("r2", 2, 2))
    house.tell(away)
    assert (verdict(away, "r1") == verdict(house.full_judge(), "r1")) is rule


def test_r1_who_has_entered_view_2_speaks_in_view_1_no_more() -> None:
    house, anchor, proof = two_views()
    late = house.say("r1", Commit(1, 1, (entry_of(house.streams["r2"][-1], s1=2, s2=2),)))
    away = jumped(house, anchor, proof)
    house.tell(away)
    whole = house.full_judge()
    assert whole.streams["r1"].ended == late.cv
    assert verdict(away, "r1") == verdict(whole, "r1")


@with_and_without
def test_a_stable_states_the_blacklist(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    """ebawa: who proposes which slot of a view depends on its blacklist."""
    house = House(3, window=4)
    view = house.new_view("r2", 2, [house.view_change(r, 2) for r in ("r0", "r2")])  # slot 1 is r1's: it is blamed
    for r in ("r0", "r1"):
        house.commit_view(r, view)
    house.commit("r0", house.prepare("r2", 2, 1))  # Ag is r0, r2
    anchor, proof = house.stable("r0", 1), house.stable("r2", 1)
    if not rule:
        patch_stated(monkeypatch, blacklist=())
    away = jumped(house, anchor, proof)
    house.prepare("r0", 2, 2)
    house.tell(away)
    whole = house.full_judge()
    assert whole.streams["r0"].ended is None
    assert (verdict(away, "r0") == verdict(whole, "r0")) is rule


# ----- R1
@with_and_without
def test_r1_a_commit_after_a_view_change_counts_for_nothing(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    """n=3, faulty r2: it votes for slot 1 in view 0 after the VIEW-CHANGE that says that it did not."""
    house = House(3, algorithm=MINBFT)
    if not rule:
        drop_rule(monkeypatch, "R1", Commit)
    p = house.prepare("r0", 0, 1)
    votes = [house.view_change("r1", 1), house.view_change("r2", 1)]
    view = house.new_view("r1", 1, votes)
    house.commit_view("r0", view)
    house.commit("r2", p)
    if rule:
        judge = house.full_judge()
        assert judge.liars == {"r2": "R1: not the view entered last, or a later VIEW-CHANGE stands before it"}
        assert judge.slots.decisions() == []
    else:
        house.commit_view("r2", view)
        house.commit("r2", house.prepare("r1", 1, 1))
        with pytest.raises(AgreementError, match="slot 1"):
            house.full_judge()


@with_and_without
def test_form_a_bogus_new_view_enters_no_view(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    """Faulty r1 'enters' view 1 by a NEW-VIEW that does not recompute; its proposals there must not outbid slot 3."""
    house = House(3, algorithm=MINBFT, window=4)
    for s in (1, 2):
        house.commit("r2", house.prepare("r0", 0, s))
    good = house.prepare("r0", 0, 3)
    house.commit("r2", good)
    votes = [house.view_change("r0", 1), house.view_change("r1", 1)]
    house.new_view("r1", 1, votes, s_max=0, choices=())
    if not rule:
        monkeypatch.setattr(Configuration, "new_view_recomputes", lambda *_: True)
    evil = [house.prepare("r1", 1, s) for s in (1, 2, 3)]
    later = [house.view_change(r, 2) for r in ("r0", "r1", "r2")]
    judge = house.full_judge()
    assert judge.slots.decision(3) == batch_of(good)
    if rule:
        assert judge.streams["r1"].ended == 2
        assert 1 not in judge.new_views
        assert {v.name.replica for v in judge.votes.of(2)} == {"r0", "r2"}
        assert house.merged(2, [later[0], later[2]]).choices[2].batch == batch_of(good)
    else:
        assert house.merged(2, later[:2]).choices[2].batch == batch_of(evil[2]), "a decided slot is lost"


def test_form_the_first_new_view_that_is_bogus_ends_the_stream_a_good_one_after_it_is_none() -> None:
    house = House(4, window=2)
    votes = [house.view_change(r, 1) for r in ("r0", "r2", "r3")]
    bogus = house.new_view("r1", 1, votes, blacklist=("r0",))
    good = house.new_view("r1", 1, votes)
    commit = house.commit_view("r3", good)
    judge = house.full_judge()
    assert judge.streams["r1"].ended == bogus.cv
    assert judge.streams["r3"].ended == commit.cv, "a COMMIT of a NEW-VIEW that does not stand"
    assert judge.new_views == {}
    assert not house.accepts("r0", decode_header(house.commit_view("r0", good).header))


# ----- R2
@with_and_without
def test_r2_a_vote_beyond_the_window_would_vanish_behind_an_anchor(
    monkeypatch: pytest.MonkeyPatch, *, rule: bool
) -> None:
    """n=3, L=1: faulty r1 votes for slot 3 with its window at 0; then STABLE(1), STABLE(2): its log may begin at 1."""
    house = House(3, window=1)
    if not rule:
        drop_rule(monkeypatch, "R2", Commit)
    p = house.prepare("r1", 0, 1)
    for r in ("r0", "r2"):
        house.commit(r, p)
        house.stable(r, 1)
    q = house.prepare("r2", 0, 2)
    house.commit("r0", q)
    house.stable("r0", 2)
    r = house.prepare("r0", 0, 3)
    beyond = house.commit("r1", r)
    if rule:
        judge = house.full_judge()
        assert judge.streams["r1"].ended == beyond.cv
        assert judge.slots.decision(3) is None
        return
    anchor = house.stable("r1", 1)
    house.stable("r1", 2)
    house.stable("r2", 2)
    judge = house.full_judge()
    assert judge.slots.decision(3) == batch_of(r)
    away = jumped(house, anchor, house.streams["r2"][-1])
    votes = [house.view_change("r1", 2), house.view_change("r2", 2)]
    house.tell(away)
    assert house.merged(2, votes, away).s_max == 2, "the decided slot 3 is lost"


# ----- R3
def test_r3_a_second_proposal_for_a_slot_ends_the_stream_and_only_the_first_counts() -> None:
    house = House(5, f=2, window=4)
    first = house.prepare("r1", 0, 1)
    second = house.prepare("r1", 0, 1)
    for r in ("r3", "r4"):
        house.commit(r, second)
    judge = house.full_judge()
    assert judge.streams["r1"].ended == second.cv
    assert judge.slots.decision(1) is None
    for r in ("r0", "r2"):
        house.commit(r, first)
    assert house.full_judge().slots.decision(1) == batch_of(first)


def test_r3_skip_then_prepare_by_a_faulty_proposer_is_a_skip() -> None:
    """n=5: r1 skips slot 1 and proposes it all the same; its accomplice r2 votes for the PREPARE."""
    house = House(5, f=2, window=4)
    skip = house.skip("r1", 0, 1, 1)
    x = house.prepare("r1", 0, 1)
    house.commit("r2", x)
    for r in ("r0", "r3"):
        house.commit(r, skip)
    judge = house.full_judge()
    assert judge.streams["r1"].ended == x.cv
    assert judge.slots.decision(1) == NOOP


def test_a_skip_is_decided_like_a_prepare_and_learned_by_nobody_before() -> None:
    """Learning SKIPs early broke agreement at n=3 with no fault at all."""
    house = House(3, window=8)
    skip = house.skip("r1", 0, 1, 4)
    judge = house.full_judge()
    assert judge.slots.decisions() == []
    house.commit("r0", skip)
    assert house.full_judge().slots.decisions() == [(1, NOOP), (4, NOOP)], "one entry votes for all own slots of it"


# ----- §3: the first breach ends the stream
def test_bad_messages_are_not_ignored_one_by_one() -> None:
    """Between two good STABLEs a false one: 'attesting a later one attests the earlier' must not attest it."""
    house = House(3, window=2)
    p = house.prepare("r1", 0, 1)
    for r in ("r0", "r2"):
        house.commit(r, p)
    for r in ("r0", "r1", "r2"):
        house.stable(r, 1)
    q = house.prepare("r2", 0, 2)
    house.commit("r0", q)
    house.commit("r1", q)
    false = house.stable("r1", 2, p=0)
    good = house.stable("r1", 2, p=1)
    for r in ("r0", "r2"):
        house.stable(r, 2)
    judge = house.full_judge()
    assert judge.streams["r1"].ended == false.cv
    assert judge.attestations.attested("r1") < false.cv, "correct members attest nothing of an ended stream"
    late = house.judge()
    for stable in (false, good):
        assert not late.offer_jump(Discarded(stable, (house.streams["r0"][-1], house.streams["r2"][-1])))


# ----- §4: anchors
@with_and_without
def test_an_anchor_is_l_behind_the_last_stable(*, rule: bool) -> None:
    """r1's vote for slot 2 stands before STABLE(1); a log that began there would lose it."""
    house = House(3, window=2)
    p = house.prepare("r1", 0, 1)
    house.commit("r0", p)
    q = house.prepare("r2", 0, 2)
    house.commit("r1", q)
    house.stable("r1", 1)
    house.stable("r0", 1)
    judge = house.full_judge()
    assert judge.slots.decision(2) == batch_of(q)
    judge.streams["r1"].truncate(judge.attestations.attested("r1"), 2 if rule else 0)
    votes = [house.view_change("r0", 1), house.view_change("r1", 1)]
    house.tell(judge, votes)
    merged = house.merged(1, votes, judge if rule else lenient_about_anchors(judge))
    assert [c.batch for c in merged.choices] == ([batch_of(q)] if rule else []), "slot 2 is decided"


def lenient_about_anchors(judge: Configuration) -> Configuration:
    """The judge, counting votes whose logs begin at any anchor."""
    kept = list(judge.streams["r1"].kept.values())
    assert isinstance(kept[-1].header, room.ViewChange)
    judge.votes.read(kept[-2].state, kept[:-1], kept[-1])
    return judge


def test_a_judge_who_jumped_to_a_near_anchor_counts_no_vote_of_that_log() -> None:
    house = House(3, window=4)
    p = house.prepare("r1", 0, 1)
    house.commit("r0", p)
    anchor = house.stable("r1", 1)
    proof = house.stable("r0", 1)
    house.view_change("r1", 1)
    away = jumped(house, anchor, proof)
    house.tell(away)
    assert away.streams["r1"].state.v == 1, "the VIEW-CHANGE stands, its target counts"
    assert "r1" not in {v.name.replica for v in away.votes.of(1)}
    assert "r1" in {v.name.replica for v in house.full_judge().votes.of(1)}


@with_and_without
def test_a_cursor_jumps_only_to_an_attested_stable(monkeypatch: pytest.MonkeyPatch, *, rule: bool) -> None:
    """n=3, L=1: faulty r1 hides its vote for slot 3 behind a STABLE that goes back; no correct replica attests it."""
    house = House(3, window=1)
    p = house.prepare("r1", 0, 1)
    for r in ("r0", "r2"):
        house.commit(r, p)
    for r in ("r0", "r1", "r2"):
        house.stable(r, 1)
    q = house.prepare("r2", 0, 2)
    house.commit("r0", q)
    for r in ("r0", "r1", "r2"):
        house.stable(r, 2)
    r2 = house.full_judge()
    r = house.prepare("r0", 0, 3)
    house.commit("r1", r)
    assert house.full_judge().slots.decision(3) == batch_of(r)
    back = house.stable("r1", 1, p=1)
    on = house.stable("r1", 2, p=1)
    votes = [house.view_change("r1", 2), house.view_change("r2", 2)]
    if not rule:
        monkeypatch.setattr(Attestations, "attested", lambda *_: 1 << 40)
    assert r2.offer_jump(Discarded(back, ())) is not rule
    house.tell(r2, [on, *votes])
    if rule:
        house.tell(r2)
        assert r2.streams["r1"].ended == back.cv
        assert {v.name.replica for v in r2.votes.of(2)} == {"r2"}
    else:
        assert house.merged(2, votes, r2).s_max == 2, "the decided slot 3 is lost"


def test_a_cursor_never_jumps_back() -> None:
    house = House(3, window=4)
    for s, (proposer, voter) in enumerate([("r1", "r0"), ("r2", "r0"), ("r0", "r1")], 1):
        house.commit(voter, house.prepare(proposer, 0, s))
        house.stable("r1", s)
        house.stable("r0", s)
    judge = house.full_judge()
    before = judge.streams["r1"].cursor
    for stable in [m for m in house.streams["r1"] if isinstance(decode_header(m.header), Stable)]:
        assert not judge.offer_jump(Discarded(stable, tuple(house.streams["r0"])))
    assert judge.streams["r1"].cursor == before


def test_stable_10_to_the_9_needs_its_certificate() -> None:
    house = House(3, window=4)
    bad = house.stable("r2", 10**9, certificate=house.checkpoint(10**9, bytes(32), "r2"))
    judge = house.full_judge()
    assert judge.streams["r2"].ended == bad.cv
    assert judge.statements.newest is None


# ----- R0
def test_r0_a_gap_hides_nothing_and_a_message_sent_to_some_only_is_fetched() -> None:
    house = House(3, window=8)
    first, second = house.prepare("r1", 0, 1), house.prepare("r1", 0, 4)
    votes = [house.commit("r0", second)]
    judge = house.judge()
    house.tell(judge, [second, *votes])
    assert judge.slots.decisions() == []
    assert judge.wanted.streams == {"r1": second.cv}
    house.tell(judge, [first])
    assert judge.slots.decision(4) == batch_of(second)


def test_a_message_with_another_members_certificate_is_refused() -> None:
    house = House(3)
    m = house.prepare("r1", 0, 1)
    judge = house.judge()
    assert judge.offer(StreamMessage(1, "r2", m.cv, m.header, m.payload, m.certificate)) is Offered.BAD
    assert judge.offer(StreamMessage(1, "r1", m.cv + 1, m.header, m.payload, m.certificate)) is Offered.BAD
    assert judge.offer(StreamMessage(2, "r1", m.cv, m.header, m.payload, m.certificate)) is Offered.BAD
    assert judge.offer(StreamMessage(1, "stranger", m.cv, m.header, m.payload, m.certificate)) is Offered.BAD
    assert judge.offer(m) is Offered.TAKEN
    assert judge.offer(m) is Offered.NOT_WANTED


# ----- COMMIT entries
def test_a_bare_reference_counts_for_nothing() -> None:
    house = House(3, window=8)
    p = house.prepare("r1", 0, 1)
    house.say("r0", Commit(1, 0, (Entry(1, 1, "r1", p.cv, b"", b""),)))
    house.say("r2", Commit(1, 0, (entry_of(p, s1=2, s2=2), entry_of(p, proposer="r0"), entry_of(p, cv=9))))
    judge = house.full_judge()
    assert judge.slots.decisions() == []
    assert judge.liars == {}, "a bad entry is ignored, it is no breach of form"


def test_a_proposal_that_does_not_stand_is_voted_for_in_vain() -> None:
    house = House(3)
    wrong = house.prepare("r1", 0, 2)  # slot 2 is r2's
    house.commit("r0", wrong)
    judge = house.full_judge()
    assert judge.slots.decisions() == []
    assert list(judge.liars) == ["r1"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_invalid_batch_does_not_end_the_stream_and_is_eligible_nowhere(*, batch_first: bool) -> None:
    house = House(3, algorithm=MINBFT, window=4)
    bad = house.batch(valid=False)
    p = house.prepare("r0", 0, 1, bad)
    votes = [house.view_change(r, 1) for r in ("r0", "r1")]
    judge = house.judge()
    if batch_first:
        judge.offer_batch(house.batches[bad], named_by=p.header)
    house.tell(judge)
    assert judge.streams["r0"].ended is None
    assert house.merged(1, votes, judge).choices == ()


def test_a_missing_batch_delays_a_merge_and_is_asked_for() -> None:
    house = House(3, algorithm=MINBFT, window=4)
    digest = house.batch()
    data = house.batches.pop(digest)
    house.prepare("r0", 0, 1, digest)
    for r in ("r0", "r1"):
        house.view_change(r, 1)
    judge = house.full_judge()
    found = judge.votes.of(1)
    assert judge.try_merge(found) is None
    assert digest in judge.wanted.batches
    assert judge.offer_batch(data) == digest
    merged = judge.try_merge(found)
    assert merged is not None
    assert merged.choices[0].batch == digest


# ----- wedges and EPOCH-END
def test_nothing_follows_a_wedge() -> None:
    house = House(3)
    house.wedge("r0")
    house.commit("r0", house.prepare("r1", 0, 1))
    judge = house.full_judge()
    assert judge.streams["r0"].ended == 2
    assert {v.name.replica for v in judge.votes.of(WEDGE)} == {"r0"}, "the wedge still stands"


def test_an_epoch_end_and_a_log_read_to_its_end_are_a_vote_for_a_wedge_of_this_configuration() -> None:
    house = House(3, window=4)
    p = house.prepare("r1", 0, 1)
    house.commit("r2", p)
    house.wedge("r0")
    judge = house.judge()
    end = house.epoch_end("r2")
    assert judge.offer_end(end)
    house.tell(judge, [m for m in house.order if m.replica != "r2"])
    assert {v.name.replica for v in judge.votes.of(WEDGE)} == {"r0"}, "its log is not read to the end"
    house.tell(judge)
    votes = judge.votes.of(WEDGE)
    assert {v.name.replica for v in votes} == {"r0", "r2"}
    merged = judge.try_merge(votes)
    assert merged is not None
    assert [c.batch for c in merged.choices] == [batch_of(p)]


def test_an_epoch_end_is_the_wormholes_alone() -> None:
    house = House(3)
    end = house.epoch_end("r2")
    judge = house.judge()
    assert not judge.offer_end(replace(end, cv_end=3))
    assert not judge.offer_end(replace(end, replica="r1"))
    assert not judge.offer_end(replace(end, c=2))
    assert not judge.offer_end(replace(end, replica="stranger"))
    assert not judge.offer_end(replace(end, signature=house.kss["r2"].sign(b"x")))
    assert judge.offer_end(end)
    following = House(3, c=2, keys=house.keys)
    assert not following.judge().offer_end(end), "no vote in another configuration"


def test_a_stream_that_ended_has_no_vote() -> None:
    house = House(3)
    house.prepare("r1", 0, 2)  # another's slot
    house.wedge("r1")
    judge = house.full_judge()
    judge.offer_end(house.epoch_end("r1"))
    assert judge.votes.of(WEDGE) == []


def test_a_wedge_needs_a_prepared_record_on_this_base() -> None:
    house = House(3)
    foreign = House(3, c=3, keys=house.keys)
    house.wedge("r0", foreign.envelope)
    house.wedge("r1", house.envelope)
    house.wedge("r2", house.successor(7))
    assert list(house.full_judge().liars) == ["r0", "r1"]


def test_streams_are_as_long_as_correct_members_let_them_be() -> None:
    house = House(3, window=2)
    judge = house.judge()
    p = house.prepare("r1", 0, 1)
    for _ in range(5):
        house.commit("r2", p)
    house.tell(judge)
    assert judge.streams["r2"].ended == 5, "at most 2L messages between two STABLEs"
