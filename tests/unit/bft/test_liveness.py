"""What a faulty member made slow: executions in which correct ones had all that was needed, and asked somebody else."""

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.catchup import CatchUp
from cloudfit_orchestrator.bft.clientdesk import ClientDesk
from cloudfit_orchestrator.bft.effects import Send
from cloudfit_orchestrator.bft.messages import Beacon, StatementMessage
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pbft.messages import Phase
from cloudfit_orchestrator.bft.pbft.ordering import MAX_EARLY
from cloudfit_orchestrator.bft.reads import ReadDesk
from cloudfit_orchestrator.bft.situation import Peer, Situation
from cloudfit_orchestrator.bft.suspicion import SLOW, Suspicion
from cloudfit_orchestrator.bft.usig import recall
from cloudfit_orchestrator.bft.usig.journal import LogCited, LogView
from cloudfit_orchestrator.bft.usig.messages import Fetch, StreamMessage, decode_peer
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.bft.usig.stream import Weighed
from cloudfit_orchestrator.model.record import Algorithm, record_hash
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.services.counter import CounterService
from tests.unit.bft.house import GROUP, House
from tests.unit.bft.test_pbft import batch, group_of, node, ordering, tell, vote

PEERS = ["r0#1", "r1#2", "r2#3", "r4#5"]


class Listener:
    """r3 of five, which hears what the test hands it, and asks for the rest."""

    def __init__(self, house: House) -> None:
        self.out = out = Outbox()
        out.replaying = False
        at = Situation(GROUP, "r3", 4, service=CounterService(), controllers=[], verifier=house.keys, out=out)
        self.ordering = at.ordering = UsigOrdering(at, out, house.record, record_hash(house.envelope))
        at.peers = {name: Peer(name, "h:1", b"") for name in PEERS}
        self.at = at
        self.catchup = CatchUp(at, out)

    def hear(self, *messages: StreamMessage) -> None:
        for message in messages:
            self.ordering.configuration.offer(message)
        self.ordering.advance()

    def asks(self, now_s: float) -> list[tuple[str, Fetch]]:
        self.out.now_s = now_s
        self.catchup.fetch()
        sent = [(effect.peer, decode_peer(effect.body)) for effect in self.out.drain() if isinstance(effect, Send)]
        return [(peer, message) for peer, message in sent if isinstance(message, Fetch)]


def test_who_cites_a_part_of_a_stream_is_asked_for_it_at_once() -> None:
    """r4 shows its VIEW-CHANGE to the leader r0 only. The others asked r4 every other time and everyone else in turn:
    some eight seconds for each view of a correct leader, and by then its time was over.
    """
    house = House(5, f=2, algorithm=Algorithm.MINBFT, window=8)
    votes = [house.view_change(who, 5) for who in ("r0", "r1", "r4")]
    view = house.new_view("r0", 5, votes)
    r3 = Listener(house)
    r3.hear(votes[0], votes[1], view)
    assert r3.ordering.configuration.streams["r0"].held, "r4's log is missing"
    asked = {peer for step in range(3) for peer, _ in r3.asks(step / 10)}
    assert "r0#1" in asked


def test_who_cites_a_proposal_is_asked_for_what_comes_before_it() -> None:
    house = House(5, f=2, window=16)
    first, second = house.prepare("r4", 0, 4), house.prepare("r4", 0, 9)
    r3 = Listener(house)
    r3.hear(house.commit("r1", second))
    asked = {peer for step in range(3) for peer, fetch in r3.asks(step / 10) if fetch.first == 1}
    assert "r1#2" in asked
    r3.hear(first)
    assert not r3.asks(5.0)


