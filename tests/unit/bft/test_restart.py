"""Restart within an epoch (protocol §2): what the log says is what was, at every prefix; nothing is said too early."""

import pytest

from cloudfit_orchestrator.bft import recall
from cloudfit_orchestrator.bft.effects import Append, Certify, Sign
from cloudfit_orchestrator.bft.journal import LogRecord, encode_entry
from cloudfit_orchestrator.bft.messages import encode
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.usig.journal import LogBody, LogUI, decode_entry
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Discarded,
    Fetch,
    FetchNewView,
    LogProof,
    NewView,
    Prepare,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
    decode_header,
)
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine


def lively(house: House, machine: Machine, slots: int = 6) -> None:
    """Slots 1…, r1 and r2 proposing in turn with r0's votes, r0 its own; members checkpoint."""
    for _ in range(slots):
        s = machine.core.status["slot"] + 1
        if s % 3 == 0:
            machine.client(house.bundle([(s, add(s))]))
            own = house.streams["r0"][-1]
            machine.hear(house.commit("r1", own))
        else:
            p = house.prepare(f"r{s % 3}", 0, s)
            machine.hear(p)
        assert machine.core.status["slot"] == s
        digest = machine.core._at.execution.digests.get(s)
        if digest is not None:
            machine.hear(house.statement("r1", Kind.CHECKPOINT, s, digest))


def enter_view(house: House, machine: Machine, g: int = 1) -> None:
    """Members ask for view g; r1 leads it."""
    for r in ("r1", "r2"):
        machine.hear(house.statement(r, Kind.REQ, g))
    votes = [house.view_change("r1", g), house.view_change("r2", g)]
    machine.hear(*votes)
    view = house.new_view("r1", g, votes)
    machine.hear(view, house.commit_view("r2", view))
    assert machine.core.status["view"] == g


def fingerprint(machine: Machine) -> dict[str, object]:
    at = machine.core._at
    if at.ordering is None:
        return {}
    configuration, voice = at.ordering.configuration, at.ordering.voice
    return {
        "slot": at.execution.slot,
        "root": at.execution.store.root(),
        "streams": {r: (s.cursor, s.state, s.ended) for r, s in configuration.streams.items()},
        "decided": [(s, d) for s, d in configuration.slots.decisions() if s > at.execution.slot],
        "tail": voice.tail if voice is not None else None,
        "installed": at.installed,
    }


def busy(period: int = 2) -> tuple[House, Machine]:
    house = House(3, period=period, window=16, parameters={"progress_timeout_ms": 60_000})
    machine = Machine(house, "r0")
    lively(house, machine)
    enter_view(house, machine)
    machine.hear(house.prepare("r2", 1, 7))  # r1 is blacklisted: Ag is r0, r2
    return house, machine


def test_a_restart_changes_nothing() -> None:
    _, machine = busy()
    again = machine.restarted()
    assert fingerprint(again) == fingerprint(machine)
    assert again.core.status["live"]


def test_a_rewritten_log_is_shorter_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "REWRITE_SLACK", -10_000)
    house, machine = busy()
    lively_log = len(machine.log)
    machine.ticks(1.2)
    assert machine.rewrites
    assert len(machine.log) < lively_log + 5  # with the logs behind the view
    again = machine.restarted()
    assert fingerprint(again) == fingerprint(machine)
    assert again.restarted().core.status["live"]
    again.hear(house.prepare("r2", 1, 9))
    assert any(isinstance(h, Commit) and h.entries[0].s1 == 9 for h in again.said())


def test_every_prefix_of_a_log_rebuilds_and_repeats_nothing() -> None:
    """A crash after any record: the counter may be ahead of the log, never the log of what others may have seen."""
    house, machine = busy()
    whole = list(house.streams["r0"])
    for length in range(len(machine.log) + 1):
        house.streams["r0"][:] = whole
        again = machine.restarted(machine.log[:length], start=False)
        again.serve()
        if again.core.status["c"] == 0:
            continue
        again.session()
        assert house.streams["r0"] == whole[: len(whole)] + house.streams["r0"][len(whole) :]
        cursor = again.core._at.ordering.configuration.streams["r0"].cursor
        if cursor < len(whole):
            assert not again.core.status["live"], "the counter is ahead of the log"
            assert len(house.streams["r0"]) == len(whole), "it stays silent"
        else:
            assert again.core.status["live"]


