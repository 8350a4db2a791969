"""The fault budget: how many replicas of a configuration may be out at once (protocol §1).

Bad is not the same as unknown: both count as out, but only `SUSPECTED` says that the replica may be lying.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cloudfit_orchestrator.model.errors import RefusedError


class Condition(StrEnum):
    """What is known of a member before a recovery begins."""

    SERVING = "serving"
    LOST = "lost"  # machine not found, or its cloud does not answer
    SUSPECTED = "suspected"  # verification failed, or an operator says so


@dataclass(frozen=True, slots=True)
class Budget:
    """The verdict: `out` replicas would be out during the recovery, `allowed` may be."""

    out: tuple[str, ...]
    allowed: int
    live: bool  # the group goes on deciding slots meanwhile


def check_budget(replica: str, conditions: Mapping[str, Condition], *, f: int, k: int) -> Budget:
    """May `replica` be recovered now? Raises RefusedError if that would leave the others fewer than the group needs.

    `conditions` has all members. Without k the recovering replica uses up one of f; with k it does not, up to k.
    What keeps the record from becoming ACTIVE: it needs f+k+1 confirmations, the wedge Qv votes; n - out must do.
    """
    if replica not in conditions:
        raise RefusedError(f"there is no replica {replica!r}; the group has {', '.join(conditions)}")
    faulty = [r for r, condition in conditions.items() if condition is not Condition.SERVING]
    out = tuple(sorted({*faulty, replica}))
    allowed = f + k
    others = len(set(faulty) - {replica})
    if len(out) > allowed or others > f:
        names = ", ".join(out)
        raise RefusedError(
            f"recovering {replica} would leave {len(out)} of {len(conditions)} replicas out ({names}); "
            f"f={f}, k={k} allow {allowed}",
            next_command="recover the others first, or bring their clouds back",
        )
    return Budget(out, allowed, live=len(conditions) - len(out) >= f + 1)
