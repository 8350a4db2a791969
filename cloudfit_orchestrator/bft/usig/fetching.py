"""Fetching parts of streams and NEW-VIEWs that are known to exist and are not here, and answering who asks (protocol §3
R0, §4).
"""

from dataclasses import dataclass

from cloudfit_orchestrator.bft.messages import MAX_FETCH, Frozen
from cloudfit_orchestrator.bft.ordering import Host
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import member_of
from cloudfit_orchestrator.bft.turns import Rota, Turns
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.messages import (
    Discarded,
    Fetch,
    FetchNewView,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.serving import answer_fetch, answer_view
from cloudfit_orchestrator.bft.usig.stream import Stream
from cloudfit_orchestrator.model.errors import BadError

PATIENCE_S = 1.0  # what was asked for is not asked for again while it comes in, nor sooner than this
MAX_PATIENCE_S = 3.0  # … but who was asked has no longer than this: a faulty peer may hand it out drop by drop
STUCK_S = 0.5  # a stream that stands still for so long may be jumped ahead on another's word than its owner's
MAX_VIEWS_ASKED = 4  # at once


@dataclass(slots=True)
class Asked:
    """A FETCH under way: what is still missing of it, since when, and when something of it came last."""

    first: int
    last: int
    since_s: float
    moved_s: float


class Fetching:
    """Asks peers about the streams of one configuration, and answers them."""

    def __init__(self, host: Host, outbox: Outbox, configuration: Configuration) -> None:
        self._at = host
        self._out = outbox
        self._configuration = configuration
        self._turns = Turns()
        self._rota: Rota[int] = Rota()
        self._asked: dict[str, Asked] = {}  # replica -> the FETCH under way
        self._asked_citer: dict[str, Asked] = {}  # … of one who cites what is missing
        self._stuck: dict[str, tuple[int, float]] = {}  # replica -> (cursor, since when it stands still)
        self._far: dict[str, tuple[int, float]] = {}  # replica -> (where others have it, since when it is not there)

    def fetch(self, *, live: bool) -> None:
        """Ask for gaps and views; for the own stream only while we are not `live`."""
        configuration, others = self._configuration, self._at.others
        c = configuration.record.c
        ahead = {member_of(configuration.record, peer): beacon.cv for peer, beacon in self._at.beacons.items()}
        for replica, stream in configuration.streams.items():
            needed = max(ahead.get(replica, 0), configuration.wanted.streams.get(replica, 0), *stream.waiting, 0)
            first = stream.cursor + 1
            if stream.ended is not None or needed < first or (replica == self._at.me and live):
                continue
            while first in stream.waiting:
                first += 1
            if first > needed:
                continue
            last = min(needed, first + MAX_FETCH - 1)
            citers = configuration.wanted.citers.get(replica, ())
            citing = [peer for peer in others if member_of(configuration.record, peer) in citers]
            if self._patience_ends(self._asked, replica, first, last):
                self._out.send(self._source(others, replica), Fetch(c, replica, first, last))
            elif citing and self._patience_ends(self._asked_citer, replica, first, last):
                self._out.send(self._turns.next(citing, f"citers of {replica}"), Fetch(c, replica, first, last))
        if configuration.wanted.views and self._out.every("views", PATIENCE_S / 2):
            asked = self._turns.next(others, "views")
            for g in self._rota.next(asked, configuration.wanted.views, MAX_VIEWS_ASKED):
                self._out.send(asked, FetchNewView(c, g))

    def _patience_ends(self, questions: dict[str, Asked], replica: str, first: int, last: int) -> bool:
        """Whether the gap first..last is to be asked for now: what was asked for has come, or comes no more, or too
        slowly. Then it is noted as asked for.
        """
        asked, now_s = questions.get(replica), self._out.now_s
        if asked is not None and asked.first <= first <= asked.last and now_s - asked.since_s < MAX_PATIENCE_S:
            if first > asked.first:  # it is coming in
                asked.first, asked.moved_s = first, now_s
            if now_s - asked.moved_s < PATIENCE_S:
                return False
        questions[replica] = Asked(first, last, now_s, now_s)
        return True

    def _source(self, others: list[str], replica: str) -> str:
        """Every other time the stream's owner, else the next peer: the owner may be faulty, or down."""
        owner = next((peer for peer in others if self._owns(peer, replica)), None)
        asked = self._turns.count(replica)
        if owner is not None and asked % 2:
            return owner
        return self._turns.next(others, f"streams like {replica}")

    def _owns(self, peer: str, replica: str) -> bool:
        """Whether the stream is that machine's."""
        return member_of(self._configuration.record, peer) == replica

    def take_discarded(self, peer: str, message: Discarded) -> None:
        """A peer no longer has what was asked for. Its owner's word is taken at once; another's only when the stream
        has stood still for a while, and only where nothing is lost by it, as a faulty peer might make us jump over what
        correct ones still have.
        """
        replica = message.stable.replica
        stream = self._configuration.streams.get(replica)
        if stream is None:
            return
        if message.stable.cv == stream.cursor + 1:  # nothing is missing: no reason to lose the log before it
            self._configuration.offer(message.stable)
            return
        cursor, since_s = self._stuck.get(replica, (-1, 0.0))
        if cursor != stream.cursor:
            self._stuck[replica] = (stream.cursor, self._out.now_s)
        asked = self._asked.get(replica)
        if not self._owns(peer, replica) and (
            asked is None or asked.first > message.stable.cv or not self._is_covered(message.stable)
        ):
            return
        still = cursor == stream.cursor and self._out.now_s - since_s >= STUCK_S
        if self._owns(peer, replica) or still or self._drips(stream, message.stable.cv):
            self._configuration.offer_jump(message)

    def _drips(self, stream: Stream, goal: int) -> bool:
        """Whether the stream has been on its way to where others still have it for longer than a question may take: a
        faulty owner that keeps it from standing still could go on for as long as its history is.
        """
        before, since_s = self._far.get(stream.replica, (0, 0.0))
        if before <= stream.cursor:
            since_s = self._out.now_s
        self._far[stream.replica] = (max(before, goal), since_s)
        return self._out.now_s - since_s >= MAX_PATIENCE_S

    def _is_covered(self, stable: StreamMessage) -> bool:
        """What a jump to that STABLE leaves out concerns slots of a certified state only: its owner's votes ahead of it
        were for slots up to h+L. A correct peer has let go of no more than that (§4).
        """
        newest = self._configuration.statements.newest
        try:
            header = decode_header(stable.header)
        except BadError:
            return False
        if newest is None or not isinstance(header, Stable):
            return False
        return header.h + self._configuration.record.parameters.window <= newest.slot

    def answer(self, peer: str, message: Frozen) -> bool:
        """Answer a question about this configuration. False if it was none."""
        c = self._configuration.record.c
        match message:
            case Fetch() if message.c == c:
                answers = answer_fetch(self._configuration, message)
            case FetchNewView() if message.c == c:
                answers = answer_view(self._configuration, message)
            case _:
                return False  # also a question about the configuration before, of whose engine it is asked next
        self._out.answer(peer, answers)
        return True
