"""EBAWA's merge (protocol §5, HASE'10): from Qv logs to S, h*, s_max, blacklist' and retired'. Pure.

A *vote* is what a VIEW-CHANGE or a wedge contributes: the state of its sender's stream before it, and the proposals in
its log. The log is the sender's stream from any permitted anchor: an anchor's slot is at most h-L, so by R2 what comes
before it concerns slots up to h only, and every judge gets the same merge whichever anchor it holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudfit_orchestrator.bft.messages import NOOP, Named, Value
from cloudfit_orchestrator.bft.usig.judge import StreamState, proposers
from cloudfit_orchestrator.bft.usig.messages import Choice, Commit, CommitNewView, NewView, Prepare, Skip, StreamMessage
from cloudfit_orchestrator.bft.usig.stream import Kept
from cloudfit_orchestrator.model.record import Algorithm, ConfigRecord


class Proposal(Value, frozen=True):
    """A PREPARE or SKIP for slot s of view g, at counter `cv` of `proposer`'s stream."""

    g: int
    s: int
    proposer: str
    cv: int
    batch: bytes  # digest, or NOOP


@dataclass(frozen=True, slots=True)
class Vote:
    """What one VIEW-CHANGE or wedge says."""

    name: Named
    state: StreamState  # of the stream before the message
    proposals: tuple[Proposal, ...]
    views: tuple[tuple[int, int], ...]  # (g, s_max) of the NEW-VIEWs that the log holds or commits to
    retires: tuple[str, ...]  # replicas with a valid RETIRE order
    log: tuple[StreamMessage, ...]  # what it was read off, itself at the end, for those who have only what comes later


@dataclass(frozen=True, slots=True)
class Merged:
    """The outcome: S for (h, s_max], and who proposes no more."""

    h: int
    s_max: int
    choices: tuple[Choice, ...]
    blacklist: tuple[str, ...]
    retired: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """What must be fetched before the merge can be told: batches by digest, NEW-VIEWs by view, streams to counters."""

    batches: tuple[bytes, ...] = ()
    views: tuple[int, ...] = ()
    streams: tuple[tuple[str, int], ...] = ()


class Lookup(Protocol):
    """What the merge asks of the holder of the streams."""

    def batch_valid(self, digest: bytes) -> bool | None:
        """valid(batch); None if the batch is not held."""
        ...

    def stands(self, replica: str, cv: int) -> bool | None:
        """See `judge.Evidence.stands`."""
        ...

    def new_view(self, g: int) -> tuple[NewView, Sequence[Choice]] | None:
        """The NEW-VIEW of view g that stands, with its S; None if it is not held."""
        ...


def slots_of(header: Prepare | Skip, record: ConfigRecord, state: StreamState, proposer: str) -> Iterable[int]:
    """The slots that a standing PREPARE or SKIP of `proposer` is for; `state`: its stream's, in the header's view."""
    if isinstance(header, Prepare):
        return (header.s,)
    turn = proposers(record, header.g, state.blacklist, state.retired)
    return tuple(s for s in range(header.s1, header.s2 + 1) if turn[s % len(turn)] == proposer)


def vote_of(
    record: ConfigRecord,
    name: Named,
    state: StreamState,
    kept: Iterable[Kept],
    *,
    message: StreamMessage | None = None,
    retires: tuple[str, ...] = (),
) -> Vote:
    """Read a vote off the kept part of a stream, up to the message `name` (None if EPOCH-END stands in its place).
    Each proposal is taken once, for slots that a merge may look at: a faulty member may vote for a wide SKIP 2L times.
    """
    proposals: list[Proposal] = []
    views: list[tuple[int, int]] = []
    log: list[StreamMessage] = []
    taken: set[tuple[str, int]] = set()  # (proposer, cv)

    def take(header: Prepare | Skip, of: StreamState, proposer: str, cv: int) -> None:
        if (proposer, cv) not in taken:
            taken.add((proposer, cv))
            proposals.extend(p for p in _proposals(record, header, of, proposer, cv) if p.s > state.h)

    for item in kept:
        log.append(item.message)
        match item.header:
            case Prepare() | Skip():
                take(item.header, item.state, item.message.replica, item.message.cv)
            case Commit():
                for entry in item.entries:
                    take(entry.header, item.state, entry.proposer, entry.cv)
            case NewView() | CommitNewView():
                views.append((item.header.g, item.state.p))
            case _:
                pass
    return Vote(
        name, state, tuple(proposals), tuple(views), retires, tuple(log) if message is None else (*log, message)
    )


def _proposals(
    record: ConfigRecord, header: Prepare | Skip, state: StreamState, proposer: str, cv: int
) -> Iterator[Proposal]:
    # The voter had entered the proposal's view (R1), so its state knows who proposes in it.
    if isinstance(header, Skip) and header.s2 - header.s1 > 2 * record.parameters.window:
        return  # cannot stand (form); bounds the work
    batch = header.batch if isinstance(header, Prepare) else NOOP
    for s in slots_of(header, record, state, proposer):
        yield Proposal(header.g, s, proposer, cv, batch)


