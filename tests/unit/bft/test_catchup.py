"""Asking peers for what is missing (protocol §3 R0)."""

import pytest

from cloudfit_orchestrator.bft.catchup import CatchUp
from cloudfit_orchestrator.bft.effects import Send
from cloudfit_orchestrator.bft.messages import MAX_FETCH, Beacon, FetchBatches, Forward
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import Peer, Situation
from cloudfit_orchestrator.bft.usig.messages import Fetch, decode_peer
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.model.record import Algorithm, record_hash
from cloudfit_orchestrator.services.counter import CounterService
from tests.conformance.properties import new_group
from tests.unit.bft.house import GROUP, House
from tests.unit.bft.machine import Machine

PEERS = ["r0#1", "r1#2", "r2#3", "r1#9"]


@pytest.mark.parametrize("peers", [PEERS[:2], PEERS[:3], PEERS])
@pytest.mark.parametrize("period_s", [0.02, 0.04, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0])
def test_no_rhythm_of_ticks_makes_one_silent_peer_be_asked_for_ever(period_s: float, peers: list[str]) -> None:
    house = House(3)
    out = Outbox()
    at = Situation(GROUP, "r1", 7, service=CounterService(), controllers=[], verifier=house.keys, out=out)
    at.ordering = UsigOrdering(at, out, house.record, record_hash(house.envelope))
    at.ordering.want_batch(b"d" * 32)
    at.peers = {name: Peer(name, "h:1", b"") for name in peers}
    at.beacons = {"r1#2": Beacon(1, 10, 3)}
    out.replaying = False
    catchup = CatchUp(at, out)
    asked: dict[type, list[str]] = {Fetch: [], FetchBatches: []}
    for tick in range(int(20 / period_s)):
        out.now_s = tick * period_s
        catchup.fetch()
        for effect in out.drain():
            assert isinstance(effect, Send)
            asked[type(decode_peer(effect.body))].append(effect.peer)
    for found in asked.values():
        assert set(found) == set(peers)
        assert len(found) <= 21, "what is under way is not asked for again"


@pytest.mark.parametrize("count", [2 * MAX_FETCH, 3 * MAX_FETCH, 3 * MAX_FETCH + 1])
@pytest.mark.parametrize("peers", [PEERS[:2], PEERS[:3]])
def test_each_of_many_batches_is_asked_for_at_every_peer(count: int, peers: list[str]) -> None:
    """With two questions' worth of them and two peers the first half was asked of the one, the rest of the other."""
    house = House(3)
    out = Outbox()
    at = Situation(GROUP, "r1", 7, service=CounterService(), controllers=[], verifier=house.keys, out=out)
    at.ordering = UsigOrdering(at, out, house.record, record_hash(house.envelope))
    at.peers = {name: Peer(name, "h:1", b"") for name in peers}
    out.replaying = False
    catchup = CatchUp(at, out)
    names = {i.to_bytes(32, "big") for i in range(count)}
    for name in names:
        at.ordering.want_batch(name)
    asked: dict[str, set[bytes]] = {peer: set() for peer in peers}
    for tick in range(4 * len(peers)):
        out.now_s = 2.0 * tick
        catchup.fetch()
        for effect in out.drain():
            assert isinstance(effect, Send)
            message = decode_peer(effect.body)
            assert isinstance(message, FetchBatches)
            assert len(message.digests) <= MAX_FETCH
            asked[effect.peer].update(message.digests)
    assert all(found == names for found in asked.values())


def test_who_has_no_slot_left_in_its_window_tells_the_idle_proposer_of_the_open_one() -> None:
    """Slot 1 is r1's, r0's next is 3, beyond h'+L: without a FORWARD the time-out would blame r1, which is correct."""
    house = House(3, algorithm=Algorithm.EBAWA, period=1, window=1, parameters={"progress_timeout_ms": 1000})
    machine = Machine(house, "r0")
    machine.client(house.bundle([(1, bytes(8))]))
    assert not [message for _, message in machine.sent if isinstance(message, Forward)], "the window may move soon"
    machine.ticks(0.5)
    assert [peer for peer, message in machine.sent if isinstance(message, Forward)] == ["r1#2"]


def test_who_does_not_propose_hands_a_bundle_on_in_the_same_turn() -> None:
    """Over distances a client's near replica is mostly not the leader: until the next tick, up to 50 ms were lost."""
    machine = Machine(House(3, algorithm=Algorithm.MINBFT, period=8, window=16), "r1")
    machine.client(machine.house.bundle([(1, bytes(8))]))
    assert [peer for peer, message in machine.sent if isinstance(message, Forward)] == ["r0#1"]
    machine.ticks(0.5)
    machine.client(machine.house.bundle([(1, bytes(8))]))
    assert [peer for peer, message in machine.sent if isinstance(message, Forward)] == ["r0#1"], "once is enough"


def test_who_proposes_keeps_its_bundles() -> None:
    machine = Machine(House(3, algorithm=Algorithm.EBAWA, period=8, window=16), "r1")
    machine.client(machine.house.bundle([(1, bytes(8))]))
    machine.ticks(0.5)
    assert not [message for _, message in machine.sent if isinstance(message, Forward)]


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("near", ["r0", "r1", "r2"])
def test_no_time_need_pass_until_a_request_is_answered_whichever_member_has_it(near: str, algorithm: Algorithm) -> None:
    group = new_group(algorithm)
    group.submit(near)
    group.deliver_all()
    assert sum(bool(node.decided) for node in group.correct) > group.f
