"""The replica's requests to its wormhole: sessions, UIs, statements, the end of an epoch, reports.

A lost channel is hidden from the core: when the agent is back, a new session is opened, what `RECENT` shows as
certified is answered from it, what is not is asked for again, in order. Only the core's own restart is its business.
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

from cloudfit_orchestrator.bft.effects import Certify, EndEpoch, Report, Sign
from cloudfit_orchestrator.guest.channel import Channel, ChannelLostError, WormholeRefusedError
from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    EPOCH_END,
    MAX_GUEST_FRAME,
    RECENT,
    RECENT_ITEM,
    SESSION,
    SIGN_HEAD,
    UI_CERT,
    ErrorCode,
    FrameKind,
)
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.model.ui import EpochEnd

RETRY_S = (0.05, 1.0)  # first and last wait after a refusal that may pass: the record has not arrived here yet
MAX_WAITING = 1024  # statements and reports that wait for the channel; the oldest gives way
MAX_SHOWN = 768  # of them, before no reply or read joins them: the rest of the channel is for UIs and what all wait for
MAX_REPORT = MAX_GUEST_FRAME - 256
_PASSING = frozenset({ErrorCode.NOT_ACTIVE, ErrorCode.NO_EPOCH, ErrorCode.THROTTLED, ErrorCode.FORBIDDEN})

Recent = list[tuple[int, bytes, bytes]]


class Core(Protocol):
    """What is called back; the shape of `bft.replica.Replica`."""

    def session(self, c: int, next_cv: int, recent: Recent) -> None: ...
    def certified(self, c: int, cv: int, certificate: bytes) -> None: ...
    def refused(self, c: int, code: ErrorCode) -> None: ...
    def signed(self, token: int, signature: bytes) -> None: ...
    def epoch_ended(self, end: EpochEnd) -> None: ...


class Nobody:
    """A core that wants nothing: machines that only report."""

    def session(self, c: int, next_cv: int, recent: Recent) -> None:
        """See Core."""

    def certified(self, c: int, cv: int, certificate: bytes) -> None:
        """See Core."""

    def refused(self, c: int, code: ErrorCode) -> None:
        """See Core."""

    def signed(self, token: int, signature: bytes) -> None:
        """See Core."""

    def epoch_ended(self, end: EpochEnd) -> None:
        """See Core."""


class LostCounterError(Exception):
    """The wormhole's counter is not where this process left it: only a restart from the log can tell."""


