"""Votes for slots and what they decide (protocol §3): Qc distinct members for the same (g, s, cv_p, D)."""

from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.ordering import AgreementError
from cloudfit_orchestrator.bft.usig.merge import Proposal
from cloudfit_orchestrator.bft.usig.messages import Choice

MAX_VIEWS = 64  # whose votes are counted: a group that changes views on and on needs the newest


@dataclass(slots=True)
class _Slot:
    proposals: dict[int, Proposal] = field(default_factory=dict)  # by view: at most one stands
    voters: dict[int, set[str]] = field(default_factory=dict)  # by view
    decided: bytes | None = None


class Slots:
    """Slots above `floor`; bounded by the senders' windows (R2)."""

    def __init__(self, floor: int, commit_quorum: int) -> None:
        """`floor`: slots up to it are settled."""
        self.floor = floor
        self._quorum = commit_quorum
        self._slots: dict[int, _Slot] = {}
        self._views: dict[int, set[str]] = {}
        self._tops: dict[int, int] = {}  # by view: the highest slot with a proposal
        self.highest = floor  # highest slot with a proposal
        self.highest_decided = floor

    def propose(self, proposal: Proposal) -> None:
        """A PREPARE or SKIP stands; it is its proposer's vote."""
        if proposal.s <= self.floor:
            return
        self._slot(proposal.s).proposals[proposal.g] = proposal
        self._tops[proposal.g] = max(proposal.s, self._tops.get(proposal.g, 0))
        self.highest = max(self.highest, proposal.s)
        self.vote(proposal, proposal.proposer)

    def vote(self, proposal: Proposal, voter: str) -> None:
        """`voter`'s stream votes for a proposal that stands."""
        if proposal.s <= self.floor:
            return
        voters = self._slot(proposal.s).voters.setdefault(proposal.g, set())
        voters.add(voter)
        if len(voters) >= self._quorum:
            self.decide(proposal.s, proposal.batch)

    def vote_view(self, g: int, voter: str, choices: tuple[Choice, ...]) -> None:
        """NEW-VIEW(g) or COMMIT(NEW-VIEW) of it: one vote for all slots of S."""
        if g not in self._views and len(self._views) >= MAX_VIEWS:
            del self._views[min(self._views)]
        voters = self._views.setdefault(g, set())
        voters.add(voter)
        if len(voters) >= self._quorum:
            for choice in choices:
                self.decide(choice.s, choice.batch)

    def decide(self, s: int, batch: bytes) -> None:
        """Slot s is decided for good. Raises AgreementError if it was decided otherwise."""
        if s <= self.floor:
            return
        slot = self._slot(s)
        if slot.decided is not None and slot.decided != batch:
            raise AgreementError(f"slot {s} decided as {slot.decided.hex()[:16]} and as {batch.hex()[:16]}")
        slot.decided = batch
        self.highest_decided = max(self.highest_decided, s)

    def _slot(self, s: int) -> _Slot:
        slot = self._slots.get(s)
        if slot is None:
            slot = self._slots[s] = _Slot()
        return slot

    def decision(self, s: int) -> bytes | None:
        """The digest decided for slot s, or None."""
        slot = self._slots.get(s)
        return slot.decided if slot else None

    def top(self, g: int) -> int:
        """The highest slot above the floor with a standing proposal of view g; 0 if there is none."""
        top = self._tops.get(g, 0)
        return top if top > self.floor else 0

    def first_open(self, g: int) -> int:
        """The lowest slot above the floor that is not decided and has no standing proposal of view g."""
        s = self.floor + 1
        while (slot := self._slots.get(s)) is not None and (slot.decided is not None or g in slot.proposals):
            s += 1
        return s

    def decisions(self) -> list[tuple[int, bytes]]:
        """All decided slots above the floor, in order."""
        return [(s, slot.decided) for s, slot in sorted(self._slots.items()) if slot.decided is not None]

    def settle(self, floor: int) -> None:
        """Slots up to `floor` are executed or covered by a checkpoint: forget them."""
        if floor - self.floor < len(self._slots):
            for s in range(self.floor + 1, floor + 1):
                self._slots.pop(s, None)
        else:
            self._slots = {s: slot for s, slot in self._slots.items() if s > floor}
        if len(self._tops) > 1:
            self._tops = {g: top for g, top in self._tops.items() if top > floor}
        self.floor = max(self.floor, floor)
        self.highest = max(self.highest, self.floor)
        self.highest_decided = max(self.highest_decided, self.floor)
