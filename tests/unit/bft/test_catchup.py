"""Asking peers for what is missing (protocol §3 R0)."""

import pytest

from cloudfit_orchestrator.bft.catchup import CatchUp
from cloudfit_orchestrator.bft.effects import Send
from cloudfit_orchestrator.bft.messages import Beacon, FetchBatches
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import Peer, Situation
from cloudfit_orchestrator.bft.usig.messages import Fetch, decode_peer
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.model.record import record_hash
from cloudfit_orchestrator.services.counter import CounterService
from tests.unit.bft.house import GROUP, House

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