def test_a_replica_whose_log_is_behind_its_counter_asks_and_stays_silent_until_it_has_its_stream() -> None:
    house, machine = busy()
    whole = list(house.streams["r0"])
    cut = next(i for i, e in enumerate(map(decode_entry, machine.log)) if isinstance(e, LogBody) and e.cv == 3)
    again = machine.restarted(machine.log[:cut])
    again.ticks(1)
    assert not again.core.status["live"]
    assert any(topic == "amnesia" for topic, _ in again.reports)
    asked = [m for _, m in again.sent if isinstance(m, Fetch) and m.replica == "r0"]
    assert asked
    assert (asked[0].first, asked[0].last) == (3, len(whole))
    again.hear(house.prepare("r2", 1, 9))
    again.client(house.bundle([(50, add(1))]))
    again.ticks(1)
    assert house.streams["r0"] == whole, "not a word"
    again.hear(*[m for m in house.order if m.replica != "r0"])
    again.hear(*whole[2:])
    again.ticks(1)
    assert again.core.status["live"]
    assert fingerprint(again)["streams"]["r0"][0] >= len(whole)
    assert again.restarted().core.status["live"], "what was fetched is in the log"


def test_the_own_stream_is_not_taken_from_a_forger() -> None:
    house, machine = busy()
    whole = list(house.streams["r0"])
    again = machine.restarted(machine.log[:2])
    forged = StreamMessage(1, "r0", 1, whole[1].header, b"", whole[1].certificate)
    again.hear(forged, sender="r2#3")
    assert again.core._at.ordering.configuration.streams["r0"].cursor == 0
    assert not again.restarted(start=False).core._at.ordering.configuration.streams["r0"].waiting


# ----- crash between log, UI and send
def waiting_body(house: House, machine: Machine) -> Certify:
    """A COMMIT is made and logged; its UI is not asked for yet."""
    machine.wormhole = False
    machine.hear(house.prepare("r1", 0, 1))
    (certify,) = [e for e in machine.waiting if isinstance(e, Certify)]
    return certify


def test_a_body_and_its_batch_are_in_the_log_before_its_ui_is_asked_for() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    p = house.prepare("r1", 0, 1)
    machine.core.receive("r1#2", _frame(machine, p))
    effects = machine.core.effects()
    first = next(i for i, e in enumerate(effects) if isinstance(e, Certify))
    before = [type(decode_entry(e.record)).__name__ for e in effects[:first] if isinstance(e, Append)]
    assert before == ["LogBatch", "LogMessage", "LogBody"]


def _frame(machine: Machine, message: StreamMessage) -> bytes:
    return encode(machine._with_batch(message))


def test_an_orphan_body_that_was_never_certified_is_discarded_and_made_anew() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    waiting_body(house, machine)
    again = machine.restarted()
    assert [type(h) for h in again.said()] == [Commit]
    bodies = [e for e in map(decode_entry, again.log) if isinstance(e, LogBody)]
    assert [b.cv for b in bodies] == [1, 1], "the orphan and the new one"
    assert again.restarted().core.status["live"]


def test_a_body_that_was_certified_before_the_crash_gets_its_ui_from_the_wormhole() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    certify = waiting_body(house, machine)
    body = [e for e in map(decode_entry, machine.log) if isinstance(e, LogBody)][-1]
    house.say("r0", body.header, body.payload)  # create_ui was done, its answer is lost
    again = machine.restarted()
    assert again.core.status["live"]
    assert len(house.streams["r0"]) == certify.cv
    assert again.core.status["slot"] == 1
    assert [e.cv for e in map(decode_entry, again.log) if isinstance(e, LogUI)] == [1]
    assert any(isinstance(m, StreamMessage) and m.replica == "r0" for _, m in again.sent), "it is sent, at last"


def test_an_orphan_that_the_counter_has_passed_with_another_body_is_not_taken_for_it() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    waiting_body(house, machine)
    other = house.say("r0", Commit(1, 0, ()))  # what a lost log had said under this counter
    again = machine.restarted()
    assert not again.core.status["live"]
    assert again.core._at.ordering.configuration.streams["r0"].cursor == 0
    assert house.streams["r0"] == [other]


def test_pipelined_bodies_of_which_the_first_was_refused_are_asked_for_again_in_order() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    machine.wormhole = False
    machine.hear(house.prepare("r1", 0, 1), house.prepare("r2", 0, 2))
    asked = [e for e in machine.waiting if isinstance(e, Certify)]
    machine.waiting = []
    for e in asked:  # a freeze in the middle: all are refused
        machine.core.refused(e.c, ErrorCode.FROZEN)
    machine.wormhole = True
    machine.ticks(1)
    assert [m.cv for m in house.streams["r0"]] == list(range(1, len(house.streams["r0"]) + 1))
    assert len(house.streams["r0"]) >= len(asked)
    assert machine.core.status["slot"] == 2


