"""Votes in COMMITs (protocol §3): each carries the proposal that it is for, and counts once that proposal stands."""

from collections.abc import Callable

from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.usig.merge import Proposal, slots_of
from cloudfit_orchestrator.bft.usig.messages import Commit, Header, Prepare, Skip, StreamMessage, decode_header
from cloudfit_orchestrator.bft.usig.slots import Slots
from cloudfit_orchestrator.bft.usig.stream import MAX_AHEAD, Citation, Stream, Waiting
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
    ) -> None:
        """`genuine` tells whether a message's UI is its sender's."""
        self._record = record
        self._streams = streams
        self._slots = slots
        self._wanted = wanted
        self._genuine = genuine
        self._waiting: dict[tuple[str, int], list[tuple[str, Citation]]] = {}

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

    def cite(self, voter: str, citation: Citation) -> None:
        """`voter`'s stream votes for the cited proposal."""
        stream = self._streams[citation.proposer]
        stands = stream.stands(citation.cv)
        if stands:
            self._vote(voter, citation)
        elif stands is None and citation.cv <= stream.cursor + MAX_AHEAD:  # further ahead, a checkpoint will cover it
            self._waiting.setdefault((citation.proposer, citation.cv), []).append((voter, citation))
            self._wanted.stream(citation.proposer, citation.cv)

    def _vote(self, voter: str, citation: Citation) -> None:
        stream = self._streams[citation.proposer]
        kept = stream.kept.get(citation.cv)
        if kept is None:
            return  # behind an attested anchor: a checkpoint covers its slots
        header = citation.header
        batch = header.batch if isinstance(header, Prepare) else NOOP
        for s in slots_of(header, self._record, kept.state, citation.proposer):
            self._slots.vote(Proposal(header.g, s, citation.proposer, citation.cv, batch), voter)

    def resolve(self, proposer: str, cv: int) -> None:
        """Message `cv` of that stream stands: votes for it count."""
        for voter, citation in self._waiting.pop((proposer, cv), ()):
            self._vote(voter, citation)

    def settle(self) -> None:
        """Let go of votes for what was jumped over, or stands behind its stream's end; want the rest."""
        for proposer, cv in list(self._waiting):
            if self._streams[proposer].stands(cv) is not None:
                del self._waiting[(proposer, cv)]
            else:
                self._wanted.stream(proposer, cv)

    def forget(self, floor: int) -> None:
        """Votes for slots up to `floor` decide nothing any more."""
        for place, waiting in list(self._waiting.items()):
            header = waiting[0][1].header
            if (header.s if isinstance(header, Prepare) else header.s2) <= floor:
                del self._waiting[place]