class Certifier:
    """Owns what is under way; calls the core through `call(method, *args)`, which is where errors of the core end."""

    def __init__(
        self, replica: str, channel: Channel, core: Core, call: Callable[..., None], counters: Counter[str]
    ) -> None:
        """`replica`: the id in EPOCH-END."""
        self._replica = replica
        self._channel = channel
        self._core = core
        self._call = call
        self._counters = counters
        self._wanted: int | None = None  # the epoch that the core wants a session of, or has one of
        self._telling = False  # the core waits for `session`; otherwise a new session is none of its business
        self._session: int | None = None  # its number, while it is good
        self._round = 0  # grows with each session wanted, opened or lost: answers to what was asked before are void
        self._last_refusal: tuple[int, ErrorCode, float] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._uis: dict[tuple[int, int], bytes] = {}  # (c, cv) -> digest, not answered yet, in counter order
        self._statements: dict[int, Sign] = {}
        self._ends: dict[int, EndEpoch] = {}
        self._reports: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._tasks: set[asyncio.Task[None]] = set()

    def channel_opened(self) -> None:
        """Greeted (again): everything that waits is asked for (again)."""
        self._open_session()
        for sign in list(self._statements.values()):
            self._ask_sign(sign)
        for end in list(self._ends.values()):
            self._ask_end(end)
        waiting, self._reports = list(self._reports), deque(maxlen=MAX_WAITING)
        for body in waiting:
            self._ask_report(body)

    def channel_lost(self) -> None:
        """Nothing that was asked is answered any more."""
        self._session = None
        self._round += 1

    def want_session(self, c: int | None) -> None:
        """The core's `needs_session`, after every call."""
        if c is not None and (c, True) != (self._wanted, self._telling):
            self._wanted, self._telling, self._session = c, True, None
            self._round += 1
            self._uis.clear()  # the core makes anew what the session does not show
            self._open_session()

    def certify(self, effect: Certify) -> None:
        """CREATE_UI; held back while there is no session. What comes for another epoch has waited for the disk until
        its own was over: nobody waits for it, and no later session may take it for its own.
        """
        if effect.c != self._wanted:
            return
        self._uis[effect.c, effect.cv] = effect.digest
        if self._session is not None:
            self._ask_ui(effect.c, effect.cv, effect.digest)

    def sign(self, effect: Sign) -> None:
        """SIGN. A reply or read is given up where too much waits: clients ask again."""
        if effect.kind in (Kind.REPLY, Kind.READ) and len(self._statements) >= MAX_SHOWN:
            self._counters["replies given up"] += 1
            return
        self._statements[effect.token] = effect
        if len(self._statements) > MAX_WAITING:
            del self._statements[next(iter(self._statements))]
            self._counters["statements given up"] += 1
        self._ask_sign(effect)

    def end_epoch(self, effect: EndEpoch) -> None:
        """END_EPOCH, until the agent holds the record that supersedes c. Repeating it changes nothing."""
        if effect.c in self._ends:
            return
        self._ends[effect.c] = effect
        self._ask_end(effect)

    def report(self, effect: Report) -> None:
        """REPORT."""
        body = json.dumps({**effect.body, "topic": effect.topic}, default=_plain, allow_nan=False).encode()
        if len(body) > MAX_REPORT:
            self._counters["reports too large"] += 1
            body = json.dumps({"topic": effect.topic, "omitted_bytes": len(body)}).encode()
        self._ask_report(body)

    async def close(self) -> None:
        """Stop."""
        tasks = [*self._tasks, *([self._opening] if self._opening else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------- sessions
    def _open_session(self) -> None:
        if self._opening is None and self._wanted is not None and self._session is None and self._channel.is_open:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opened)

    def _opened(self, task: "asyncio.Task[None]") -> None:
        self._opening = None
        if not task.cancelled():
            if (error := task.exception()) is not None:
                self._call(_raise, error)
            self._open_session()

    async def _open(self) -> None:
        wait_s = RETRY_S[0]
        while self._channel.is_open and (c := self._wanted) is not None and self._session is None:
            current = self._round
            try:
                session, next_cv = SESSION.unpack(await self._channel.request(FrameKind.OPEN_SESSION, EPOCH.pack(c)))
                found = await self._channel.request(FrameKind.RECENT, RECENT.pack(session, c))
            except ChannelLostError:
                return
            except WormholeRefusedError as refusal:
                self._counters[f"session refused: {refusal.code.name}"] += 1
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S[1])
                continue
            if current != self._round:
                continue
            self._round += 1
            self._session = session
            self._resume(c, next_cv, list(RECENT_ITEM.iter_unpack(found)))

    def _resume(self, c: int, next_cv: int, recent: Recent) -> None:
        if self._telling:
            self._telling = False
            self._call(self._core.session, c, next_cv, recent)
            return
        made = {cv: (digest, certificate) for cv, digest, certificate in recent}
        for (_, cv), digest in list(self._uis.items()):
            if cv >= next_cv:
                self._ask_ui(c, cv, digest)
            elif cv in made and made[cv][0] == digest:
                del self._uis[c, cv]
                self._call(self._core.certified, c, cv, made[cv][1])
            else:
                raise LostCounterError(f"counter {cv} of epoch {c} was certified for something else, or long ago")

    # ------------------------------------------------------------------------------------------------------- requests
    def _ask_ui(self, c: int, cv: int, digest: bytes) -> None:
        current = self._round
        body = CREATE_UI.pack(self._session, c, cv, digest)
        self._channel.ask(FrameKind.CREATE_UI, body, lambda answer: self._ui_answered(current, c, cv, answer))

    def _ui_answered(
        self, current: int, c: int, cv: int, answer: bytes | WormholeRefusedError | ChannelLostError
    ) -> None:
        if current != self._round or isinstance(answer, ChannelLostError):
            return
        self._uis.pop((c, cv), None)
        if isinstance(answer, WormholeRefusedError):
            self._ui_refused(c, answer.code)
            return
        self._last_refusal = None
        answered, certificate = UI_CERT.unpack(answer)
        assert answered == cv
        self._call(self._core.certified, c, cv, certificate)

    def _ui_refused(self, c: int, code: ErrorCode) -> None:
        """What was pipelined behind a refused call is refused as well: one answer to the core, which asks again."""
        self._counters[f"ui refused: {code.name}"] += 1
        now_s = asyncio.get_running_loop().time()
        last = self._last_refusal
        if last is None or last[:2] != (c, code) or now_s - last[2] > RETRY_S[0]:
            self._last_refusal = c, code, now_s
            self._call(self._core.refused, c, code)

    def _ask_sign(self, effect: Sign) -> None:
        body = SIGN_HEAD.pack(effect.c, effect.kind) + effect.body

        def answered(answer: bytes | WormholeRefusedError | ChannelLostError) -> None:
            if isinstance(answer, ChannelLostError) or self._statements.pop(effect.token, None) is None:
                return
            if isinstance(answer, WormholeRefusedError):
                self._counters[f"statement {effect.kind.name} refused"] += 1
            else:
                self._call(self._core.signed, effect.token, answer)

        self._channel.ask(FrameKind.SIGN, body, answered)

    def _ask_end(self, effect: EndEpoch) -> None:
        task = asyncio.get_running_loop().create_task(self._end(effect))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, effect: EndEpoch) -> None:
        wait_s = RETRY_S[0]
        while effect.c in self._ends:
            try:
                body = await self._channel.request(FrameKind.END_EPOCH, EPOCH.pack(effect.c))
            except ChannelLostError:
                return
            except WormholeRefusedError as refusal:
                self._counters[f"end of epoch refused: {refusal.code.name}"] += 1
                if refusal.code not in _PASSING:
                    self._ends.pop(effect.c, None)
                    return
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S[1])
                continue
            if self._ends.pop(effect.c, None) is not None:
                self._call(self._core.epoch_ended, EpochEnd(self._replica, effect.c, *EPOCH_END.unpack(body)))

    def _ask_report(self, body: bytes) -> None:
        self._reports.append(body)

        def answered(done: "asyncio.Future[bytes]") -> None:
            lost = done.cancelled() or isinstance(done.exception(), ChannelLostError)
            if not lost and body in self._reports:
                self._reports.remove(body)

        self._channel.request(FrameKind.REPORT, body).add_done_callback(answered)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a report cannot hold {type(value).__name__}")


def _raise(error: BaseException) -> None:
    raise error
