"""Quorum sizes (protocol §1): commit quorum Qc, view-change quorum Qv.

With a wormhole two quorums must share a replica, even a faulty one: `Qc + Qv > n`, `Qc >= f + 1`. Without one they must
share a correct replica: `2Q > n + f`.
"""

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


def quorums_without_wormhole(n: int, f: int, k: int) -> Quorums:
    """The row of protocol §1 for n members without a wormhole (PBFT, OSDI'99): Q = ceil((n+f+1)/2), 2f+1 of 3f+1.
    Raises BadInputError if n is too small for f and k.
    """
    if f < 0 or k < 0:
        raise BadInputError(f"f={f} and k={k} must not be negative")
    # With k recovering and f silent, n-f-k are left to answer, and they must be a quorum: n >= 3f+2k+1 (Sousa et al.,
    # TPDS'10). With fewer the group would stop during each recovery, so k would promise what does not hold.
    needed = 3 * f + 2 * k + 1
    if n < needed:
        raise BadInputError(
            f"n={n} replicas are too few for f={f}, k={k} without a wormhole: at least 3f+2k+1={needed} are needed"
        )
    quorum = (n + f) // 2 + 1
    return Quorums(quorum, quorum)
