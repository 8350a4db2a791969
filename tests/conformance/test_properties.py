"""Every property, over every engine."""

import pytest

from cloudfit_orchestrator.bft import engines
from tests.conformance.properties import PROPERTIES

ENGINES = ["ebawa", "minbft", "pbft", "elsewhere"]


def test_all_registered_engines_are_looked_at() -> None:
    assert engines.algorithms() == sorted(ENGINES)


@pytest.mark.parametrize("algorithm", ENGINES)
@pytest.mark.parametrize("name", PROPERTIES)
def test_engine_has(name: str, algorithm: str) -> None:
    PROPERTIES[name](algorithm)
