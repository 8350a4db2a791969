"""Votes of logs: what VIEW-CHANGEs, wedges and closed epochs contribute to a merge (protocol §5, §6.5).

A closed epoch's stream says no more, so it stands for any target above all that it asked for or entered, as if that had
been its last message. Its name is that of the counter after its last.
"""

from collections.abc import Sequence

from cloudfit_orchestrator.bft.messages import Named
from cloudfit_orchestrator.bft.usig.judge import StreamState
from cloudfit_orchestrator.bft.usig.merge import Vote, vote_of
from cloudfit_orchestrator.bft.usig.messages import ViewChange, Wedge
from cloudfit_orchestrator.bft.usig.stream import Kept, Stream
from cloudfit_orchestrator.bft.usig.wanted import Wanted
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.ui import EpochEnd

WEDGE = -1  # the target under which wedge votes are kept
MAX_VOTES_KEPT = 8  # view-change votes kept of one stream: the newest matter


class LogVotes:
    """Votes by sender and target view. A judge that holds no whole log of a stream has no vote of it."""

    def __init__(
        self, record: ConfigRecord, streams: dict[str, Stream], wanted: Wanted, controllers: list[bytes]
    ) -> None:
        """`controllers`: whose RETIRE orders are heeded."""
        self._record = record
        self._window = record.parameters.window
        self._streams = streams
        self._wanted = wanted
        self._controllers = controllers
        self._votes: dict[str, dict[int, Vote]] = {replica: {} for replica in streams}
        self.epoch_ends: dict[str, EpochEnd] = {}
        self._closed: dict[str, Vote] = {}  # of streams that EPOCH-END closed: for any target above their v and e

    def want_logs(self) -> None:
        """Ask for the logs of votes that were jumped over: whoever holds them can prove them."""
        for stream in self._streams.values():
            state = stream.state
            if state.v > state.e:
                target = WEDGE if state.wedged else state.v
                if not self.has(stream.replica, target):
                    self._wanted.views.add(target)
        if self.epoch_ends and self.unread:
            self._wanted.views.add(WEDGE)

    def has(self, replica: str, target: int) -> bool:
        """Whether that vote is known."""
        return target in self._votes[replica]

    def keep(self, stream: Stream, kept: Kept) -> None:
        """A VIEW-CHANGE or wedge is the next message of `stream`; it stands."""
        if stream.complete(self._window):  # else it was read from an anchor too near to tell what the log holds
            self.read(stream.state, list(stream.kept.values()), kept)

    def read(self, before: StreamState, log: Sequence[Kept], kept: Kept) -> None:
        """Take the vote of the message `kept`, which follows the whole log `log` and the state `before`."""
        target = kept.header.g if isinstance(kept.header, ViewChange) else WEDGE
        votes = self._votes[kept.message.replica]
        votes[target] = self._vote(before, log, kept)
        for old in sorted(t for t in votes if t not in (WEDGE, target))[: 1 - MAX_VOTES_KEPT]:
            del votes[old]

    def _vote(self, before: StreamState, log: Sequence[Kept], kept: Kept) -> Vote:
        name = Named(kept.message.replica, kept.message.cv, kept.digest)
        retires = self._retires(kept.header.retires) if isinstance(kept.header, ViewChange) else ()
        return vote_of(self._record, name, before, log, message=kept.message, retires=retires)

    def _retires(self, orders: Sequence[bytes]) -> tuple[str, ...]:
        found = set()
        for envelope in orders[: self._record.n]:
            try:
                order = open_retire(envelope, self._controllers)
            except BadError:
                continue
            if (order.group, order.c) == (self._record.group, self._record.c) and self._record.member(order.replica):
                found.add(order.replica)
        return tuple(sorted(found))

    def of(self, target: int) -> list[Vote]:
        """The votes for `target` that stand, one a member, the closed streams that are read to their end among them:
        EPOCH-END and the whole log are a vote.
        """
        self._close()
        found = ((votes.get(target) or self._of_closed(replica, target)) for replica, votes in self._votes.items())
        return [vote for vote in found if vote is not None]

    def _of_closed(self, replica: str, target: int) -> Vote | None:
        """The vote of a closed stream, if it is one for `target`: above all that its member asked for or entered."""
        vote = self._closed.get(replica)
        if vote is None or vote.state.wedged:
            return None
        return vote if target == WEDGE or target > max(vote.state.v, vote.state.e) else None

    def named(self, target: int, names: Sequence[Named], citer: str = "") -> list[Vote] | bool | None:
        """The votes that a NEW-VIEW (of `citer`) or a wedge set names; False if one is none, None if not all are
        known.
        """
        if len({name.replica for name in names}) != len(names) or len(names) < self._record.quorums.view_change:
            return False
        self._close()
        votes: list[Vote] = []
        unknown = False
        for name in names:
            stream = self._streams.get(name.replica)
            if stream is None:
                return False
            vote = self._votes[name.replica].get(target) or self._again(stream, target, name)
            closed = self._of_closed(name.replica, target)
            if vote is None or (closed is not None and closed.name == name):
                vote = closed
            if vote is not None:
                if vote.name != name:
                    return False
                votes.append(vote)
            elif stream.stands(name.cv) is False or not _may_be(stream, target, name):
                return False
            else:
                unknown = True
                self._wanted.stream(name.replica, name.cv, citer)
        return None if unknown else votes

    def _again(self, stream: Stream, target: int, name: Named) -> Vote | None:
        """A vote that was let go, read off the kept stream once more."""
        kept = stream.kept.get(name.cv)
        if kept is None or not _may_be(stream, target, name) or not isinstance(kept.header, ViewChange):
            return None
        before = stream.kept.get(name.cv - 1)
        state = before.state if before is not None else stream.base_state
        anchor = stream.anchor()
        if anchor is not None and (name.cv <= anchor.message.cv or anchor.state.h > state.h - self._window):
            return None
        return self._vote(state, [item for cv, item in stream.kept.items() if cv < name.cv], kept)

    def _close(self) -> None:
        """Streams that EPOCH-END closed, and that are read to their end, vote for any wedge."""
        for replica, end in self.epoch_ends.items():
            stream = self._streams[replica]
            if not self._ends_here(stream, end) or self.has_last(replica):
                continue
            if stream.complete(self._window):
                self._read_closed(end, stream.state, list(stream.kept.values()))

    def has_last(self, replica: str) -> bool:
        """Whether the vote of that stream's end is known: a wedge, or what EPOCH-END closed."""
        return replica in self._closed or WEDGE in self._votes[replica]

    @staticmethod
    def _ends_here(stream: Stream, end: EpochEnd) -> bool:
        return stream.ended is None and stream.cursor == end.cv_end

    def read_closed(self, replica: str, state: StreamState, log: Sequence[Kept]) -> None:
        """Take the vote of a stream if EPOCH-END closed it at the end of the whole log `log`, after which it is in
        `state`.
        """
        end = self.epoch_ends.get(replica)
        if end is not None and log[-1].message.cv == end.cv_end:
            self._read_closed(end, state, log)

    def _read_closed(self, end: EpochEnd, state: StreamState, log: Sequence[Kept]) -> None:
        name = Named(end.replica, end.cv_end + 1, end.last_digest)
        self._closed[end.replica] = vote_of(self._record, name, state, log)

    @property
    def unread(self) -> bool:
        """Whether a stream was closed that is held from an anchor too near: who holds its whole log can prove it."""
        self._close()
        return any(
            self._ends_here(self._streams[replica], end) and not self.has_last(replica)
            for replica, end in self.epoch_ends.items()
        )


def _may_be(stream: Stream, target: int, name: Named) -> bool:
    """False if the message at that counter is held and is no vote for `target`."""
    kept = stream.kept.get(name.cv)
    if kept is None:
        return True
    if kept.digest != name.digest:
        return False
    if target == WEDGE:
        return isinstance(kept.header, Wedge)
    return isinstance(kept.header, ViewChange) and kept.header.g == target
