"""Executions of a sixth reading: each property did not hold once, for the reason told, or was attacked and held."""

from dataclasses import replace

import pytest

from cloudfit_orchestrator.bft import recall
from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.journal import LogState
from cloudfit_orchestrator.bft.messages import Named
from cloudfit_orchestrator.bft.usig import configuration as configuration_module
from cloudfit_orchestrator.bft.usig.journal import decode_entry
from cloudfit_orchestrator.bft.usig.merge import Missing, merge
from cloudfit_orchestrator.bft.usig.messages import NewView, ViewChange, decode_header, decode_merge
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import Kind
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine
from tests.unit.bft.test_pbft import group_of, ordering

PATIENT = {"progress_timeout_ms": 60_000}  # nobody is suspected in these executions


# ----- the own state, on the disk and in the log
def cut(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes, and it pays to write the log anew."""
    before = machine.rewrites
    with monkeypatch.context() as patched:
        patched.setattr(recall, "REWRITE_SLACK", -(1 << 20))
        machine.ticks(1.2)
    assert machine.rewrites > before


def states(log: list[bytes]) -> list[tuple[int, int]]:
    """(place in the log, slot) of the states that it names."""
    entries = enumerate(map(decode_entry, log))
    return [(place, entry.slot) for place, entry in entries if isinstance(entry, LogState)]


def decide(machine: Machine, house: House, s: int) -> None:
    """The leader r0 proposes, and has said STABLE for all before."""
    if s > 1:
        digest = machine.core._at.execution.digests[s - 1]
        house.stable("r0", s - 1, digest=digest, certificate=house.checkpoint(s - 1, digest, "r0", "r1"))
    house.prepare("r0", 0, s)
    machine.hear(*house.streams["r0"], sender="r0#1")
    machine.ticks(0.2)


def certify(machine: Machine, house: House, s: int) -> None:
    """r0's CHECKPOINT agrees with the machine's own."""
    digest = machine.core._at.execution.digests[s]
    machine.hear(house.statement("r0", Kind.CHECKPOINT, s, digest), sender="r0#1")
    machine.ticks(0.3)


def test_a_log_that_is_cut_while_a_state_is_being_saved_names_it(monkeypatch: pytest.MonkeyPatch):
    """The log was written anew between a checkpoint and the word that its state is on the disk, and named the state
    before only. That one was dropped with the next STABLE: for as long as a checkpoint takes, whoever stopped began
    again from slot 0. All who had confirmed what ACTIVE then pinned had lost it, if the power failed.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r1")
    for s in range(1, 8):
        decide(machine, house, s)
        certify(machine, house, s)
    machine.saving = False
    decide(machine, house, 8)
    cut(machine, monkeypatch)
    machine.saving = True
    machine.serve()
    certify(machine, house, 8)
    machine.ticks(1.5)
    assert machine.core.status["stable"] == 8
    assert sorted(machine.disk) == [(1, 8)]
    assert machine.restarted().core.status["slot"] == 8


def test_a_state_that_is_on_the_disk_but_not_in_the_log_is_named_there_after_a_restart(monkeypatch: pytest.MonkeyPatch):
    """The machine stopped when a snapshot was durable, and the record that names it was not. Executed again, the state
    was taken for one that is saved and named: the one before was dropped, and with the next stop all were gone.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=1, parameters=PATIENT)
    machine = Machine(house, "r1")
    for s in (1, 2):
        decide(machine, house, s)
        certify(machine, house, s)
    cut(machine, monkeypatch)
    machine.kss = False  # nothing waits for the log any more
    decide(machine, house, 3)
    assert (1, 3) in machine.disk
    place, slot = states(machine.log)[-1]
    assert slot == 3
    again = machine.restarted(machine.log[:place])
    assert again.core.status["slot"] == 3
    certify(again, house, 3)
    again.ticks(1.5)
    assert sorted(again.disk) == [(1, 3)]
    assert again.restarted().core.status["slot"] == 3


def test_who_follows_a_group_keeps_what_its_slow_disk_does_not_hold_yet(monkeypatch: pytest.MonkeyPatch):
    """A machine that is to become a member forgot the batches that certificates covered, though its own states were not
    on the disk. It confirmed what came of them; ACTIVE pinned it; the machine started again, and nobody had it.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=2, parameters=PATIENT)
    machine = Machine(house, "r2", incarnation=9)
    machine.saving = False
    for s in range(1, 9):
        proposal = house.prepare("r0", 0, s)
        machine.hear(proposal, house.commit("r1", proposal))
        digest = machine.core._at.execution.digests[s]
        truth = {"digest": digest, "certificate": house.checkpoint(s, digest, "r0", "r1")}
        machine.hear(*(house.stable(who, s, **truth) for who in ("r0", "r1")))
        cut(machine, monkeypatch)
    members = tuple(replace(m, incarnation=9) if m.replica == "r2" else m for m in house.record.members)
    machine.core.record(house.successor(members=members))
    machine.serve()
    machine.hear(house.wedge("r0"), house.wedge("r1"))
    machine.ticks(3)
    (confirmed,) = [body for topic, body in machine.reports if topic == "confirm"]
    assert confirmed["h"] == 8
    again = machine.restarted()
    again.ticks(1)
    assert [body for topic, body in again.reports if topic == "confirm"] == [confirmed]


