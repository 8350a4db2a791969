"""See `walks`."""

import pytest

from cloudfit_orchestrator.model.record import Algorithm
from tests.unit.bft.walks import Setting, Walk

EBAWA, MINBFT = Algorithm.EBAWA, Algorithm.MINBFT
SETTINGS = {
    "n3": Setting(3, 1, ("r1",), EBAWA, 2),
    "n3 one slot": Setting(3, 1, ("r2",), EBAWA, 1),
    "n3 minbft": Setting(3, 1, ("r0",), MINBFT, 2),
    "n4": Setting(4, 1, ("r1",), EBAWA, 2),
    "n5": Setting(5, 2, ("r1", "r2"), EBAWA, 3),
    "n5 minbft": Setting(5, 2, ("r0", "r1"), MINBFT, 2),
}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SETTINGS)
def test_judges_agree_and_nothing_decided_can_be_lost(name: str, seed: int) -> None:
    walk = Walk(SETTINGS[name], seed)
    walk.run(400)
    walk.check()
