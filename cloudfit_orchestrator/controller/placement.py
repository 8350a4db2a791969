"""How many replicas, and which cloud each gets. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass

from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm


@dataclass(frozen=True, slots=True)
class Placed:
    """(replica, cloud) of each replica, and what that does not tolerate, in words."""

    placement: tuple[tuple[str, str], ...]
    not_tolerated: tuple[str, ...]


def place(n: int, f: int, clouds: list[str], limit: int) -> Placed:
    """Round robin over `clouds`, at most `limit` on each; also what the placement does not tolerate, in words."""
    placement = tuple((f"r{i}", clouds[i % len(clouds)]) for i in range(n))
    for cloud in clouds:
        here = sum(1 for _, c in placement if c == cloud)
        if here > limit:
            raise BadInputError(f"{here} replicas on cloud {cloud!r}, at most {limit} are allowed")
    return Placed(placement, losses(placement, f, clouds))


def losses(placement: tuple[tuple[str, str], ...], f: int, clouds: Iterable[str]) -> tuple[str, ...]:
    """What that placement does not tolerate, in words."""
    counts = [(cloud, sum(1 for _, c in placement if c == cloud)) for cloud in clouds]
    return tuple(
        f"the loss of cloud {c!r}: it holds {here} replicas, more than f={f}" for c, here in counts if here > f
    )


def members_needed(algorithm: str, f: int, k: int) -> int:
    """The fewest replicas for f and k (protocol §1)."""
    return 3 * f + 2 * k + 1 if algorithm == Algorithm.PBFT else 2 * f + k + 1