def test_nothing_is_asked_of_the_wormhole_while_the_log_is_read() -> None:
    _, machine = busy()
    again = machine.restarted(start=False)
    effects = again.core.effects()
    assert not [e for e in effects if isinstance(e, Certify | Sign)]


def test_a_wedge_is_the_last_word_also_after_a_restart() -> None:
    house = House(period=2, window=8)
    machine = Machine(house, "r0")
    lively(house, machine, 2)
    machine.core.record(house.successor())
    machine.serve()
    assert isinstance(machine.said()[-1], Wedge)
    assert machine.ends == [1]
    again = machine.restarted()
    again.hear(house.prepare("r1", 0, 4))
    for r in ("r1", "r2"):
        again.hear(house.statement(r, Kind.REQ, 3))
    again.ticks(2)
    assert isinstance(again.said()[-1], Wedge)
    assert len(again.said()) == len(machine.said())
    assert again.ends, "EPOCH-END is finished"


def test_after_a_view_change_a_restarted_replica_does_not_vote_in_the_old_view() -> None:
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    for r in ("r1", "r2"):
        machine.hear(house.statement(r, Kind.REQ, 1))
    assert isinstance(machine.said()[-1], ViewChange)
    again = machine.restarted()
    again.hear(house.prepare("r1", 0, 1))
    assert not any(isinstance(h, Commit | Prepare) for h in again.said())


def test_a_restarted_replica_does_not_vote_twice() -> None:
    house, machine = busy()
    said = len(machine.said())
    again = machine.restarted()
    again.hear(*[m for m in house.order if m.replica != "r0"])
    again.ticks(1)
    votes = [(h.g, e.s1) for h in again.said() if isinstance(h, Commit) for e in h.entries]
    assert len(votes) == len(set(votes))
    assert len(again.said()) == said


def test_it_goes_on_in_the_view_that_it_had_entered() -> None:
    _, machine = busy()
    assert any(isinstance(h, CommitNewView) for h in machine.said())
    assert machine.restarted().core.status["view"] == 1


def test_a_snapshot_that_did_not_reach_the_disk_is_not_counted_on() -> None:
    house = House(3, period=2, window=8)
    machine = Machine(house, "r0")
    machine.saving = False
    lively(house, machine, 2)
    assert not any(isinstance(h, Stable) for h in machine.said()), "STABLE only for a state that is durable"
    again = machine.restarted()
    assert again.core.status["slot"] == 2, "the log has it"
    root = again.core._at.execution.store.root()
    assert root == machine.core._at.execution.store.root()
    again.hear(house.statement("r1", Kind.CHECKPOINT, 2, root))  # repeated until superseded
    assert any(isinstance(h, Stable) for h in again.said())


def test_a_discarded_own_tail_is_no_reason_to_jump_while_it_speaks() -> None:
    house, machine = busy()
    stables = [m for m in house.streams["r0"] if isinstance(decode_header(m.header), Stable)]
    cursor = machine.core._at.ordering.configuration.streams["r0"].cursor
    machine.hear(Discarded(stables[-1], ()), sender="r2#3")
    assert machine.core._at.ordering.configuration.streams["r0"].cursor == cursor


def test_a_new_machine_begins_with_nothing() -> None:
    machine = Machine(House(), "r0", start=False)
    assert machine.core.status["c"] == 0
    assert machine.core._at.execution.store.root() == StateStore().root()
    machine.core.tick(1.0)
    assert [e for e in machine.core.effects() if isinstance(e, Certify | Sign)] == []


def test_a_leader_can_prove_its_new_view_after_a_restart() -> None:
    """Others may get the NEW-VIEW after they let go the VIEW-CHANGEs that it was computed from (decision 0005)."""
    house = House(3, period=2, window=16)
    machine = Machine(house, "r1")
    for r in ("r0", "r2"):
        machine.hear(house.statement(r, Kind.REQ, 1))
    machine.hear(house.view_change("r0", 1), house.view_change("r2", 1))
    assert isinstance(machine.said()[-1], NewView)
    for again in (machine.restarted(), machine.restarted(cut(machine))):
        before = len(again.sent)
        again.hear(FetchNewView(1, 1), sender="r2#3")
        logs = [m for _, m in again.sent[before:] if isinstance(m, LogProof)]
        assert len(logs) == house.record.quorums.view_change


def cut(machine: Machine) -> list[bytes]:
    """The machine's log, written anew."""
    ordering = machine.core._at.ordering
    assert ordering is not None
    return [encode_entry(LogRecord(machine.core._at.envelope)), *map(encode_entry, ordering.entries())]
