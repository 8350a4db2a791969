"""Votes in COMMITs (protocol §3): each carries the proposal that it is for, and counts once that proposal stands."""

from collections.abc import Callable

from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.usig.judge import StreamState
from cloudfit_orchestrator.bft.usig.merge import Proposal, slots_of
from cloudfit_orchestrator.bft.usig.messages import Commit, Header, Prepare, Skip, StreamMessage, decode_header
from cloudfit_orchestrator.bft.usig.slots import Slots
from cloudfit_orchestrator.bft.usig.stream import Citation, Stream, Waiting
from cloudfit_orchestrator.bft.usig.wanted import Wanted
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord


class Citations:
    """Reads COMMITs, and holds votes for proposals that their proposers' streams have not been read to yet."""

    def __init__(
        self,
        record: ConfigRecord,
        *,
        streams: dict[str, Stream],
        slots: Slots,
        wanted: Wanted,
        genuine: Callable[[StreamMessage], bool],
        name: Callable[[bytes, int], None],
    ) -> None:
        """`genuine` tells whether a message's UI is its sender's; `name` hears of batches that proposals name."""
        self._record = record
        self._streams = streams
        self._slots = slots
        self._wanted = wanted
        self._genuine = genuine
        self._name = name
        self._waiting: dict[tuple[str, int], list[tuple[str, Citation, StreamState]]] = {}

    def __len__(self) -> int:
        """Votes that wait."""
        return sum(len(waiting) for waiting in self._waiting.values())

    def read(self, header: Commit) -> tuple[Citation, ...]:
        """The entries of a COMMIT that are what they claim; proposals that they carry are offered to their streams."""
        found: dict[tuple[str, int], Citation] = {}
        for entry in header.entries:
            stream = self._streams.get(entry.proposer)
            if stream is None:
                continue
            kept = stream.kept.get(entry.cv)
            message = StreamMessage(self._record.c, entry.proposer, entry.cv, entry.header, b"", entry.certificate)
            if kept is not None and kept.message == message:
                carried: Header = kept.header
            else:  # an entry is judged by itself, not by what is held: its UI must be the proposer's
                if not self._genuine(message):
                    continue
                try:
                    carried = decode_header(entry.header)
                except BadError:
                    continue
                if stream.wants(entry.cv):
                    stream.wait(Waiting(message, carried, message.digest))
            if not isinstance(carried, Prepare | Skip) or carried.g != header.g or carried.c != header.c:
                continue
            ends = (carried.s, carried.s) if isinstance(carried, Prepare) else (carried.s1, carried.s2)
            if ends == (entry.s1, entry.s2):
                found[(entry.proposer, entry.cv)] = Citation(entry.proposer, entry.cv, carried)
        return tuple(found.values())

    def cite(self, voter: str, citation: Citation, state: StreamState) -> None:
        """`voter`'s stream, in `state`, votes for the cited proposal."""
        stream = self._streams[citation.proposer]
        stands = stream.stands(citation.cv)
        if stands:
            self._vote(voter, citation, state)
        elif stands is None:  # however far ahead: f faulty members can see to it that no checkpoint covers its slot
            self._waiting.setdefault((citation.proposer, citation.cv), []).append((voter, citation, state))
            self._wanted.stream(citation.proposer, citation.cv, voter)

    def _vote(self, voter: str, citation: Citation, state: StreamState) -> None:
        """The proposal stands; so it is its proposer's vote, too, also where the cursor has jumped over it. `state` is
        the voter's: it was in the proposal's view, and so knows whose turn each slot is.
        """
        header = citation.header
        batch = header.batch if isinstance(header, Prepare) else NOOP
        jumped_over = citation.cv not in self._streams[citation.proposer].kept
        for s in slots_of(header, self._record, state, citation.proposer):
            proposal = Proposal(header.g, s, citation.proposer, citation.cv, batch)
            if jumped_over:
                self._slots.propose(proposal)
                self._name(batch, s)
            self._slots.vote(proposal, voter)

    def resolve(self, proposer: str, cv: int) -> None:
        """Message `cv` of that stream stands: votes for it count."""
        for voter, citation, state in self._waiting.pop((proposer, cv), ()):
            self._vote(voter, citation, state)

    def settle(self) -> None:
        """Count votes for what was jumped over, let go of those for what is behind its stream's end; want the rest."""
        for proposer, cv in list(self._waiting):
            stands = self._streams[proposer].stands(cv)
            if stands:
                self.resolve(proposer, cv)
            elif stands is False:
                del self._waiting[(proposer, cv)]
            else:
                for voter, _, _ in self._waiting[(proposer, cv)]:
                    self._wanted.stream(proposer, cv, voter)

    def forget(self, floor: int) -> None:
        """Votes for slots up to `floor` decide nothing any more."""
        for place, waiting in list(self._waiting.items()):
            header = waiting[0][1].header
            if (header.s if isinstance(header, Prepare) else header.s2) <= floor:
                del self._waiting[place]
