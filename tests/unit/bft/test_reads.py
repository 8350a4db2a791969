"""Unordered reads (protocol §7): a replica answers from its state, or says at once that it may not."""

import pytest

from cloudfit_orchestrator.bft import reads, recall
from cloudfit_orchestrator.bft.journal import LogShown, entry_decoder
from cloudfit_orchestrator.bft.messages import Read, ReadReply, decode_client, encode, seen_digest
from cloudfit_orchestrator.bft.reads import SHOWN_AHEAD, read_quorum
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.written import ReadView
from cloudfit_orchestrator.model.errors import RefusedError
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from cloudfit_orchestrator.services import kv
from cloudfit_orchestrator.services.counter import add, value
from tests.unit.bft.house import GROUP, House
from tests.unit.bft.machine import Machine

CLIENT = 0
QUESTION = Read(7, (add(0),))


def answered(machine: Machine, question: Read = QUESTION) -> ReadReply:
    before = len(machine.answers)
    machine.client(encode(question))
    replies = [decode_client(body) for _, body in machine.answers[before:]]
    (reply,) = [reply for reply in replies if isinstance(reply, ReadReply)]
    return reply


def group(period: int = 4) -> tuple[House, Machine]:
    house = House(3, algorithm=Algorithm.MINBFT, period=period, window=4 * period)
    return house, Machine(house, "r1")


def marks(machine: Machine) -> list[int]:
    entries = map(entry_decoder(machine.core._at.ordering.ENTRIES), machine.log)
    return [entry.slot for entry in entries if isinstance(entry, LogShown)]


def decide(house: House, machine: Machine, *slots: int) -> None:
    for s in slots:
        machine.hear(house.prepare("r0", 0, s))
        assert machine.core.status["slot"] == s


@pytest.mark.parametrize(("n", "f", "quorum"), [(3, 1, 3), (4, 1, 4), (5, 2, 5), (7, 3, 7)])
def test_read_quorums_meet_each_quorum_that_showed_something_in_a_correct_member(n: int, f: int, quorum: int) -> None:
    record = House(n, f=f).record
    assert read_quorum(record) == quorum
    for other in (f + 1, quorum, record.quorums.view_change):
        assert quorum + other >= n + f + 1


def test_an_answer_shows_the_executed_state_and_is_signed_by_the_wormhole() -> None:
    house, machine = group()
    decide(house, machine, 1, 2, 3)
    reply = answered(machine)
    assert [value(seen.result) for seen in reply.seen] == [1 + 2 + 3]
    assert (reply.replica, reply.c, reply.number, reply.slot, reply.seen[0].slot) == ("r1", 1, 7, 3, 3)
    body = LAYOUT[Kind.READ].pack(house.client_keys[CLIENT].public, 7, 3, seen_digest(QUESTION.operations, reply.seen))
    message = statement_bytes(Kind.READ, GROUP, "r1", 1, body)
    assert house.keys.verify(house.kss["r1"].public, message, reply.signature)


def test_an_operation_that_changes_something_is_not_answered() -> None:
    house, machine = group()
    decide(house, machine, 1)
    assert answered(machine, Read(8, (add(0), add(1)))) == ReadReply("r1", 1, 8, 0, (), b"")
    assert value(answered(machine).seen[0].result) == 1


def test_from_its_wedge_on_a_replica_answers_no_read() -> None:
    house, machine = group()
    decide(house, machine, 1)
    machine.core.record(house.successor())
    machine.serve()
    assert answered(machine).seen == ()


def test_what_may_have_been_shown_is_logged_before_it_is_signed() -> None:
    house, machine = group()
    machine.kss = False
    machine.hear(house.prepare("r0", 0, 1))
    assert marks(machine) == [1 + SHOWN_AHEAD]
    assert [sign.waits for sign in machine.signs(Kind.REPLY)] == [True]
    machine.hear(house.prepare("r0", 0, 2))
    waits = [sign.waits for sign in machine.signs(Kind.REPLY)]
    assert waits == [True, True], "that the mark is on the disk is known when a signature that waited for it is here"
    machine.kss = True
    machine.serve()
    machine.kss = False
    machine.hear(house.prepare("r0", 0, 3))
    assert [sign.waits for sign in machine.signs(Kind.REPLY)] == [False]
    assert marks(machine) == [1 + SHOWN_AHEAD]


def test_after_a_restart_nothing_is_read_before_all_that_may_have_been_shown_is_executed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reply or a read has shown slot 3, and the log lost that it was decided: an older state must not be shown."""
    monkeypatch.setattr(reads, "SHOWN_AHEAD", 8)
    house, machine = group(period=64)
    decide(house, machine, 1, 2, 3)
    assert answered(machine).slot == 3
    again = machine.restarted()
    assert answered(again).seen == ()
    decide(house, again, *range(4, 9))
    assert answered(again).seen == ()
    decide(house, again, 9)
    assert (len(answered(again).seen), answered(again).slot) == (1, 9)


def test_the_mark_of_what_was_shown_outlives_the_cutting_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "REWRITE_FACTOR", 0)
    monkeypatch.setattr(recall, "REWRITE_SLACK", 0)
    house, machine = group()
    decide(house, machine, 1, 2, 3, 4)
    machine.ticks(1.1)
    assert machine.rewrites
    assert marks(machine) == [1 + SHOWN_AHEAD]
    assert answered(machine.restarted()).seen == ()


def test_replicas_that_executed_all_and_that_took_a_state_over_agree_on_what_was_written_when() -> None:
    """Older than the last multiple of K is all the same; newer is known by all."""
    house, machine = group(period=4)
    decide(house, machine, 1, 2, 3)
    store = machine.core._at.execution
    assert answered(machine).seen[0].slot == 3
    decide(house, machine, 4)
    assert answered(machine).seen[0].slot == 4
    store.adopt(4, StateStore.from_snapshot(store.store.snapshot()), 1)
    assert answered(machine).seen[0].slot == 4


def test_a_listing_depends_on_every_write() -> None:
    service, store = kv.KvService(), StateStore()
    service.execute(store.service_view(), kv.encode_operation(kv.Put(b"k", b"v")))
    one, all_ = ReadView(store), ReadView(store)
    assert service.read(one, kv.encode_operation(kv.Get(b"k"))) == kv._encoder.encode(kv.Value(b"v"))
    assert (one.keys, one.all) == ([b"k"], False)
    service.read(all_, kv.encode_operation(kv.List()))
    assert all_.all
    assert service.read(one, kv.encode_operation(kv.Put(b"k", b"w"))) is None
    with pytest.raises(RefusedError):
        one.put(b"k", b"w")
    with pytest.raises(RefusedError):
        one.delete(b"k")


def test_a_frame_that_is_no_read_is_not_taken_for_one() -> None:
    _, machine = group()
    machine.client(b"\x93\x2b\xff")
    assert not machine.answers
    assert machine.core.status["counters"]["bad_bundle"] == 1