# ----- which votes are merged
FAULTY = ("r0", "r2", "r3", "r4", "r5", "r6")  # of 13


def lacking(house: House) -> None:
    """The faulty members have voted for a batch that they give to nobody."""
    proposal = house.prepare("r0", 0, 1, batch_digest(b"withheld"))
    for who in FAULTY[1:]:
        house.commit(who, proposal)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many merges have been tried."""
    tried = [0]

    def count(*args: object) -> object:
        tried[0] += 1
        return merge(*args)

    monkeypatch.setattr(configuration_module, "merge", count)
    return tried


def test_a_leader_tries_no_thousand_merges_over_votes_that_lack_a_batch(monkeypatch: pytest.MonkeyPatch):
    """Each seven of the votes were merged with each message that came in, until seven lacked nothing: 1,716 merges."""
    house = House(13, f=6, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    lacking(house)
    tried = counted(monkeypatch)
    machine = Machine(house, "r1")
    machine.hear(*house.streams["r0"])
    votes = [house.view_change(who, 1) for who in FAULTY]
    for who in FAULTY[1:]:
        machine.hear(*house.streams[who])
    machine.hear(votes[0])
    honest = ["r7", "r8", "r9", "r10", "r11", "r12"]
    for who in honest[:-1]:
        machine.hear(house.view_change(who, 1))
    assert not any(isinstance(header, NewView) for header in machine.said())
    machine.hear(house.view_change(honest[-1], 1))
    assert isinstance(machine.said()[-1], NewView)
    named = decode_merge(house.streams["r1"][-1].payload).view_changes
    assert {name.replica for name in named} == {"r1", *honest}
    assert tried[0] <= 3, "its own, and that of its NEW-VIEW, which it judges like all others"


def test_a_member_of_a_successor_tries_no_thousand_merges(monkeypatch: pytest.MonkeyPatch):
    house = House(13, f=6, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    lacking(house)
    tried = counted(monkeypatch)
    machine = Machine(house, "r1")
    machine.core.record(house.successor())
    machine.serve()
    for who in house.names:
        if who != "r1":
            house.wedge(who)
            machine.hear(*house.streams[who])
            machine.ticks(0.5)
    assert [body["h"] for topic, body in machine.reports if topic == "confirm" and body["c"] == 2] == [0]
    assert tried[0] <= 3


@pytest.mark.parametrize("known", [False, True])
def test_votes_are_chosen_by_what_a_merge_of_them_would_miss(*, known: bool):
    """One vote lacks a batch for a slot that another's h covers: together they miss nothing."""
    house = House(5, f=2, algorithm=Algorithm.MINBFT, period=2, window=4)
    first, second = house.prepare("r0", 0, 1), house.prepare("r0", 0, 2)
    for who in ("r1", "r2", "r3"):
        house.commit(who, first, second)
    late = house.prepare("r0", 0, 3)
    house.stable("r3", 2)
    house.commit("r4", late)
    for who in ("r1", "r2", "r3", "r4"):
        house.view_change(who, 1)
    if not known:
        for proposal in (first, second):
            del house.batches[decode_header(proposal.header).batch]
    judge = house.full_judge()
    sets = [[vote.name.replica for vote in chosen] for chosen in judge.quorums(1)]
    assert sets == [["r1", "r2", "r3"], ["r1", "r2", "r4"]][: 1 + known]
    for chosen in judge.quorums(1):
        assert not isinstance(merge(house.record, chosen, judge), Missing)
    assert bool(judge.wanted.batches) is not known


