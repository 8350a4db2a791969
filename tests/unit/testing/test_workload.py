"""The simulated clients' own waiting, which the bound of liveness allows for."""

import random

import pytest

from cloudfit_orchestrator.testing.workload import BUNDLE_SIZES, RETRY_S, RETRY_SPREAD, waiting_s


@pytest.mark.parametrize(("faulty", "n"), [(0, 5), (1, 5), (2, 5), (1, 3)])
def test_the_bound_covers_the_retries_of_a_client_and_little_more(faulty: int, n: int) -> None:
    rng = random.Random(f"{faulty} of {n}")
    operations, waited_s, runs = 480, [], 50
    for _ in range(runs):
        left, total_s = operations, 0.0
        while left > 0:
            left -= rng.choice(BUNDLE_SIZES)
            if rng.randrange(n) < faulty:  # it asked one that does not answer
                total_s += RETRY_S * rng.uniform(1 - RETRY_SPREAD, 1 + RETRY_SPREAD)
        waited_s.append(total_s)
    bound_s = waiting_s(operations, faulty / n)
    assert sum(waited_s) / runs <= bound_s <= 1.5 * sum(waited_s) / runs
