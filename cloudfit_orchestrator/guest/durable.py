"""The durability rule (bft/effects.py): what must be on disk before something leaves, and how many share one fsync.

Log operations and actions stand in one queue. A round takes all of it: writes what is to be written, syncs once, then
carries out the actions in their order. On a slow disk the sync runs in a thread, and the queue grows meanwhile; on a
quick one it runs in the event loop, as the way to a thread and back would take longer. On a full disk the round is
tried again until there is room, and no action of it or behind it is carried out: the replica has stopped voting. After
a failed write nothing is carried out any more.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cloudfit_orchestrator.bft.effects import Append, DropSnapshots, Rewrite, SaveSnapshot
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFailedError, DiskFullError, disk_errors
from cloudfit_orchestrator.guest.turn import Action, Turn
from cloudfit_orchestrator.guest.wal import WriteAheadLog

MAX_WAITING_BYTES = 64 << 20  # of log records in memory; `stalled` beyond it: take no more input
MAX_WAITING_SIGNS = 4096  # statements behind records that are not durable; a full disk may last for days
MAX_WAITING_SAVES = 4  # snapshots not on disk yet; the oldest gives way, it is never answered
FULL_RETRY_S = 1.0
QUICK_SYNC_S = 0.001  # two switches between threads of a busy interpreter take about that, or much longer
LINGER_S = 0.1  # what nobody waits for is written with what somebody does, or after so long
_JUDGED = 8  # rounds of which the quickest tells how quick the disk is: a busy machine makes others slow, not it


@dataclass(slots=True)
class _Round:
    rewrite: tuple[bytes, ...] | None = None
    appends: list[bytes] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)


class Durable:
    """The state disk of a replica, as the event loop sees it."""

    def __init__(
        self,
        state: Path,
        trouble: Callable[[str, str], None],
        crash: Callable[[BaseException], None],
        turn: Turn | None = None,
    ) -> None:
        """Opens what is there. Blocks. `trouble(state, fact)` hears of `full`, `failed` and `ok` (again), `crash` of
        an error that nobody expected. What one `turn` queues is written at its end. Raises DiskFullError or
        DiskFailedError.
        """
        with disk_errors("create", state):
            state.mkdir(parents=True, exist_ok=True)
        self.log = WriteAheadLog(state / "wal")
        self.snapshots = SnapshotFiles(state / "snapshots")
        self._trouble = trouble
        self._crash = crash
        self._full: set[str] = set()
        self.failed = False
        self.syncs = 0  # rounds that wrote
        self.lost = 0  # actions that found no place to wait
        self._queue: deque[bytes | Rewrite | Action] = deque()
        self._waiting_bytes = 0
        self._jobs: deque[tuple[SaveSnapshot, Action] | DropSnapshots] = deque()
        self._drops: list[set[tuple[int, int]]] = []  # that wait for the log: what was saved since each was ordered
        self._log_task: asyncio.Task[None] | None = None
        self._scheduled = False
        self._turn = turn or Turn()
        self._lingering: asyncio.TimerHandle | None = None
        self._rounds_s: deque[float] = deque([1.0], _JUDGED)  # of writing; slow until it is known to be quick
        self._job_task: asyncio.Task[None] | None = None
        self._log_thread = ThreadPoolExecutor(1, "log")
        self._job_thread = ThreadPoolExecutor(1, "snapshots")

    @property
    def stalled(self) -> bool:
        """Too much waits for the disk, or it has failed: the replica must not be fed any more."""
        return self.failed or self._waiting_bytes > MAX_WAITING_BYTES

    def write(self, effect: Append | Rewrite) -> None:
        """Queue a log operation."""
        if isinstance(effect, Append):
            self._waiting_bytes += len(effect.record)
            self._queue.append(effect.record)
        else:
            self._waiting_bytes += sum(map(len, effect.records))
            self._queue.append(effect)
        if self._log_task is None and self._lingering is None and not self._scheduled and not self.failed:
            self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self._start)

    def after(self, action: Action, *, may_be_lost: bool = False) -> None:
        """Carry `action` out once everything written before it is durable; at once if it is. One that `may_be_lost`
        is, where too much waits.
        """
        if may_be_lost and len(self._queue) >= MAX_WAITING_SIGNS:
            self.lost += 1
            return
        if not self._queue and self._log_task is None and not self._scheduled and not self.failed:
            action()
        else:
            self._queue.append(action)
            self._start()

    def save(self, effect: SaveSnapshot, saved: Action) -> None:
        """Persist a snapshot in another thread, then call `saved`."""
        saves = [job for job in self._jobs if not isinstance(job, DropSnapshots)]
        if len(saves) >= MAX_WAITING_SAVES:
            self._jobs.remove(saves[0])
        for later in self._drops:
            later.add((effect.c, effect.slot))
        self._add_job((effect, saved))

    def drop(self, effect: DropSnapshots) -> None:
        """Forget snapshots, but not before the log that no longer refers to them is durable; nor any that is saved
        meanwhile, of which the order could not know.
        """
        later: set[tuple[int, int]] = set()
        self._drops.append(later)

        def begin() -> None:
            self._drops = [other for other in self._drops if other is not later]
            self._add_job(DropSnapshots((*effect.keep, *later)))

        self.after(begin)

    async def close(self) -> None:
        """Wait for the round under way, then close. What waits is lost, as in a crash."""
        self.failed = True
        self._queue.clear()
        self._jobs.clear()
        if self._lingering is not None:
            self._lingering.cancel()
        tasks = [task for task in (self._log_task, self._job_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._log_thread.shutdown)
        await asyncio.to_thread(self._job_thread.shutdown)
        self.log.close()

    def _start(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._log_task is None and not self._scheduled and not self.failed:
            self._scheduled = True
            self._turn.later(self._begin, last=True)

    def _begin(self) -> None:
        """The effects of this turn are all queued: write them."""
        self._scheduled = False
        current: _Round | None = None
        try:
            while self._queue and not self.failed:
                current = self._next_round()
                if current.rewrite is not None or min(self._rounds_s) > QUICK_SYNC_S or not self._written_here(current):
                    break
                self._carry_out(current)
                current = None
        except Exception as error:  # noqa: BLE001  the boundary: what nobody expected ends the process
            self.failed = True
            self._crash(error)
            return
        if current is not None:
            self._log_task = asyncio.get_running_loop().create_task(self._write_rounds(current))
            self._log_task.add_done_callback(self._ended)

    def _written_here(self, current: _Round) -> bool:
        """Write in the event loop; False if the disk has no room or fails: then the patient way tells, and waits."""
        try:
            self._commit(current)
        except (DiskFullError, DiskFailedError):
            return False
        return True

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = True
            self._crash(error)

    async def _write_rounds(self, current: _Round) -> None:
        try:
            while not self.failed:
                if current.rewrite is not None or current.appends:
                    if not await self._until_room("log", self._log_thread, partial(self._commit, current)):
                        return
                self._carry_out(current)
                if not self._queue:
                    return
                current = self._next_round()
        finally:
            self._log_task = None

    def _carry_out(self, current: _Round) -> None:
        if current.rewrite is not None or current.appends:
            self.syncs += 1
            self._waiting_bytes -= sum(map(len, current.appends)) + sum(map(len, current.rewrite or ()))
        for action in current.actions:
            action()

    def _next_round(self) -> _Round:
        current = _Round()
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, bytes):
                current.appends.append(item)
            elif isinstance(item, Rewrite):
                self._waiting_bytes -= sum(map(len, current.appends)) + sum(map(len, current.rewrite or ()))
                current.rewrite, current.appends = item.records, []  # it replaces what was appended before
            else:
                current.actions.append(item)
        return current

    def _commit(self, current: _Round) -> None:
        if current.rewrite is not None:
            self.log.rewrite((*current.rewrite, *current.appends))
        elif current.appends:
            began_s = time.perf_counter()
            self.log.append(current.appends)
            self._rounds_s.append(time.perf_counter() - began_s)

    def _add_job(self, job: tuple[SaveSnapshot, Action] | DropSnapshots) -> None:
        self._jobs.append(job)
        if self._job_task is None and not self.failed:
            self._job_task = asyncio.get_running_loop().create_task(self._do_jobs())
            self._job_task.add_done_callback(self._ended)

    async def _do_jobs(self) -> None:
        try:
            while self._jobs and not self.failed:
                job = self._jobs.popleft()
                if isinstance(job, DropSnapshots):
                    await self._until_room("snapshots", self._job_thread, partial(self.snapshots.keep_only, job.keep))
                    continue
                save, saved = job
                work = partial(self.snapshots.save, save.c, save.slot, save.snapshot)
                if await self._until_room("snapshots", self._job_thread, work):
                    saved()
                elif all(isinstance(other, DropSnapshots) for other in self._jobs):
                    self._jobs.append(job)  # behind what makes room; else a later one will do
        finally:
            self._job_task = None

    async def _until_room(self, what: str, thread: ThreadPoolExecutor, work: Callable[[], object]) -> bool:
        """Do `work`, again while the disk is full; False if the disk failed."""
        while not self.failed:
            try:
                await asyncio.get_running_loop().run_in_executor(thread, work)
            except DiskFullError as error:
                if not self._full:
                    self._trouble("full", str(error))
                self._full.add(what)
                await asyncio.sleep(FULL_RETRY_S)
                if what == "snapshots" and any(isinstance(job, DropSnapshots) for job in self._jobs):
                    return False  # dropping makes room
            except DiskFailedError as error:
                self.failed = True
                self._trouble("failed", str(error))
            else:
                if self._full == {what}:
                    self._trouble("ok", f"there is room for the {what} again")
                self._full.discard(what)
                return True
        return False
