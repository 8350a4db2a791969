"""Seeded simulations of PBFT groups: 3f+1 replicas, and adversaries that say two things."""

import pytest

from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.testing import behaviours
from cloudfit_orchestrator.testing.profiles import DRAWN, MIXED, PROFILES
from cloudfit_orchestrator.testing.simulator import simulate

LIGHT = {"operations": 6, "trouble_s": 6.0}


@pytest.mark.parametrize("profile", sorted(PROFILES.keys() - set(DRAWN)))
def test_a_group_of_four_keeps_its_promises_under(profile: str) -> None:
    report = simulate(1, 4, Algorithm.PBFT, profile, changes=LIGHT)
    assert report.ok, f"{report}\n" + "\n".join(report.trace)
    assert report.answered > 18


@pytest.mark.parametrize("attack", sorted(behaviours.WITHOUT_WORMHOLE))
def test_one_of_four_may(attack: str) -> None:
    for seed in (1, 2):
        report = simulate(seed, 4, Algorithm.PBFT, "byzantine", changes={**LIGHT, "attacks": attack})
        assert report.ok, f"{report}\n" + "\n".join(report.trace)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_of_seven_may_be_faulty(seed: int) -> None:
    report = simulate(seed, 7, Algorithm.PBFT, "chaos", changes=LIGHT)
    assert report.ok, f"{report}\n" + "\n".join(report.trace)


def test_a_group_with_one_more_pair_goes_on_while_one_recovers() -> None:
    report = simulate(1, 6, Algorithm.PBFT, MIXED, changes={"operations": 4})  # f=1, k=1
    assert report.ok, f"{report}\n" + "\n".join(report.trace)


def test_an_equivocation_is_seen() -> None:
    report = simulate(1, 4, Algorithm.PBFT, "byzantine", changes={**LIGHT, "attacks": "votes-twice"})
    assert report.happened["attack:votes-twice"]
    assert report.happened["rule:blamed for equivocation"]
