"""What the PBFT engine keeps in the write-ahead log. No counter stops a replica from contradicting itself: only this
log does. So all that an own message says is here, durably, before the message is signed, and is read again before
anything is said.
"""

from cloudfit_orchestrator.bft.messages import Frozen, Signed
from cloudfit_orchestrator.bft.pbft.messages import Change, Prepared


class LogJoined(Frozen, frozen=True, tag=20):
    """The first own word in c follows: a log that was lost lacks it."""

    c: int


class LogSaid(Frozen, frozen=True, tag=21):
    """An own vote: no other one is ever signed for this phase, view and slot."""

    c: int
    phase: int
    g: int
    s: int
    digest: bytes


class LogPrepared(Frozen, frozen=True, tag=22):
    """A slot is prepared: before the own COMMIT, as every later VIEW-CHANGE must show it."""

    c: int
    prepared: Prepared


class LogStable(Frozen, frozen=True, tag=23):
    """The own low-water mark, with its certificate."""

    c: int
    slot: int
    digest: bytes
    certificate: tuple[Signed, ...]


class LogOwn(Frozen, frozen=True, tag=24):
    """The body of an own VIEW-CHANGE, wedge or NEW-VIEW."""

    c: int
    body: bytes


class LogSigned(Frozen, frozen=True, tag=25):
    """An own VIEW-CHANGE or wedge with its signature: the epoch may end, and nobody could sign it again."""

    change: Change


class LogView(Frozen, frozen=True, tag=26):
    """The NEW-VIEW of the view that was entered."""

    new_view: Change


class LogVote(Frozen, frozen=True, tag=28):
    """A VIEW-CHANGE that the next NEW-VIEW in the log names: one a record, as together they may be longer than a record
    can be.
    """

    change: Change


class LogWedge(Frozen, frozen=True, tag=27):
    """A wedge that S was computed from: before that S is confirmed, as all who confirm it may start again."""

    change: Change


ENTRIES: tuple[type[Frozen], ...] = (
    LogJoined,
    LogSaid,
    LogPrepared,
    LogStable,
    LogOwn,
    LogSigned,
    LogView,
    LogVote,
    LogWedge,
)