def merge(record: ConfigRecord, votes: Sequence[Vote], lookup: Lookup) -> Merged | Missing:
    """S and its company from `votes` of at least Qv distinct members, by §5.3 and §5.4."""
    h = max(vote.state.h for vote in votes)
    work = _Work(record, lookup, h)
    for vote in votes:
        for g, s_max in vote.views:
            work.add_view(g, s_max)
        for proposal in vote.proposals:
            work.add(proposal)
    s_max = max((s for s in work.candidates if work.chosen(s) is not None), default=h)
    choices = [work.chosen(s) or Choice(s, 0, NOOP) for s in range(h + 1, s_max + 1)]
    top = max((vote.state for vote in votes), key=lambda state: state.e)
    blacklist = work.blacklist(top) if record.algorithm != Algorithm.MINBFT else ()
    retired = tuple(sorted(set(top.retired).union(*(vote.retires for vote in votes))))
    if work.batches or work.views or work.streams:
        return work.missing
    return Merged(h, s_max, tuple(choices), blacklist, retired)


def quorums(record: ConfigRecord, votes: Sequence[Vote], lookup: Lookup) -> tuple[list[tuple[Vote, ...]], Missing]:
    """Sets of Qv of these votes whose merge misses nothing, and what the votes miss. One set at most for each h* that
    there can be, the highest first: whoever tries them all, with each message that comes in, does little (of 13 votes
    there are 1,716 sets of 7). All correct members' votes are in one of them in the end: they have what they voted for.
    """
    work = _Work(record, lookup, 0)
    told = [(work.told_from(vote), vote) for vote in votes]
    found: list[tuple[Vote, ...]] = []
    for h in sorted({vote.state.h for vote in votes}, reverse=True):
        ready = [vote for least, vote in told if least <= h]
        top = next((vote for vote in ready if vote.state.h == h), None)
        if top is not None and len(ready) >= record.quorums.view_change:
            others = [vote for vote in ready if vote is not top][: record.quorums.view_change - 1]
            found.append(tuple(vote for vote in ready if vote is top or vote in others))
    return found, work.missing


class _Work:
    """Candidates by slot and view; collects what is missing instead of guessing."""

    def __init__(self, record: ConfigRecord, lookup: Lookup, h: int) -> None:
        self._record = record
        self._lookup = lookup
        self._h = h
        self._ends = {0: record.h}  # s_max of views
        self.candidates: dict[int, dict[int, list[Proposal | Choice]]] = {}
        self.batches: set[bytes] = set()
        self.views: set[int] = set()
        self.streams: set[tuple[str, int]] = set()

    @property
    def missing(self) -> Missing:
        return Missing(tuple(sorted(self.batches)), tuple(sorted(self.views)), tuple(sorted(self.streams)))

    def told_from(self, vote: Vote) -> int:
        """The least h* with which nothing of that vote is missing."""
        least = vote.state.h
        for g, s_max in vote.views:
            if s_max > least and self._lookup.new_view(g) is None:
                self.views.add(g)
                least = s_max
        for proposal in vote.proposals:
            if proposal.s > vote.state.h and self._verdict(proposal) is None:
                least = max(least, proposal.s)
        return least

    def add(self, proposal: Proposal) -> None:
        if proposal.s > self._h:
            self.candidates.setdefault(proposal.s, {}).setdefault(proposal.g, []).append(proposal)

    def add_view(self, g: int, s_max: int) -> None:
        self._ends[g] = s_max
        if s_max <= self._h:
            return
        found = self._lookup.new_view(g)
        if found is None:
            self.views.add(g)
            return
        for choice in found[1]:
            if choice.s > self._h:
                self.candidates.setdefault(choice.s, {}).setdefault(g, []).append(choice)

    def chosen(self, s: int) -> Choice | None:
        """The eligible proposal of the highest view for slot s, or None."""
        views = self.candidates.get(s, {})
        for g in sorted(views, reverse=True):
            for candidate in views[g]:
                if self._eligible(candidate):
                    return Choice(s, g, candidate.batch)
        return None

    def _eligible(self, candidate: Proposal | Choice) -> bool:
        return isinstance(candidate, Choice) or bool(self._verdict(candidate))  # a NEW-VIEW's stands

    def _verdict(self, candidate: Proposal) -> bool | None:
        """Whether it is eligible; None if that cannot be told."""
        stands = self._lookup.stands(candidate.proposer, candidate.cv)
        if stands is None:
            self.streams.add((candidate.proposer, candidate.cv))
        if not stands:
            return stands
        if candidate.batch == NOOP:
            return True
        valid = self._lookup.batch_valid(candidate.batch)
        if valid is None:
            self.batches.add(candidate.batch)
        return valid

    def blacklist(self, top: StreamState) -> tuple[str, ...]:
        """The blacklist of the highest view entered, plus the proposer of its lowest slot without a proposal."""
        s = max(self._h, self._ends.get(top.e, 0)) + 1  # entered ahead of all logs here: then s_max(e) <= h*, see above
        while any(self._eligible(x) for x in self.candidates.get(s, {}).get(top.e, ())):
            s += 1
        turn = proposers(self._record, top.e, top.blacklist, top.retired)
        culprit = turn[s % len(turn)]
        kept = tuple(r for r in top.blacklist if r != culprit)
        return (*kept, culprit)[-self._record.f :] if self._record.f else ()
