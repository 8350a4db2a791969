"""Votes of one view and the certificates that they make (§4.2 of the paper)."""

from dataclasses import dataclass, field
from enum import Enum

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.messages import Signed
from cloudfit_orchestrator.bft.pbft.messages import Decided, Phase, Prepared, Vote
from cloudfit_orchestrator.model.record import ConfigRecord


class Added(Enum):
    """What became of a vote."""

    NEW = "new"
    KNOWN = "known"
    CONFLICT = "conflict"  # its sender has signed two: it is faulty, and the first one counts


@dataclass(slots=True)
class _Slot:
    votes: dict[Phase, dict[str, Vote]] = field(default_factory=lambda: {phase: {} for phase in Phase})


def leader(record: ConfigRecord, g: int) -> str:
    """The primary of view g: members(c)[g mod n]."""
    return record.members[g % record.n].replica


def bare(vote: Vote) -> Vote:
    """The vote without its batch, as it is kept."""
    return Vote(vote.c, vote.replica, vote.phase, vote.g, vote.s, vote.digest, vote.signature) if vote.batch else vote


def with_own_batch(vote: Vote, max_bytes: int) -> Vote:
    """The vote, with its batch if it has one: nobody signs that, whoever hands a vote on may put anything there."""
    own = vote.phase == Phase.PRE_PREPARE and len(vote.batch) <= max_bytes and batch_digest(vote.batch) == vote.digest
    return vote if own else bare(vote)


class Book:
    """Verified votes of view `g`: one a member, phase and slot. Who adds keeps to the window, so it is bounded."""

    def __init__(self, record: ConfigRecord) -> None:
        self._record = record
        self._quorum = record.quorums.commit
        self._slots: dict[int, _Slot] = {}
        self.g = 0
        self.open: dict[int, None] = {}  # slots with a proposal, until the caller takes them out

    def enter(self, g: int) -> None:
        """Another view: its votes begin anew."""
        self.g = g
        self._slots.clear()
        self.open.clear()

    def add(self, vote: Vote) -> Added:
        """Count a vote of this view."""
        votes = self._slots.setdefault(vote.s, _Slot()).votes[Phase(vote.phase)]
        known = votes.get(vote.replica)
        if known is not None:
            return Added.KNOWN if known.digest == vote.digest else Added.CONFLICT
        votes[vote.replica] = vote
        if vote.phase == Phase.PRE_PREPARE:
            self.open[vote.s] = None
        return Added.NEW

    def has(self, vote: Vote) -> bool:
        """Whether this very vote is counted already."""
        slot = self._slots.get(vote.s)
        known = slot.votes[Phase(vote.phase)].get(vote.replica) if slot is not None else None
        return known is not None and known.digest == vote.digest

    def proposal(self, s: int) -> bytes | None:
        """The digest that the leader has proposed for s, or None."""
        slot = self._slots.get(s)
        if slot is None:
            return None
        return next((vote.digest for vote in slot.votes[Phase.PRE_PREPARE].values()), None)

    def proposals(self) -> list[tuple[int, bytes]]:
        """(slot, digest) of all proposals, in slot order."""
        found = ((s, self.proposal(s)) for s in sorted(self._slots))
        return [(s, digest) for s, digest in found if digest is not None]

    def prepared(self, s: int) -> Prepared | None:
        """The certificate, if slot s is prepared: the proposal and Q-1 PREPAREs of others for its digest."""
        digest, slot = self.proposal(s), self._slots.get(s)
        if digest is None or slot is None:
            return None
        prepares = _matching(slot.votes[Phase.PREPARE], digest, self._quorum - 1)
        if prepares is None:
            return None
        (proposal,) = slot.votes[Phase.PRE_PREPARE].values()
        return Prepared(s, self.g, digest, proposal.signature, prepares)

    def committed(self, s: int, digest: bytes) -> Decided | None:
        """The certificate, if Q members have committed to that digest in this view."""
        slot = self._slots.get(s)
        commits = _matching(slot.votes[Phase.COMMIT], digest, self._quorum) if slot is not None else None
        return Decided(self._record.c, self.g, s, digest, commits) if commits is not None else None

    def votes(self, s: int) -> list[Vote]:
        """All votes for slot s, for who asks."""
        slot = self._slots.get(s)
        return [vote for votes in slot.votes.values() for vote in votes.values()] if slot is not None else []

    def forget(self, floor: int) -> None:
        """Slots up to `floor` are under the low-water mark."""
        for s in [s for s in self._slots if s <= floor]:
            del self._slots[s]
            self.open.pop(s, None)


def _matching(votes: dict[str, Vote], digest: bytes, needed: int) -> tuple[Signed, ...] | None:
    """Exactly so many signatures on that digest, in order of names; None if there are fewer."""
    same = [Signed(replica, vote.signature) for replica, vote in sorted(votes.items()) if vote.digest == digest]
    return tuple(same[:needed]) if len(same) >= needed else None
