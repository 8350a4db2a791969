"""When to ask for another view (protocol §5.1, §5.5). Time-outs give liveness only."""

from cloudfit_orchestrator.bft.clientdesk import ClientDesk
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import Situation

MAX_TIMEOUT_S = 60.0
QUICK = 8  # a slot that took no more than this part of the time-out: half of the time-out is ample for the next
SLOW = 16  # else this part of it goes: 11 slots to a half, and 16 time-outs in all for who is always just in time
MAX_AWAY_S = 0.5  # between two ticks: what is more was spent executing, or asleep, and says nothing about others
PATIENCE = 4  # time-outs that a bundle may wait though others' are executed: then it is handed on again, then suspected


class Suspicion:
    """The progress timer: doubles while nothing moves, shrinks back when something does.

    How fast tells the time that a slot took. Halved with each, a time-out that had just been doubled because it was too
    short was too short again with the next slot but one: a group whose slots take a little longer than its parameter
    went through a view for each two or three of them. Never shrunk, it could be kept up for ever by one who proposes as
    late as it lets him.
    """

    def __init__(self, situation: Situation, outbox: Outbox, desk: ClientDesk) -> None:
        self._at = situation
        self._out = outbox
        self._desk = desk
        self._timeout_s = 1.0
        self._view = 0
        self._since_s = 0.0  # the last slot was executed, or nothing waited: other than progress_s no view restarts it
        self._ticked_s: float | None = None
        self._patient_from_s = 0.0  # a bundle's wait counts from here, in this view
        self._handed_on: float | None = None  # when the bundle arrived that was handed on again as it had waited long

    def begin(self, ordering: Ordering) -> None:
        """A new configuration."""
        self._patient_from_s = self._out.now_s
        self._timeout_s = ordering.record.parameters.progress_timeout_ms / 1000
        self._at.progress_s = self._since_s = self._out.now_s

    def progressed(self, ordering: Ordering) -> None:
        """A slot was executed."""
        quick = self._out.now_s - self._since_s <= self._timeout_s / QUICK
        shrunk_s = self._timeout_s / 2 if quick else self._timeout_s * (1 - 1 / SLOW)
        self._timeout_s = max(ordering.record.parameters.progress_timeout_ms / 1000, shrunk_s)
        self._at.progress_s = self._since_s = self._out.now_s

    def tick(self, *, transferring: bool) -> None:
        """Ask for the next view if something waits for too long: first a bundle is forwarded, only then suspected."""
        ordering, at = self._at.ordering, self._at
        self._pardon()
        if ordering is None or not ordering.may_suspect or not at.installed:
            return
        self._desk.forward(ordering, behind=transferring)
        if transferring:
            return
        waiting = ordering.waiting
        oldest = at.pool.oldest_s()
        if not waiting and (oldest is None or self._out.now_s - oldest < self._timeout_s):
            newest = ordering.statements.newest
            if oldest is None and (newest is None or newest.slot <= at.execution.slot):
                at.progress_s = self._since_s = self._out.now_s
            return
        stands_still = self._out.now_s - at.progress_s >= self._timeout_s
        if not stands_still and not self._overlooked(ordering, oldest):
            return
        self._desk.prune(ordering.record)
        if not waiting and not len(at.pool):
            return
        if not stands_still and (at.pool.oldest_s() != oldest or self._handed_on != oldest):
            self._patient_from_s, self._handed_on = self._out.now_s, at.pool.oldest_s()
            at.pool.forward_again()
            return
        self._patient_from_s = self._out.now_s
        at.progress_s = self._out.now_s
        self._timeout_s = min(self._timeout_s * 2, MAX_TIMEOUT_S)
        ordering.suspect()

    def _pardon(self) -> None:
        """Others are not to blame for the time in which nobody here listened: a client's requests may take seconds."""
        now_s, before_s = self._out.now_s, self._ticked_s
        self._ticked_s = now_s
        if before_s is not None and now_s - before_s > MAX_AWAY_S:
            self._at.progress_s += now_s - before_s - MAX_AWAY_S
            self._patient_from_s += now_s - before_s - MAX_AWAY_S
            self._since_s = min(now_s, self._since_s + now_s - before_s - MAX_AWAY_S)

    def _overlooked(self, ordering: Ordering, oldest_s: float | None) -> bool:
        """The bundle that waits longest has waited long in this view, though slots are executed: who proposes serves
        others only, perhaps.
        """
        if ordering.view != self._view:
            self._view, self._patient_from_s = ordering.view, self._out.now_s
        since_s = max(oldest_s, self._patient_from_s) if oldest_s is not None else self._out.now_s
        return self._out.now_s - since_s >= PATIENCE * self._timeout_s
