import pytest

from cloudfit_orchestrator.model.errors import RefusedError
from cloudfit_orchestrator.recovery.budget import Condition, check_budget

S, L, X = Condition.SERVING, Condition.LOST, Condition.SUSPECTED


@pytest.mark.parametrize(
    ("replica", "states", "f", "k", "allowed"),
    [
        ("r0", [S, S, S], 1, 0, True),  # the recovering replica uses up f
        ("r0", [X, S, S], 1, 0, True),
        ("r0", [L, S, S], 1, 0, True),
        ("r0", [S, L, S], 1, 0, False),  # r1 is out already
        ("r0", [S, X, S], 1, 0, False),
        ("r0", [S, X, S, S], 1, 1, True),  # k pays for the recovery, f for r1
        ("r0", [S, X, L, S], 1, 1, False),
        ("r0", [X, L, S, S], 1, 1, True),
        ("r1", [L, L, S, S], 1, 1, True),
        ("r2", [L, L, S, S], 1, 1, False),
        ("r0", [S, X, S, S, S], 2, 0, True),
        ("r0", [S, X, X, S, S], 2, 0, False),
        ("r0", [S], 0, 0, False),
    ],
)
def test_budget(replica: str, states: list[Condition], f: int, k: int, allowed: bool) -> None:  # noqa: FBT001
    conditions = {f"r{i}": s for i, s in enumerate(states)}
    if allowed:
        budget = check_budget(replica, conditions, f=f, k=k)
        assert replica in budget.out
        assert len(budget.out) <= budget.allowed == f + k
        assert budget.live
    else:
        with pytest.raises(RefusedError, match=f"recovering {replica}"):
            check_budget(replica, conditions, f=f, k=k)


def test_unknown_replica_is_refused_by_name() -> None:
    with pytest.raises(RefusedError, match="no replica 'r7'"):
        check_budget("r7", {"r0": S}, f=1, k=0)
