"""Quorum sizes (protocol §1): commit quorum Qc, view-change quorum Qv, with `Qc + Qv > n` and `Qc >= f + 1`."""

from dataclasses import dataclass

from cloudfit_orchestrator.model.errors import BadInputError


@dataclass(frozen=True, slots=True)
class Quorums:
    """`commit` replicas decide a slot; `view_change` replicas give a NEW-VIEW or the S of a reconfiguration."""

    commit: int
    view_change: int


def quorums(n: int, f: int, k: int) -> Quorums:
    """The row of protocol §1 for n members with a wormhole. Raises BadInputError if n is too small for f and k."""
    if f < 0 or k < 0:
        raise BadInputError(f"f={f} and k={k} must not be negative")
    needed = 2 * f + k + 1
    if n < needed:
        raise BadInputError(f"n={n} replicas are too few for f={f}, k={k}: at least 2f+k+1={needed} are needed")
    commit = f + 1
    if k and n >= 2 * f + 2 * k + 1:
        commit = f + k + 1
    # An even n without k, or any n above the table's rows, needs the larger view-change quorum: Qc + Qv > n.
    return Quorums(commit, max(f + 1, n - commit + 1))
