"""Executions with which readers broke the engines over a USIG: each property did not hold once, for the reason told."""

import random
from collections.abc import Callable, Iterable

import pytest

from cloudfit_orchestrator.bft import clients, recall
from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.clients import ClientWindow
from cloudfit_orchestrator.bft.effects import Append, Certify, Effect, EndEpoch, Rewrite, Sign
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import BatchMessage, FetchBatches, Frozen, Named, Replies, decode_client
from cloudfit_orchestrator.bft.serving import MAX_ANSWER
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.journal import LogBody, decode_entry
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    Discarded,
    Entry,
    Fetch,
    FetchNewView,
    LogProof,
    Prepare,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.serving import answer_view
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import WEDGE, House
from tests.unit.bft.machine import Machine

Say = Callable[[House, str], StreamMessage]
PATIENT = {"progress_timeout_ms": 60_000}  # nobody is suspected in these executions


# ----- what is shown
class SlowDisk(Machine):
    """While it is `stalled` no fsync ends. What need not wait for one overtakes the log, as in the guest."""

    stalled = False

    def _carry_out(self, effect: Effect) -> bool:
        behind = isinstance(effect, Append | Rewrite | Certify | EndEpoch) or (
            isinstance(effect, Sign) and effect.waits
        )
        return super()._carry_out(effect) if not (self.stalled and behind) else False


def shown(machine: Machine) -> list[int]:
    replies = (decode_client(body) for _, body in machine.answers)
    return [reply.slot for reply in replies if isinstance(reply, Replies)]


def test_no_reply_overtakes_the_mark_that_says_what_was_shown():
    """The second reply behind a new mark did not wait for the mark's fsync: a crash lost both, and reads were stale."""
    house = House(3, algorithm=Algorithm.MINBFT, period=64, window=256)
    leader, machine = Machine(house, "r0"), SlowDisk(house, "r1")
    for number in (1, 2):
        leader.client(house.bundle([(number, add(5))]))
    leader.ticks(0.2)
    proposals = list(house.streams["r0"])
    votes = house.commit("r2", *proposals)
    machine.stalled = True
    machine.hear(*proposals, votes)
    assert machine.core.status["slot"] == 2
    assert shown(machine) == []
    machine.stalled = False
    machine.serve()
    assert shown(machine) == [1, 2]


# ----- the own log
def test_a_restart_keeps_every_batch_of_the_own_log():
    """A rewritten log lists the batches ahead of what names them; beyond 4L of them the oldest, decided, was let go."""
    house = House(3, period=4, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    first = house.prepare("r1", 0, 1)  # nobody but r0 hears it: with r0's COMMIT it is decided
    decided = decode_header(first.header).batch
    machine.hear(first)
    assert machine.core.status["slot"] == 1
    house.prepare("r1", 0, 4)  # kept back: what follows waits for it, each with a batch of its own
    for _ in range(700):
        ahead = house.say("r1", Prepare(1, 0, 4, house.batch()))
        machine.hear(
            StreamMessage(
                ahead.c, ahead.replica, ahead.cv, ahead.header, b"", ahead.certificate,
                house.batches[decode_header(ahead.header).batch],
            ),
            batches=False,
        )  # fmt: skip
    machine.ticks(1.5)
    assert machine.rewrites
    logged = [batch_digest(entry.batch) for entry in map(decode_entry, machine.log) if isinstance(entry, LogBatch)]
    assert decided in logged
    assert len(logged) > 4 * house.record.parameters.window

    again = machine.restarted()
    assert again.core.status["slot"] == 1
    assert set(logged) <= {batch_digest(data) for data in again.core._at.ordering.batches.all()}
    again.hear(FetchBatches((decided,)), sender="r2#3")
    given = [message for _, message in again.sent if isinstance(message, BatchMessage)]
    assert [batch_digest(message.batch) for message in given] == [decided]


# ----- logs that are jumped over
def settled(house: House) -> None:
    """Slot 1 of r0 is decided by all."""
    proposal = house.prepare("r0", 0, 1)
    for voter in ("r1", "r2"):
        house.commit(voter, proposal)


def junk(votes: int, size: int) -> Commit:
    """A COMMIT with so many entries of so many bytes, all nonsense."""
    return Commit(1, 0, (Entry(1, 1, "r0", 1, b"x" * size, bytes(64)),) * votes)


def jumped(house: House, anchor: StreamMessage, attested: StreamMessage) -> Configuration:
    """A judge that heard nothing of r2 but its STABLE, and whose STABLE attests it."""
    judge = house.judge()
    house.tell(judge, [message for message in house.order if message.replica != "r2"])
    assert judge.offer_jump(Discarded(anchor, (attested,)))
    judge.advance()
    return judge


def answer_all(asks: Configuration, answers: Configuration) -> list[int]:
    """What `asks` wants to see proved is answered by `answers`. The bytes of each log."""
    logs = []
    for g in list(asks.wanted.views):
        for answer in answer_view(answers, FetchNewView(1, g)):
            if isinstance(answer, LogProof):
                logs.append(sum(len(message.header) for message in answer.messages))
                asks.offer_log(answer.messages)
            elif isinstance(answer, StreamMessage):
                asks.offer(answer)
                asks.offer_view(answer)
    asks.advance()
    return logs


def test_a_log_of_fat_votes_is_a_breach_of_form():
    """A faulty voter's log of fat junk was too long to be handed on: who had jumped over it was cut off for good."""
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=32)
    settled(house)
    fat = house.say("r2", junk(1, 20_000))
    house.view_change("r2", 1)
    stream = house.full_judge().streams["r2"]
    assert stream.ended is not None
    assert stream.end_rule.startswith("form: larger")
    assert stream.cursor < fat.cv


