"""Executions of a seventh reading: each property did not hold once, for the reason told there."""

import base64
import tracemalloc

import pytest
from msgspec.structs import replace

from cloudfit_orchestrator.bft import batches, recall
from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.effects import Send
from cloudfit_orchestrator.bft.messages import BatchMessage, ChunkQuery, Named, WedgeSet, encode
from cloudfit_orchestrator.bft.outbox import MAX_ANSWERS, MAX_REPLY_BYTES
from cloudfit_orchestrator.bft.pbft.messages import Phase
from cloudfit_orchestrator.bft.store import BUCKETS
from cloudfit_orchestrator.bft.trie import place
from cloudfit_orchestrator.bft.usig.messages import (
    CommitNewView,
    Discarded,
    Fetch,
    FetchNewView,
    NewView,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.serving import answer_fetch, answer_view
from cloudfit_orchestrator.model.record import Algorithm, open_record
from cloudfit_orchestrator.services.counter import add
from cloudfit_orchestrator.services.kv import Get, KvService, Put, encode_operation
from tests.unit.bft.house import WEDGE, House
from tests.unit.bft.machine import Machine
from tests.unit.bft.test_pbft import batch, group_of, ordering, tell, vote
from tests.unit.bft.test_readings_usig import LossyChannel

PATIENT = {"progress_timeout_ms": 60_000}  # nobody is suspected in these executions


# ----- what ended a stream
def a_breach_for_r1_alone(house: House, machine: Machine) -> None:
    """The faulty r0 shows what ends its stream to r1, and what follows to its accomplice r3, which votes for it: that
    vote is in r3's log, and r1 knows that it counts for nothing. r1 makes a NEW-VIEW of r3's vote and others.
    """
    machine.hear(house.prepare("r0", 7, 1), sender="r0#1")
    house.commit("r3", house.prepare("r0", 0, 1))
    machine.hear(*house.streams["r3"], house.view_change("r2", 1), house.view_change("r3", 1), sender="r4#5")


def what_the_others_heard(house: House) -> list[StreamMessage]:
    return [message for message in house.order if message.replica != "r0"]


@pytest.mark.parametrize("restarts", [False, True])
def test_what_ended_a_stream_is_handed_on_also_after_a_restart(*, restarts: bool):
    """n=5, f=2. Who had ended a faulty stream kept nothing of what had ended it: the others could not tell that what r3
    had voted for does not stand, so they never judged the NEW-VIEW of the correct r1, nor anything after it. With the
    two faulty ones silent from then on, two of five were left: the group stood still for good.
    """
    house = House(5, f=2, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r1")
    a_breach_for_r1_alone(house, machine)
    assert isinstance(machine.said()[-1], NewView)
    if restarts:
        machine = machine.restarted()
    other = house.judge()
    house.tell(other, what_the_others_heard(house))
    assert other.streams["r1"].cursor < len(house.streams["r1"])
    assert other.wanted.streams == {"r0": 2}
    for answer in answer_fetch(machine.core._at.ordering.configuration, Fetch(1, "r0", 1, 2)):
        assert isinstance(answer, StreamMessage)
        other.offer(answer)
    other.advance()
    assert other.streams["r0"].ended == 1
    assert other.streams["r1"].cursor == len(house.streams["r1"])


@pytest.mark.parametrize("cut", [False, True])
def test_an_s_that_rests_on_the_end_of_a_stream_can_be_built_again(*, cut: bool, monkeypatch: pytest.MonkeyPatch):
    """The same for a wedge: r1 confirmed an S, started again, and had forgotten that r0's stream had ended. Two faulty
    confirmations beside its own make ACTIVE: it pinned what nobody had.
    """
    house = House(5, f=2, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.hear(house.prepare("r0", 7, 1), sender="r0#1")
    house.commit("r3", house.prepare("r0", 0, 1))
    machine.core.record(house.successor())
    machine.serve()
    house.wedge("r3")
    machine.hear(*house.streams["r3"], house.wedge("r2"), sender="r4#5")
    machine.ticks(1)
    assert confirmed(machine) == [0]
    if cut:
        rewrite(machine, monkeypatch)
    assert outcomes(machine.restarted()) == [0]


# ----- what is not in the own log
def confirmed(machine: Machine) -> list[object]:
    """The h of each S that was confirmed."""
    return [body["h"] for topic, body in machine.reports if topic == "confirm" and body["c"] == 2]


def outcomes(machine: Machine) -> list[int]:
    """The h of each S that the machine has, with nobody's help if it has just been started."""
    return [outcome.h for outcome in machine.core._succession.outcomes()]


def rewrite(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes, and it pays to write the log anew."""
    before = machine.rewrites
    with monkeypatch.context() as patched:
        patched.setattr(recall, "REWRITE_SLACK", -(1 << 20))
        machine.ticks(1.2)
    assert machine.rewrites > before


def jump_over_r2(house: House, machine: Machine, first: StreamMessage, attester: str) -> StreamMessage | None:
    """r2 has voted for slot 1 and, if it can, proposed slot 2; the machine jumps over that, to r2's STABLE(1)."""
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest, attester, "r2")}
    house.commit("r2", first)
    second = house.prepare("r2", 0, 2) if house.record.algorithm == Algorithm.EBAWA else None
    anchor, attested = house.stable("r2", 1, **truth), house.stable(attester, 1, **truth)
    machine.hear(attested, sender=f"{attester}#1")
    machine.hear(Discarded(anchor, (attested,)), sender="r2#3")
    return second


def prove(house: House, machine: Machine, g: int) -> None:
    """Whoever holds them hands over the logs of the votes for view `g`."""
    for answer in answer_view(house.full_judge(), FetchNewView(1, g)):
        machine.hear(answer)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_an_s_that_rests_on_a_log_that_was_handed_over_can_be_built_again(
    *, closed: bool, cut: bool, monkeypatch: pytest.MonkeyPatch
):
    """A wedge whose log had been jumped over counted when that log was handed over, which went into no log: a member
    confirmed an S that it could not build again. Beside f faulty confirmations, and with the only other holder
    replaced, one restart of one correct member was enough: ACTIVE pinned what nobody had.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    machine.client(house.bundle([(1, add(1))]))
    first = house.streams["r0"][0]
    machine.hear(house.commit("r1", first))
    jump_over_r2(house, machine, first, "r1")
    machine.core.record(house.successor())
    machine.serve()
    judge = house.full_judge()
    if closed:
        machine.core._at.ordering.take_end(house.epoch_end("r2"))
        judge.offer_end(house.epoch_end("r2"))
    else:
        machine.hear(house.wedge("r2"), sender="r2#3")
        judge = house.full_judge()
    machine.ticks(1)
    assert not confirmed(machine)
    for answer in answer_view(judge, FetchNewView(1, WEDGE)):
        machine.hear(answer)
    machine.ticks(2)
    assert confirmed(machine) == [1]
    if cut:
        rewrite(machine, monkeypatch)
    again = machine.restarted()
    assert outcomes(again) == [1]
    if cut:
        rewrite(again, monkeypatch)
        assert outcomes(again.restarted()) == [1]


def test_the_batches_of_a_confirmed_s_are_pushed_out_by_nobody(monkeypatch: pytest.MonkeyPatch):
    """A batch that only a log handed over names was held like one that came unasked: batches ahead of a gap pushed it
    out, the log was cut without it, and S could not be built again.
    """
    house = House(3, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    first = house.prepare("r1", 0, 1)
    machine.hear(first)
    second = jump_over_r2(house, machine, first, "r1")
    assert second is not None
    machine.core.record(house.successor())
    machine.serve()
    machine.hear(house.wedge("r2"), sender="r2#3")
    prove(house, machine, WEDGE)
    machine.hear(BatchMessage(house.batches[decode_header(second.header).batch]), sender="r2#3")
    machine.ticks(2)
    assert confirmed(machine) == [2]
    house.prepare("r1", 0, 4)  # kept back: what follows waits for it
    for _ in range(40):
        machine.hear(house.prepare("r1", 0, 4))
    rewrite(machine, monkeypatch)
    assert outcomes(machine.restarted()) == [2]


def test_a_new_view_that_was_handed_over_is_logged_before_it_is_voted_for():
    """Its payload was in no log but its leader's: a COMMIT of it outlived it, and with it what it had decided, until
    somebody handed it over again.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    machine.client(house.bundle([(1, add(1))]))
    house.commit("r2", house.streams["r0"][0])
    machine.hear(*house.streams["r2"], sender="r2#3")
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest, "r0", "r2")}
    view = house.new_view("r1", 1, [house.view_change(who, 1) for who in ("r1", "r2")])
    house.commit_view("r2", view)
    stable, attested = house.stable("r1", 1, **truth), house.stable("r2", 1, **truth)
    machine.hear(Discarded(stable, (attested,)), sender="r1#2")
    machine.hear(*house.streams["r2"], sender="r2#3")
    machine.ticks(0.2)
    machine.hear(view, sender="r1#2")
    assert isinstance(machine.said()[-1], CommitNewView)
    assert 1 in machine.restarted().core._at.ordering.configuration.new_views


