"""What is sent at once, and what may wait: a COMMIT goes soon to whoever cannot decide without it."""

import pytest

from cloudfit_orchestrator.bft.effects import Effect, Send
from cloudfit_orchestrator.bft.usig.messages import Commit, Prepare, StreamMessage, decode_header, decode_peer
from cloudfit_orchestrator.model.record import Algorithm
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine


class Watched(Machine):
    """Remembers to whom COMMITs and PREPAREs were sent, and whether soon."""

    def _carry_out(self, effect: Effect) -> bool:
        if isinstance(effect, Send):
            message = decode_peer(effect.body)
            if isinstance(message, StreamMessage) and isinstance(decode_header(message.header), Commit | Prepare):
                self.soon[effect.peer] = effect.soon
        return super()._carry_out(effect)

    def start(self) -> None:
        self.soon: dict[str, bool] = {}
        super().start()


@pytest.mark.parametrize(("n", "f", "patient"), [(3, 1, {"r2#3"}), (5, 2, set())])
def test_a_commit_waits_where_two_votes_decide_but_not_for_its_proposer(n: int, f: int, patient: set[str]) -> None:
    house = House(n, f=f, algorithm=Algorithm.MINBFT)
    machine = Watched(house, "r1")
    machine.hear(house.prepare("r0", 0, 1), sender="r0#1")
    assert set(machine.soon) == {f"r{i}#{i + 1}" for i in range(n) if i != 1}
    assert {peer for peer, soon in machine.soon.items() if not soon} == patient


def test_a_proposal_never_waits() -> None:
    house = House(3, algorithm=Algorithm.MINBFT)
    machine = Watched(house, "r0")
    machine.core.from_client(house.client_keys[0].public, house.bundle([(1, bytes(8))]))
    machine.serve()
    assert machine.soon == {"r1#2": True, "r2#3": True}