def test_the_longest_log_of_a_vote_is_handed_on():
    """Logs of more than half a MiB were not, though a large window has such: a NEW-VIEW was held for good."""
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=640)
    settled(house)
    for votes in (640, 639):  # with the vote on slot 1, 2L
        house.say("r2", junk(votes, 400))
    own, vote = house.view_change("r1", 1), house.view_change("r2", 1)
    anchor, attested = house.stable("r2", 1), house.stable("r1", 1)
    view = house.new_view("r1", 1, [own, vote])
    r0, r1 = jumped(house, anchor, attested), house.full_judge()
    assert r0.streams["r1"].cursor < view.cv, "the NEW-VIEW cannot be judged without r2's log"
    logs = answer_all(r0, r1)
    assert max(logs) > MAX_ANSWER
    assert r0.streams["r1"].cursor >= view.cv


@pytest.mark.parametrize(
    ("target", "say"), [(WEDGE, House.wedge), (1, lambda house, who: house.view_change(who, 1))], ids=["wedge", "view"]
)
def test_a_vote_whose_log_was_jumped_over_is_proved_by_who_holds_it(target: int, say: Say):
    """Logs were handed on for NEW-VIEWs only: wedges and VIEW-CHANGEs that were jumped over never counted, so neither S
    nor a NEW-VIEW was ever computed.
    """
    house = House(3, period=1, window=4)
    settled(house)
    anchor, attested = house.stable("r2", 1), house.stable("r1", 1)
    vote = say(house, "r2")
    r0, r1 = jumped(house, anchor, attested), house.full_judge()
    house.tell(r0, [vote])
    assert [found.name.replica for found in r1.votes.of(target)] == ["r2"]
    assert not r0.votes.of(target)
    assert answer_all(r0, r1)
    assert [found.name.replica for found in r0.votes.of(target)] == ["r2"]