def test_a_leader_whose_new_view_was_certified_unheard_judges_it_by_the_logs_that_it_wrote():
    """It had them in its log, but counted votes only off the streams that it held, one of which it had jumped over: its
    own NEW-VIEW could not be judged, and it stayed silent until somebody handed that log over again.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = LossyChannel(house, "r1")
    first = house.prepare("r0", 0, 1)
    machine.hear(first, sender="r0#1")
    jump_over_r2(house, machine, first, "r0")
    machine.hear(house.view_change("r2", 1), sender="r2#3")
    machine.ticks(0.2)
    assert not machine.lost
    prove(house, machine, 1)
    machine.ticks(1)
    assert machine.lost
    again = machine.restarted()
    again.ticks(0.2)
    assert again.core.status["live"]


# ----- questions about what is over
def test_a_question_about_the_configuration_before_is_answered():
    """The engine of the present one took it for its own, and said nothing: no member could hand round its log once it
    had heard of ACTIVE.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    machine.client(house.bundle([(1, add(1))]))
    machine.hear(house.commit("r1", house.streams["r0"][0]))
    prepared = house.successor()
    machine.core.record(prepared)
    machine.serve()
    machine.hear(house.wedge("r1"))
    machine.ticks(1)
    (body,) = [body for topic, body in machine.reports if topic == "confirm" and body["c"] == 2]
    digest = base64.b64decode(str(body["digest"]))
    _, envelope = house.activate(open_record(prepared, house.controllers), 1, digest)
    machine.core.record(envelope)
    machine.serve()
    assert machine.core.status["c"] == 2
    machine.sent.clear()
    machine.hear(Fetch(1, "r0", 1, 9))
    told = [message.cv for _, message in machine.sent if isinstance(message, StreamMessage)]
    assert told == list(range(1, len(house.streams["r0"]) + 1))


