"""Executions of a fifth reading: each property did not hold once, for the reason told, or was attacked and held."""

from collections.abc import Callable

import pytest

from cloudfit_orchestrator.bft import recall
from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.effects import Certify
from cloudfit_orchestrator.bft.messages import NOOP, Named, StatementMessage, encode
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    Discarded,
    Entry,
    NewView,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.guest.wal import MAX_RECORD
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine
from tests.unit.bft.test_readings_usig import Pair

PATIENT = {"progress_timeout_ms": 60_000}  # nobody is suspected in these executions


# ----- the own log
def cut(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is durable, and it pays to write the log anew."""
    with monkeypatch.context() as patched:
        patched.setattr(recall, "REWRITE_SLACK", -(1 << 20))
        machine.core.saved(1, 1)


def test_a_certified_message_outlives_a_log_that_is_cut_before_it_was_processed(monkeypatch: pytest.MonkeyPatch):
    """A UI came, then the word that a snapshot was durable, both before the core processed what came in: the log was
    written anew without the message. Its owner had said it, could not prove it once restarted, and was silent for good.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.hear(house.prepare("r0", 0, 1))  # r1's COMMIT decides it
    machine.wormhole = False
    machine.hear(house.prepare("r0", 0, 2))  # the wormhole is slow with r1's COMMIT
    (asked,) = [effect for effect in machine.waiting if isinstance(effect, Certify)]
    machine.waiting.remove(asked)
    machine.wormhole = True
    machine._certify(asked)
    cut(machine, monkeypatch)  # before the effects of the UI are drained
    machine.serve()
    assert machine.rewrites
    assert len(house.streams["r1"]) == asked.cv

    again = machine.restarted()
    assert again.core.status["live"], "all that r1 said is in its log"
    assert again.core.status["slot"] == 2


# ----- what a judge may be made to do
def test_a_skip_of_an_old_view_spans_no_more_than_two_windows():
    """A member that stayed in view 0 while the others went on could skip all slots since then: each judge, again after
    each restart, spread them out one by one (a group at slot 10^9: 10 GB), and a merge did not count what judges did.
    """
    house = House(3, period=1, window=4)
    h = 3 * 10**5  # the others have come so far in later views
    house.stable("r2", h)
    house.skip("r2", 0, 2, h + 2)
    judge = house.judge()
    spread = []
    judge.slots.propose = spread.append  # type: ignore[method-assign]
    house.tell(judge)
    assert len(spread) <= 2 * 4
    assert judge.streams["r2"].ended == 2


def test_the_widest_skip_of_a_correct_member_stands():
    house = House(3, period=1, window=4)
    house.stable("r2", 9)
    house.skip("r2", 0, 11, 11)
    assert house.full_judge().streams["r2"].ended is None
    other = House(3, period=1, window=4)
    other.stable("r2", 3)
    other.skip("r2", 0, 2, 5)
    assert other.full_judge().streams["r2"].ended is None


# ----- what is jumped over
def exchange(*members: Machine) -> None:
    """What these have sent each other arrives."""
    names = {machine.me: machine for machine in members}
    for _ in range(6):
        for machine in members:
            out, machine.sent = machine.sent, []
            for peer, message in out:
                to = names.get(peer.partition("#")[0])
                if to is not None:
                    to.hear(message, sender=f"{machine.me}#{int(machine.me[1]) + 1}", batches=False)


@pytest.mark.parametrize("propose", [lambda h: h.prepare("r2", 0, 2), lambda h: h.skip("r2", 0, 2, 2)])
def test_votes_for_a_proposal_that_was_jumped_over_count(propose: Callable[[House], StreamMessage]):
    """A proposer showed its proposal to one member, and to the other that it had discarded it: this one jumped over
    it, dropped the first one's COMMIT, and was stuck ahead of that slot. The first one had executed it and was content,
    the proposer said no more: no certificate, no view change, no client ever answered.
    """
    house = House(3, period=1, window=4, parameters={"progress_timeout_ms": 500})
    r0, r1 = Machine(house, "r0"), Machine(house, "r1")
    house._number = 10
    r1.client(house.bundle([(1, add(1))]))
    r0.hear(*house.streams["r1"])
    r1.hear(*house.streams["r0"], sender="r0#1")
    digest = r0.core._at.execution.digests[1]
    proposal = propose(house)  # by the faulty one, like the STABLE behind it
    stable = house.stable("r2", 1, digest=digest, certificate=house.checkpoint(1, digest, "r0", "r2"))
    r1.hear(proposal, stable, sender="r2#3")
    assert r1.core.status["slot"] == 2
    r0.hear(Discarded(stable, (house.streams["r1"][-1],)), sender="r2#3")
    assert r0.core._at.ordering.configuration.streams["r2"].cursor == stable.cv
    for number in range(3):  # from here on r2 is silent, and the network good
        r0.client(house.bundle([(20 + number, add(1))]))
        for _ in range(20):
            r0.ticks(0.25)
            r1.ticks(0.25)
            exchange(r0, r1)
    assert r0.core.status["slot"] >= 3
    assert r0.core.status["slot"] == r1.core.status["slot"]


@pytest.mark.parametrize("answers", [False, True])
def test_a_batch_that_only_a_replaced_member_holds_is_had_from_it(*, answers: bool):
    """n=4, Qc=2, Qv=3: r3 and the faulty r2 have decided a slot, and r3's epoch is closed for its recovery. S of any
    three wedges names the batch, so r3 must go on answering questions: the controller does not pause it.
    """
    house = House(4, period=4, window=16, parameters=PATIENT)
    r0, r3 = Machine(house, "r0"), Machine(house, "r3")
    (skipped,) = (house.skip("r1", 0, 1, 1),)
    proposal = house.prepare("r2", 0, 2)
    r3.hear(skipped, proposal, sender="r2#3")
    assert r3.core.status["slot"] == 2
    end = house.epoch_end("r3")
    r0.hear(*[m for name in ("r1", "r2", "r3") for m in house.streams[name]], sender="r1#2", batches=False)
    r0.core.record(house.successor())
    r0.serve()
    r0.core._at.ordering.take_end(end)
    wedges = [house.streams["r0"][-1], house.wedge("r1"), house.wedge("r2")]
    r0.hear(*wedges[1:], sender="r1#2", batches=False)
    names = [Named(wedge.replica, wedge.cv, wedge.digest) for wedge in wedges]
    for _ in range(20):
        r0.ticks(0.25)
        if answers:
            exchange(r0, r3)
    final = r0.core._at.ordering.final(names)
    assert (final is not None) is answers
    if final is not None:
        assert (2, decode_header(proposal.header).batch) in final.choices


def test_a_leader_logs_what_its_new_view_cites_in_records_that_the_log_takes():
    """The logs behind a NEW-VIEW were one record. With wide windows f faulty logs, fat but in form, made it longer than
    a record may be: the leader's process ended over it, and again whenever it led.
    """
    house = House(11, f=5, algorithm=Algorithm.MINBFT, period=1024, window=4096, parameters=PATIENT)
    machine = Machine(house, "r1")
    fat = Commit(1, 0, (Entry(1, 1, "r0", 1, b"x" * 420, bytes(64)),) * 4096)
    liars = ["r2", "r3", "r4", "r5", "r6"]
    for liar in liars:
        machine.hear(house.say(liar, fat), house.say(liar, fat), house.view_change(liar, 1), sender="r5#6")
    machine.hear(*(house.statement(r, Kind.REQ, 1) for r in [*liars, "r7"]))
    said = machine.said()
    assert isinstance(said[-1], NewView)
    assert max(map(len, machine.log)) <= MAX_RECORD
    again = machine.restarted()
    view = again.core._at.ordering.configuration.new_views[1]
    assert {log[-1].replica for log in view.logs} == {"r1", *liars}


def behind_a_gap():
    """(both correct members, r0 of them, a STABLE of r1's beyond what r0 has of its stream, one that attests it).

    Slot 3 is decided at r1 by a COMMIT that is still on its way to r0.
    """
    house = House(3, period=1, window=4, parameters={"progress_timeout_ms": 500})
    pair = Pair(house)
    r0, r1 = pair.members["r0"], pair.members["r1"]
    r1.client(house.bundle([(1, add(1))]))
    pair.exchange()
    house.prepare("r2", 0, 2)
    for member in (r0, r1):
        member.hear(*house.streams["r2"], sender="r2#3")
    pair.slow = True
    r0.client(house.bundle([(2, add(1))]))  # slot 3 is r0's
    r1.hear(*house.streams["r0"], sender="r0#1")
    pair.ticks(0.2)
    assert (r0.core.status["slot"], r1.core.status["slot"]) == (2, 3)
    stable = house.streams["r1"][-1]
    told = decode_header(stable.header)
    assert isinstance(told, Stable)
    attested = house.stable("r2", told.h, digest=told.digest, certificate=told.certificate)
    return pair, r0, stable, attested


def test_no_peer_makes_a_member_jump_over_votes_that_no_certificate_covers():
    """A peer that was asked for a gap, as its owner's answer was slow, called discarded what was on its way: a COMMIT
    that had decided a slot of the one who asked, for its owner alone. This one had executed it and was content, the
    peer said no more, and whoever waited for that one answer waited for ever.
    """
    pair, r0, stable, attested = behind_a_gap()
    r0.hear(stable, sender="r2#3")  # so r0 sees the gap, and asks
    for _ in range(8):
        r0.hear(Discarded(stable, (attested,)), sender="r2#3")
        pair.ticks(0.4)
    pair.catch_up()  # from here on r2 is silent, and the network good
    pair.ticks(5)
    assert r0.core.status["slot"] == 3


@pytest.mark.parametrize("certified", [False, True])
def test_a_log_that_is_cut_keeps_what_a_new_view_under_way_cites(*, certified: bool, monkeypatch: pytest.MonkeyPatch):
    """While the UI of an own NEW-VIEW is waited for, or it waits to be processed, the logs behind it stood nowhere but
    in the old log: cut, it left the leader unable to prove its NEW-VIEW after a restart.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.hear(house.prepare("r0", 0, 1))
    machine.wormhole = False
    machine.hear(house.view_change("r2", 1), sender="r2#3")

    def certify() -> None:
        (asked,) = [effect for effect in machine.waiting if isinstance(effect, Certify)]
        machine.waiting.remove(asked)
        machine._certify(asked)

    certify()  # the VIEW-CHANGE
    machine.serve()
    if certified:
        certify()
    cut(machine, monkeypatch)
    if not certified:
        certify()
    machine.serve()
    assert isinstance(machine.said()[-1], NewView)

    again = machine.restarted()
    view = again.core._at.ordering.configuration.new_views[1]
    assert {log[-1].replica for log in view.logs} == {"r1", "r2"}


def test_a_jump_is_read_again_once(monkeypatch: pytest.MonkeyPatch):
    """A log that was cut between a jump and the next processing had the anchor twice, the second time behind what
    followed it: read again, the stream went back to the anchor and had lost what it held beyond.
    """
    house = House(3, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    first = house.prepare("r1", 0, 1)
    machine.hear(first, sender="r2#3")
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest)}
    house.commit("r1", house.skip("r2", 0, 2, 2))
    stable = house.stable("r1", 1, **truth)
    attested = house.stable("r2", 1, **truth)
    machine.core.receive("r1#2", encode(Discarded(stable, (attested,))))
    machine.core.receive("r1#2", encode(house.prepare("r1", 0, 4)))
    cut(machine, monkeypatch)
    machine.serve()
    stream = machine.core._at.ordering.configuration.streams["r1"]
    assert (stream.base, stream.cursor) == (stable.cv - 1, stable.cv + 1)
    again = machine.restarted().core._at.ordering.configuration.streams["r1"]
    assert (again.base, again.cursor) == (stream.base, stream.cursor)


# ----- who is suspected
def test_a_leader_that_overlooks_a_client_is_suspected():
    """Whatever was executed counted as progress: a leader that served some clients was never suspected by those who had
    handed another one's request on to it, and that client waited for ever.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=64, window=256, clients=2)
    machine = Machine(house, "r1")
    machine.client(house.bundle([(1, add(1))]))
    for s in range(1, 121):
        machine.hear(house.prepare("r0", 0, s, house.batch(client=1)), sender="r0#1")
        machine.ticks(0.25)
        assert machine.core.status["slot"] == s
    asked = [m for _, m in machine.sent if isinstance(m, StatementMessage) and m.kind == Kind.REQ]
    assert {LAYOUT[Kind.REQ].unpack(m.body)[0] for m in asked} >= {1}


def test_a_leader_that_serves_everybody_in_turn_is_not_suspected():
    house = House(3, algorithm=Algorithm.MINBFT, period=64, window=256, clients=2)
    machine = Machine(house, "r1")
    for s in range(1, 121):
        data = house.bundle([(s, add(1))])
        machine.client(data)  # each waits for a second and a half, behind those before it
        late = make_batch([house.bundle([(max(1, s - 5), add(1))])])
        house.batches[batch_digest(late)] = late
        machine.hear(house.prepare("r0", 0, s, batch_digest(late)), sender="r0#1")
        machine.ticks(0.25)
    assert not [m for _, m in machine.sent if isinstance(m, StatementMessage) and m.kind == Kind.REQ]


def test_a_proposer_of_no_batch_at_all_is_the_one_who_is_blacklisted():
    """A PREPARE of the digest that stands for no request: nobody held such a batch, so nobody voted and each view timed
    out; but a merge took it for a no-op, and blamed the proposer of the next slot, who was correct, for ever.
    """
    house = House(4, period=4, window=16)
    house.prepare("r1", 0, 1)
    house.prepare("r2", 0, 2, NOOP)
    votes = [house.view_change(r, 1) for r in ("r0", "r1", "r3")]
    judge = house.full_judge()
    assert judge.streams["r2"].ended == 1
    assert house.merged(1, votes, judge).blacklist == ("r2",)
    other = House(4, period=4, window=16)
    other.prepare("r1", 0, 1)
    other.prepare("r2", 0, 2, NOOP)
    votes = [other.view_change(r, 1) for r in ("r0", "r1", "r2")]
    assert len(other.full_judge().votes.of(1)) == 2, "what follows it is no vote"