def test_an_epoch_end_at_a_judge_that_jumped_near_is_proved_by_who_holds_the_log():
    """EPOCH-END and the whole log are a vote; who had jumped over the log was never shown it, and so could not judge an
    S that was built on it, nor build one.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4)
    settled(house)
    anchor, attested = house.stable("r2", 1), house.stable("r1", 1)
    house.commit("r2", house.prepare("r0", 0, 2))
    r0, r1 = jumped(house, anchor, attested), house.full_judge()
    house.tell(r0, house.streams["r2"][-1:])
    end = house.epoch_end("r2")
    for judge in (r0, r1):
        assert judge.offer_end(end)
        judge.advance()
    assert [found.name.replica for found in r1.votes.of(WEDGE)] == ["r2"]
    assert not r0.votes.of(WEDGE)
    (log,) = answered(r1)
    r0.offer_log(log[1:])
    r0.offer_log(log[:-1])
    assert not r0.votes.of(WEDGE), "a part of the log is none"
    assert answer_all(r0, r1)
    assert [found.name for found in r0.votes.of(WEDGE)] == [found.name for found in r1.votes.of(WEDGE)]
    names = [found.name for found in r0.votes.of(WEDGE)] + [vote_name(house.wedge("r1"))]
    for judge in (r0, r1):
        house.tell(judge, house.streams["r1"])
    outcomes = [judge.try_merge(judge.votes.named(WEDGE, names)) for judge in (r0, r1)]
    assert outcomes[0] is not None
    assert outcomes[0] == outcomes[1]


def answered(judge: Configuration) -> list[tuple[StreamMessage, ...]]:
    return [answer.messages for answer in answer_view(judge, FetchNewView(1, WEDGE)) if isinstance(answer, LogProof)]


def vote_name(word: StreamMessage) -> Named:
    return Named(word.replica, word.cv, word.digest)


class LossyChannel(Machine):
    """The wormhole certifies a NEW-VIEW, and its answer is lost, with all that would follow it."""

    lost = False

    def _carry_out(self, effect: Effect) -> bool:
        if isinstance(effect, Certify):
            if self.lost:
                return False
            body = next(e for e in map(decode_entry, reversed(self.log)) if isinstance(e, LogBody))
            if body.payload:
                self.lost = True
                self.house.say(self.me, body.header, body.payload)
                return True
        return super()._carry_out(effect)


def test_a_leader_whose_new_view_was_certified_unheard_can_prove_it_after_all_have_gone_on(
    monkeypatch: pytest.MonkeyPatch,
):
    """The others went on to later views and STABLEs; the leader cut the logs that its NEW-VIEW was computed from, and
    then could not judge its own stream: it was silent until the next configuration.
    """
    monkeypatch.setattr(recall, "REWRITE_FACTOR", 0)
    monkeypatch.setattr(recall, "REWRITE_SLACK", 0)
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = LossyChannel(house, "r1")
    machine.hear(house.view_change("r0", 1), sender="r0#1")
    assert machine.lost
    machine.waiting.clear()
    view = house.new_view("r2", 2, [house.view_change("r0", 2), house.view_change("r2", 2)])
    house.commit_view("r0", view)
    machine.hear(*house.streams["r0"], *house.streams["r2"])
    for s in range(1, 10):
        proposal = house.prepare("r2", 2, s)
        machine.hear(proposal, house.commit("r0", proposal))
        machine.ticks(0.2)
        digest = machine.core._at.execution.digests[s]
        truth = {"digest": digest, "certificate": house.checkpoint(s, digest)}
        machine.hear(*(house.stable(who, s, **truth) for who in ("r0", "r2")))
        machine.ticks(1.2)
    assert machine.rewrites
    other = house.judge()  # has not got the logs any more, and hears of the NEW-VIEW now
    house.tell(other, house.streams["r2"])
    assert other.offer_jump(Discarded(house.streams["r0"][-1], (house.streams["r2"][-1],)))
    again = machine.restarted()
    again.ticks(1)
    ordering = again.core._at.ordering
    assert ordering.live
    house.tell(other, house.streams["r1"])
    assert other.streams["r1"].cursor < len(house.streams["r1"])
    answer_all(other, ordering.configuration)
    assert other.streams["r1"].cursor == len(house.streams["r1"])


@pytest.mark.parametrize("told", [0, 2])
def test_no_peer_makes_a_member_jump_over_a_log_that_it_holds(told: int):
    """Two DISCARDED frames of one faulty peer, a little apart, threw away a correct stream's log ahead of the STABLE
    that was next to come: its wedge never counted, S was never computed.
    """
    house = House(3, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    machine.hear(house.prepare("r1", 0, 1))
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest)}
    stable = house.stable("r1", 1, **truth)  # it is on its way to r0
    attested = house.stable("r2", 1, **truth)  # by the faulty one alone
    for _ in range(told):
        machine.hear(Discarded(stable, (attested,)), sender="r2#3")
        machine.ticks(0.7)
    assert machine.core._at.ordering.configuration.streams["r1"].base == 0
    machine.hear(*house.streams["r1"])
    machine.core.record(house.successor())
    machine.serve()
    machine.hear(house.wedge("r1"))
    ordering = machine.core._at.ordering
    assert [named.replica for named in ordering.wedges()] == ["r0", "r1"]
    last = (house.streams["r0"][-1], house.streams["r1"][-1])
    assert ordering.final([Named(word.replica, word.cv, word.digest) for word in last]) is not None


def test_that_a_log_is_discarded_is_believed_of_who_was_asked_only():
    """A peer that nobody had asked was believed after a while, though what it called discarded was on its way."""
    house = House(3, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r0")
    machine.hear(house.prepare("r1", 0, 1))
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest)}
    house.commit("r1", house.prepare("r2", 0, 2))
    stable = house.stable("r1", 1, **truth)
    attested = house.stable("r2", 1, **truth)
    stream = machine.core._at.ordering.configuration.streams["r1"]

    def told() -> None:
        for _ in range(2):
            machine.hear(Discarded(stable, (attested,)), sender="r2#3")
            machine.ticks(0.7)

    told()
    assert stream.base == 0
    machine.hear(stable)  # now the COMMIT ahead of it is missing, and asked for
    machine.ticks(2)
    assert any(isinstance(message, Fetch) and message.replica == "r1" for _, message in machine.sent)
    told()
    assert stream.base == 0, "its votes for slots up to 5 may be needed"
    machine.hear(*(house.statement(member, Kind.CHECKPOINT, 5, bytes(32)) for member in ("r1", "r2")))
    told()
    assert stream.base == stable.cv - 1


class Pair:
    """The correct r0 and r1 of three. What they say in their streams while `slow` arrives with `catch_up`."""

    def __init__(self, house: House) -> None:
        self.members = {name: Machine(house, name) for name in ("r0", "r1")}
        self.slow = False
        self.late: list[tuple[str, str, StreamMessage]] = []

    def ticks(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            for member in self.members.values():
                member.ticks(0.05)
            self.exchange()

    def exchange(self) -> None:
        for _ in range(6):
            for name, member in self.members.items():
                out, member.sent = member.sent, []
                for peer, message in out:
                    to = peer.split("#")[0]
                    if to in self.members and self.slow and isinstance(message, StreamMessage):
                        self.late.append((name, to, message))
                    elif to in self.members:
                        self.hear(name, to, message)

    def hear(self, sender: str, to: str, message: Frozen) -> None:
        self.members[to].hear(message, sender=f"{sender}#{int(sender[1]) + 1}", batches=False)

    def catch_up(self) -> None:
        self.slow = False
        for sender, to, message in self.late:
            self.hear(sender, to, message)


@pytest.mark.parametrize("lies", [False, True])
def test_no_peer_makes_two_members_deaf_to_each_other(*, lies: bool):
    """Two DISCARDED frames to each, while a COMMIT and a STABLE were under way: each threw the other's log away, and
    counted no VIEW-CHANGE of it; with the faulty one silent the group stopped for good, under a perfect network.
    """
    house = House(3, period=1, window=4, parameters={"progress_timeout_ms": 500})
    pair = Pair(house)
    pair.members["r1"].client(house.bundle([(1, add(1))]))  # slot 1 is r1's
    pair.exchange()
    pair.ticks(0.2)
    pair.slow = True
    second = house.prepare("r2", 0, 2)
    for member in pair.members.values():
        member.hear(second, sender="r2#3")  # decided with the own COMMIT
    pair.ticks(0.2)
    stables = {
        r: [m for m in house.streams[r] if isinstance(decode_header(m.header), Stable)][-1] for r in ("r0", "r1")
    }
    real = decode_header(stables["r0"].header)
    attested = house.stable("r2", real.h, digest=real.digest, certificate=real.certificate)
    for wait in (0.7, 0):
        for member, other in (("r0", "r1"), ("r1", "r0")) if lies else ():
            pair.members[member].hear(Discarded(stables[other], (attested,)), sender="r2#3")
        pair.ticks(wait)
    pair.catch_up()  # from here on r2 is silent, and the network good
    for number in range(2, 8):
        bundle = house.bundle([(number, add(1))])
        for member in pair.members.values():
            member.client(bundle)
        pair.ticks(5)
    assert all(member.core.status["slot"] >= 6 for member in pair.members.values())


# ----- the client table
@pytest.mark.parametrize("seed", range(12))
def test_client_tables_of_who_executed_and_who_took_over_are_equal(seed: int, monkeypatch: pytest.MonkeyPatch):
    """At window, page, 64-bit and byte limits: nothing is executed twice, no reply changes, roots never differ."""
    rng = random.Random(seed)
    monkeypatch.setattr(clients, "MAX_REPLIES_BYTES", rng.choice([3000, 20_000, 2 << 20]))
    width = rng.choice([1, 7, 64, 100, 256])
    client, done = b"c" * 32, {}
    top = rng.choice([1, 60, 63, 64, 10**6, 2**64 - 4000])
    executed, took_over = StateStore(), StateStore()
    for _ in range(40):
        if rng.random() < 0.3:
            took_over = StateStore.from_snapshot(took_over.snapshot())
        numbers = [max(1, min(2**64 - 1, top + rng.randint(-width - 3, width + 3))) for _ in range(rng.randint(1, 40))]
        results = [number.to_bytes(8, "big") + bytes(rng.choice([0, 5, 1023, 1024, 1025, 2500])) for number in numbers]
        first = execute(executed, client, width, zip(numbers, results, strict=True))
        assert not done.keys() & first.keys(), "executed twice"
        done |= first
        assert execute(took_over, client, width, ((number, done.get(number, b"")) for number in numbers)) == first
        assert executed.snapshot().root == took_over.snapshot().root
        window = ClientWindow(executed, client)
        top = max(top, window.high)
        held = {number: window.cached(number) for number in done}
        assert all(reply in (None, done[number]) for number, reply in held.items())
        assert window._bytes == sum(len(reply) for reply in held.values() if reply is not None)


def execute(store: StateStore, client: bytes, width: int, requests: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """Requests with their results, as a replica executes them. Those that were new."""
    window, new = ClientWindow(store, client), {}
    for number, result in requests:
        if window.cached(number) is None and window.acceptable(number, width):
            window.keep(number, result, width)
            new[number] = result
    if new:
        window.save()
    return new