# ----- memory and disk
def flood(house: House, machine: Machine, count: int, size: int) -> None:
    """r1 proposes so many batches of so many bytes, all nonsense: three in turn, the rest ahead of a gap."""
    for i in range(count):
        if i == 3:
            house.prepare("r1", 0, 13)  # kept back
        data = i.to_bytes(4, "big") + bytes(size)
        said = house.prepare("r1", 0, 1 + 3 * min(i, 4), batch_digest(data))
        machine.hear(replace(said, batch=data), batches=False)


def test_batches_larger_than_any_valid_one_fill_neither_memory_nor_log():
    """A faulty proposer's were held and logged as invalid, of up to 8 MiB each, a window of them and 4L ahead of a gap:
    some fifty frames filled the memory and the disk of all replicas (384 and 256 MiB, unless the spec says more).
    """
    house = House(3, period=4, window=16, parameters={**PATIENT, "max_batch_bytes": 1024})
    machine = Machine(house, "r0")
    flood(house, machine, 30, 100_000)
    assert sum(map(len, machine.core._at.ordering.batches.all())) < 100_000
    assert sum(map(len, machine.log)) < 100_000


def test_batches_ahead_of_a_gap_are_bounded_in_bytes_and_so_is_the_log(monkeypatch: pytest.MonkeyPatch):
    """Both were counted: 4L batches, and twice as many records as must be kept."""
    monkeypatch.setattr(batches, "MAX_LOOSE_BYTES", 200_000)
    monkeypatch.setattr(recall, "REWRITE_SLACK_BYTES", 100_000)
    house = House(3, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r0")
    flood(house, machine, 60, 100_000)
    machine.ticks(1.2)
    held = machine.core._at.ordering.batches
    assert held.bytes == sum(map(len, held.all())) < 600_000
    assert sum(map(len, machine.log)) < 1_400_000
    assert machine.restarted().core.status["live"]


def test_what_stands_beside_an_early_vote_is_not_kept_with_it():
    """PBFT. Nobody signs a batch: a faulty member put 8 MiB beside each of 64 early votes, its own and (so that there
    was no room for the real ones) those of others.
    """
    group = group_of(period=16, window=16)
    data = batch(group, 1)
    real = vote(group, "r1", Phase.PRE_PREPARE, 1, 1, batch_digest(data), data)
    tell(group, "r2", real)
    for i in range(1, 30):
        tell(group, "r2", vote(group, "r1", Phase.PREPARE, 4 * i, 1, bytes(32), bytes(100_000)), sender="r1#2")
        tell(group, "r2", vote(group, "r1", Phase.PRE_PREPARE, 4 * i + 1, 1, bytes(32), bytes(100_000)), sender="r1#2")
    tell(group, "r2", *(replace(real, batch=bytes([i])) for i in range(70)), sender="r3#4")
    early = ordering(group, "r2")._early["r1"]
    assert real in early
    assert sum(len(found.batch) for found in early) == len(data)


def test_results_that_wait_for_a_signature_fill_no_memory():
    """One client that stores 120 KB, and asks for them a thousand times in a bundle of 30 KB: each slot was 120 MB at
    every replica until its reply was signed, and as much again when it was.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=64, window=256, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.core._at.execution.service = KvService()

    def propose(s: int, *operations: bytes) -> None:
        data = make_batch([house.bundle([(1024 * s + i, op) for i, op in enumerate(operations)])])
        house.batches[batch_digest(data)] = data
        machine.hear(house.prepare("r0", 0, s, batch_digest(data)), sender="r0#1")

    machine.kss = False
    tracemalloc.start()
    propose(1, encode_operation(Put(b"key", bytes(120_000))))
    for s in range(2, 6):
        propose(s, *[encode_operation(Get(b"key"))] * 400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert machine.core.status["slot"] == 5
    assert peak < 3 * MAX_REPLY_BYTES


def test_a_question_for_chunks_is_answered_as_far_as_the_peers_queue_takes():
    """64 times one chunk of 5 MB, asked for in a frame of a hundred bytes, were made at once: 300 MB."""
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    execution = machine.core._at.execution
    same = [key for i in range(24_000) if place(key := i.to_bytes(8, "big")) % BUCKETS == 5]
    for key in same[:20]:
        execution.store.put(key, bytes(250_000))
    snapshot = execution.checkpoint(1)
    assert len(snapshot.chunk(5)) > 5_000_000
    question = encode(ChunkQuery(snapshot.root, (5,) * 64))

    def sent() -> int:
        return sum(len(effect.body) for effect in machine.core.effects() if isinstance(effect, Send))

    for _ in range(3):
        machine.core.receive("r2#3", question)
    assert MAX_ANSWERS <= sent() < MAX_ANSWERS + (8 << 20)
    machine.core.receive("r2#3", question)
    assert sent() >= MAX_ANSWERS, "there is room again"


def test_an_s_that_many_sets_of_wedges_give_is_executed_once(monkeypatch: pytest.MonkeyPatch):
    """Each set that a peer named was executed on a copy of its own: with large batches a copy is a window of them."""
    house = House(4, f=1, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r0")
    copies = []
    tentative = machine.core._at.execution.tentative
    monkeypatch.setattr(machine.core._at.execution, "tentative", lambda *args: copies.append(args) or tentative(*args))
    machine.client(house.bundle([(1, add(1))]))
    proposal = house.streams["r0"][0]
    machine.core.record(house.successor())
    machine.serve()
    for who in ("r1", "r2", "r3"):
        house.commit(who, proposal)
        house.wedge(who)
        machine.hear(*house.streams[who])
    machine.ticks(1)
    last = {who: house.streams[who][-1] for who in house.names}
    names = {who: Named(who, message.cv, message.digest) for who, message in last.items()}
    for left_out, peer in (("r0", "r1#2"), ("r1", "r2#3"), ("r2", "r2#3"), ("r3", "r3#4")):
        machine.hear(WedgeSet(1, 2, tuple(name for who, name in names.items() if who != left_out)), sender=peer)
    machine.ticks(1)
    assert len(outcomes(machine)) == 4
    assert len(copies) == 1