def test_a_peer_that_hands_a_stream_out_drop_by_drop_is_not_left_alone_with_it() -> None:
    """Each message renewed the patience: 17 of them took 17 seconds, though three others had them all."""
    house = House(5, f=2, algorithm=Algorithm.MINBFT, window=40)
    said = [house.prepare("r0", 0, s) for s in range(1, 31)]
    r3 = Listener(house)
    r3.at.beacons = {"r0#1": Beacon(1, len(said), 0)}
    asked: list[str] = []
    for step in range(100):
        asked += [peer for peer, _ in r3.asks(step / 10)]
        if step % 9 == 8:  # just before whoever waits gives up
            r3.hear(said[step // 9])
    assert len(set(asked)) >= 3
    assert len(asked) <= 5


def test_votes_for_the_next_window_that_overtake_the_own_certificate_are_kept() -> None:
    """Where the window is full again and again (always, with K = L = 1), whoever had the certificate last threw the
    next proposal away, and then each slot took as long as it takes until one is repeated.
    """
    group = group_of(period=1, window=1)
    r1 = ordering(group, "r1")
    digests = {}
    for s in (1, 2):
        data = batch(group, s)
        digests[s] = batch_digest(data)
        tell(group, "r1", vote(group, "r0", Phase.PRE_PREPARE, 0, s, digests[s], data))
        for name in ("r2", "r3"):
            tell(group, "r1", vote(group, name, Phase.PREPARE, 0, s, digests[s]))
    for name in ("r0", "r2"):
        tell(group, "r1", vote(group, name, Phase.COMMIT, 0, 1, digests[1]))
    assert r1.decision(1) == digests[1]
    assert (0, 2, Phase.PREPARE) not in r1.voice.said, "the window is full"
    body = LAYOUT[Kind.CHECKPOINT].pack(1, node(group, "r1").core._at.execution.digests[1])
    for name in ("r0", "r2"):
        signature = node(group, name).wormhole.sign(1, Kind.CHECKPOINT, body)
        tell(group, "r1", StatementMessage(1, name, Kind.CHECKPOINT, body, signature))
    assert (0, 2, Phase.COMMIT) in r1.voice.said


def test_early_votes_of_one_member_are_bounded_and_the_lowest_stay() -> None:
    group = group_of(period=64, window=64)
    early = [vote(group, "r2", Phase.PREPARE, 0, s, bytes(32)) for s in range(65, 129)]
    early += [vote(group, "r2", Phase.COMMIT, 0, s, bytes(32)) for s in range(65, 129)]
    tell(group, "r1", *early)
    assert list(ordering(group, "r1")._early["r2"]) == early[:MAX_EARLY]
    tell(group, "r1", vote(group, "r2", Phase.PREPARE, 0, 129, bytes(32)))
    assert max(found.s for found in ordering(group, "r1")._early["r2"]) == 128, "no more than one window ahead"


class Waiting(UsigOrdering):
    """Something is always under way; who suspects is counted."""

    may_suspect = waiting = True
    suspected = 0

    def suspect(self) -> None:
        self.suspected += 1


class Patience:
    """The progress timer of r3, whose slots take as long as the test says."""

    STEP = 0.01  # of the parameter

    def __init__(self) -> None:
        house = House(5, f=2, parameters={"progress_timeout_ms": 100})
        self.out = out = Outbox()
        out.replaying = False
        at = Situation(GROUP, "r3", 4, service=CounterService(), controllers=[], verifier=house.keys, out=out)
        self.ordering = at.ordering = Waiting(at, out, house.record, record_hash(house.envelope))
        at.installed = True
        self.suspicion = Suspicion(at, out, ClientDesk(at, out, ReadDesk(at, out)))
        self.suspicion.begin(self.ordering)
        self.parameter_s = house.record.parameters.progress_timeout_ms / 1000

    @property
    def timeout_s(self) -> float:
        return self.suspicion._timeout_s

    def wait(self, for_s: float) -> None:
        for _ in range(round(for_s / self.parameter_s / self.STEP)):
            self.out.now_s += self.STEP * self.parameter_s
            self.suspicion.tick(transferring=False)

    def stand_still(self, doublings: int) -> None:
        self.wait((2**doublings - 0.5) * self.parameter_s)
        assert self.timeout_s == 2**doublings * self.parameter_s
        self.slot(0)  # it says nothing of how long a slot takes

    def slot(self, after_s: float) -> None:
        self.wait(after_s)
        self.suspicion.progressed(self.ordering)


def test_slots_that_take_a_little_longer_than_the_parameter_change_views_rarely() -> None:
    """As in a group of the simulator with K = L = 1: 845 views for 700 slots."""
    timer = Patience()
    for _ in range(100):
        timer.slot(1.4 * timer.parameter_s)
    assert 1 <= timer.ordering.suspected <= 100 / 6


def test_a_time_out_that_has_grown_shrinks_at_once_with_quick_slots() -> None:
    timer = Patience()
    timer.stand_still(6)
    for _ in range(6):
        timer.slot(timer.parameter_s / 10)
    assert timer.timeout_s == timer.parameter_s


def test_who_proposes_as_late_as_can_be_gets_no_more_than_so_many_time_outs() -> None:
    timer = Patience()
    timer.stand_still(4)
    grown_s, began_s, suspected = timer.timeout_s, timer.out.now_s, timer.ordering.suspected
    while timer.timeout_s > timer.parameter_s:
        timer.slot(timer.timeout_s - 2 * timer.STEP * timer.parameter_s)
        assert timer.out.now_s - began_s <= SLOW * grown_s
    assert timer.ordering.suspected == suspected


def read_again(house, holder):
    """A judge who has what `holder` writes down of views and batches."""
    again = house.judge()
    again.replaying = True
    for data in holder.batches.all():
        again.batches.restore(batch_digest(data), data)
    for entry in recall.entries(holder, None):
        if isinstance(entry, LogCited):
            again.cited[entry.g] = (*again.cited.get(entry.g, ()), *entry.logs)
        if isinstance(entry, LogView):
            again.restore_view(entry.message, Weighed(frozenset(entry.batches), frozenset(entry.views)))
    again.batches.restored(4)
    return again


def test_a_view_that_a_kept_new_view_was_computed_from_is_kept_with_it():
    """As above, of what view 1 chose, which view 2 took over: all three have a checkpoint behind their words in view 1,
    and the leader of view 2 computed its NEW-VIEW from votes ahead of theirs.
    """
    house = House(3, algorithm=Algorithm.MINBFT)
    for s in (1, 2):
        house.commit("r1", house.prepare("r0", 0, s))
    for who in house.names:
        house.stable(who, 2)
    house.commit("r1", house.prepare("r0", 0, 3))
    view = house.new_view("r1", 1, [house.view_change(who, 1) for who in ("r0", "r1")])
    for who in ("r0", "r2"):
        house.commit_view(who, view)
    votes = [house.view_change(who, 2) for who in ("r0", "r2")]
    for who in house.names:
        house.stable(who, 3)
    view = house.new_view("r2", 2, votes)
    for who in ("r0", "r1"):
        house.commit_view(who, view)
    holder = house.full_judge()
    for h in (6, 7):
        for who in house.names:
            house.stable(who, h)
    house.tell(holder)
    holder.truncate(4)
    assert set(holder.new_views) == {1, 2}
    again = read_again(house, holder)
    again.truncate(4)
    assert set(again.new_views) == {1, 2}


def test_batches_that_a_kept_new_view_was_computed_from_are_kept_with_it():
    """n=3, L=2 (seed 2000711 of EBAWA, profile mixed). A leader took over slot 3 from votes that had seen a checkpoint
    before it, when it had a later one itself; the group went on to one that is less than L beyond that. Who had not
    judged the NEW-VIEW yet could neither jump over it nor have its batches from anybody any more, nor go on without it:
    with the leader faulty, all waited for good. The batch of slot 4 counts for nothing, but who lacks it cannot tell.
    """
    house = House(3, algorithm=Algorithm.MINBFT)
    for s in (1, 2):
        house.commit("r1", house.prepare("r0", 0, s))
    for who in house.names:
        house.stable(who, 2)
    house.commit("r1", house.prepare("r0", 0, 3, chosen := house.batch()))
    house.prepare("r0", 0, 4, weighed := house.batch(valid=False))
    votes = [house.view_change(who, 1) for who in ("r0", "r1")]
    house.stable("r1", 3)
    view = house.new_view("r1", 1, votes)
    for who in ("r0", "r2"):
        house.commit_view(who, view)
    holder = house.full_judge()
    house.prepare("r1", 1, 4)
    for who in ("r1", "r0", "r2"):
        house.stable(who, 6)
    house.tell(holder)
    holder.truncate(4)
    assert {d for d in (chosen, weighed) if holder.batches.data(d)} == {chosen, weighed}

    again = read_again(house, holder)
    again.truncate(4)
    assert {d for d in (chosen, weighed) if again.batches.data(d)} == {chosen, weighed}
    assert again.new_views[1].logs == holder.new_views[1].logs, "and what proves it"

    view = house.new_view("r2", 2, [house.view_change(who, 2) for who in ("r0", "r1")])
    for who in ("r0", "r1"):
        house.commit_view(who, view)
    for h in (9, 12):
        for who in house.names:
            house.stable(who, h)
    later = house.full_judge()
    later.truncate(10)
    assert not [d for d in (chosen, weighed) if later.batches.data(d)], "they go with it"