# ----- PBFT
def test_what_a_new_view_names_is_logged_one_record_each():
    """A NEW-VIEW was one record with all VIEW-CHANGEs that it names. With a window of thousands of slots and more than
    four members it was longer than a record can be: the process ended, and again whenever a view was entered.
    """
    group = group_of(7, period=64, window=64)
    members = list(group.nodes.values())
    for _ in range(24):
        group.submit()
        assert group.settle(lambda: all(n.operations == group.issued for n in members), 20)
    for member in members:
        ordering(group, member.replica).suspect()
        member.run()
    assert group.settle(lambda: all(ordering(group, n.replica).e == 1 for n in members), 20)
    votes = [len(change.body) for change in ordering(group, "r1").entered[1]]
    assert len(votes) == 5
    for member in members:
        assert max(votes) <= max(map(len, member.log)) < 2 * max(votes)
    views = {n.replica: ordering(group, n.replica).entered for n in members}
    group.flying.clear()
    for member in members:
        member.boot()
        assert ordering(group, member.replica).entered == views[member.replica]
    group.submit()
    assert group.settle(lambda: all(n.operations == group.issued for n in members), 20)


# ----- closed epochs
def test_an_epoch_end_and_the_whole_log_are_a_vote_for_a_view_above_all_that_was_asked_for():
    """They counted for wedges only (§6, step 5, says for any view): the members that are left while one is replaced
    could not change views without it, though it was known to say nothing more.
    """
    house = House(3, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r1")
    proposal = house.prepare("r0", 0, 3)
    machine.hear(proposal, sender="r0#1")
    house.say("r0", ViewChange(1, 1, house.requests(1, "r0", "r2"), ()))
    machine.hear(*house.streams["r0"][-1:], sender="r0#1")
    machine.ticks(0.2)
    machine.core._at.ordering.take_end(house.epoch_end("r0"))
    own = [header.g for header in machine.said() if isinstance(header, ViewChange)]
    machine.hear(*(house.statement(who, Kind.REQ, 4) for who in ("r1", "r2")), sender="r2#3")
    assert [header.g for header in machine.said() if isinstance(header, ViewChange)] == [*own, 4]
    view = machine.said()[-1]
    assert isinstance(view, NewView)
    assert (view.g, view.s_max) == (4, 3)
    named = decode_merge(house.streams["r1"][-1].payload).view_changes
    assert [(name.replica, name.cv) for name in named] == [("r0", 3), ("r1", house.streams["r1"][-2].cv)]
    knows, does_not = house.full_judge(), house.full_judge()
    assert knows.offer_end(house.epoch_end("r0"))
    for judge in (knows, does_not):
        judge.advance()
    assert knows.streams["r1"].cursor == len(house.streams["r1"])
    assert does_not.streams["r1"].cursor == len(house.streams["r1"]) - 1
    assert does_not.streams["r1"].ended is None, "it waits for the EPOCH-END, which is handed round"


@pytest.mark.parametrize("g", [1, 2, 3])
def test_a_closed_epoch_is_no_second_vote_for_a_view_that_its_member_asked_for(g: int):
    house = House(3, period=4, window=16)
    house.prepare("r0", 0, 3)
    house.view_change("r0", 2)
    judge = house.full_judge()
    assert judge.offer_end(house.epoch_end("r0"))
    own, closed = Named("r0", 2, house.streams["r0"][-1].digest), Named("r0", 3, house.streams["r0"][-1].digest)
    assert [vote.name for vote in judge.votes.of(g)] == {1: [], 2: [own], 3: [closed]}[g]
    other = house.view_change("r1", g)
    house.tell(judge, [other])
    names = [closed, Named("r1", other.cv, other.digest)]
    assert (judge.votes.named(g, names) is None) is (g == 1)
    assert isinstance(judge.votes.named(g, names), list) is (g == 3)
