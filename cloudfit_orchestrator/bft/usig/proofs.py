"""Logs of votes that are handed over, as their streams were jumped over (decision 0005), and what is found so."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from cloudfit_orchestrator.bft.usig.citations import Citations
from cloudfit_orchestrator.bft.usig.judge import Evidence, StreamState, initial, judge, stated
from cloudfit_orchestrator.bft.usig.logvotes import LogVotes
from cloudfit_orchestrator.bft.usig.messages import Commit, Stable, StreamMessage, ViewChange, Wedge, decode_header
from cloudfit_orchestrator.bft.usig.stream import Kept, Stream
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord


@dataclass(slots=True)
class Found:
    """What came in out of its turn and was relied on since: for the journal to take, as nothing else in it tells."""

    jumps: list[StreamMessage] = field(default_factory=list)  # anchors that cursors jumped to
    views: list[StreamMessage] = field(default_factory=list)  # NEW-VIEWs of streams that were jumped over
    logs: list[tuple[StreamMessage, ...]] = field(default_factory=list)  # of wedges and closed epochs, likewise
    breaches: list[StreamMessage] = field(default_factory=list)  # what ended streams


class Judge(Evidence, Protocol):
    """Who knows the streams."""

    def genuine(self, message: StreamMessage) -> bool:
        """The UI is that member's, for this content."""
        ...


class LogReader:
    """Reads logs that stand into `votes`."""

    def __init__(
        self, record: ConfigRecord, streams: dict[str, Stream], *, citations: Citations, votes: LogVotes, known: Judge
    ) -> None:
        """`known` is asked about messages that stand only."""
        self._record = record
        self._streams = streams
        self._citations = citations
        self._votes = votes
        self._known = known

    def read(self, messages: Sequence[StreamMessage]) -> bool:
        """The log of a VIEW-CHANGE, wedge or closed epoch. It counts if it stands and begins where a log may begin
        (§4). True if it is the last word of its stream, and was not known.
        """
        if not messages:  # how many there are is bounded by the frame that brings them
            return False
        replica, last = messages[0].replica, messages[-1]
        stream = self._streams.get(replica)
        if stream is None or stream.stands(last.cv) is not True:
            return False
        if any(later.cv != earlier.cv + 1 for earlier, later in pairwise(messages)):
            return False
        if not all(m.replica == replica and m.c == self._record.c and self._known.genuine(m) for m in messages):
            return False
        before = self._votes.has_last(replica)
        self._judge(replica, messages)
        return self._votes.has_last(replica) and not before

    def _judge(self, replica: str, messages: Sequence[StreamMessage]) -> None:
        state = initial(self._record)
        kept: list[Kept] = []
        for message in messages:
            try:
                header = decode_header(message.header)
            except BadError:
                return
            if isinstance(header, Stable) and not kept and message.cv > 1:
                outcome: object = stated(header)
            else:
                outcome = judge(self._record, state, replica, message.cv, header, message, self._known)
            if not isinstance(outcome, StreamState):
                return  # cannot be: it stands
            entries = self._citations.read(header) if isinstance(header, Commit) else ()
            before, state = state, outcome
            kept.append(Kept(message, header, message.digest, state, entries))
        if isinstance(kept[-1].header, ViewChange | Wedge) and self._anchored(kept[0], before):
            self._votes.read(before, kept[:-1], kept[-1])
        if not state.wedged and self._anchored(kept[0], state):
            self._votes.read_closed(replica, state, kept)

    def _anchored(self, first: Kept, state: StreamState) -> bool:
        header = first.header  # a log may begin with it
        window = self._record.parameters.window
        return first.message.cv == 1 or (isinstance(header, Stable) and header.h <= state.h - window)
