"""The client SDK: signs bundles, sends them to a near replica and on time-out to all, believes f+1 equal answers.

All requests of one event-loop tick go out in one bundle, under one signature. Replicas may lie, be slow, or say they
are overloaded: none of that fails a request by itself, only its deadline does.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.messages import (
    MAX_CLIENT_FRAME,
    MAX_PEER_FRAME,
    Bundle,
    BundleBody,
    Overloaded,
    ReadReply,
    Replies,
    Request,
    bundle_bytes,
    decode_client,
    encode,
)
from cloudfit_orchestrator.bft.voting import Votes
from cloudfit_orchestrator.gateway.numbers import MemoryNumbers, Numbers
from cloudfit_orchestrator.gateway.reads import Reads
from cloudfit_orchestrator.guest.dialler import Dialler
from cloudfit_orchestrator.guest.links import SendQueue
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.errors import BadError, BadInputError, TemporaryError
from cloudfit_orchestrator.model.record import Client as Admitted
from cloudfit_orchestrator.model.record import ConfigRecord, Status, check_confirmations, open_record
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes
from cloudfit_orchestrator.wormhole.tls import Credentials

NEAR_TIMEOUT_S = 1.0  # then all replicas are asked
RESEND_FIRST_S = 1.0
RESEND_LAST_S = 8.0
FIRST_AWAY_S = 5.0  # a replica that let a request wait is not asked first for so long; doubles each time
LAST_AWAY_S = 300.0
DEADLINE_S = 30.0  # of one request
CHECK_S = 0.1  # between two looks for what is late
REFRESH_S = 1.0  # between two looks for a newer configuration
MAX_QUEUE = 8 << 20  # bytes that wait for one replica
MAX_WAITING = 100_000  # requests accepted and not answered yet
MAX_BUNDLE_REQUESTS = 256  # so that several clients fit into one batch
_REQUEST_OVERHEAD = 32  # bytes of framing around an operation, generously
_BUNDLE_OVERHEAD = 512

RecordSource = Callable[[], Awaitable[bytes | None]]
Route = Callable[[str, str], str]  # (replica, address in the record) -> address to dial


@dataclass(slots=True)
class _Bundle:
    data: bytes
    asked: str
    open: set[int]
    deadline_s: float
    due_s: float
    wait_s: float = RESEND_FIRST_S


@dataclass(slots=True)
class _Waiting:
    operation: bytes
    answer: "asyncio.Future[bytes]"
    deadline_s: float


@dataclass(frozen=True, slots=True)
class _Replica:
    peer_id: str
    address: str
    channel_ca: bytes


@dataclass(slots=True)
class Figures:
    """What happened so far."""

    answered: int = 0
    unordered: int = 0  # of them: reads that R replicas answered equally
    bundles: int = 0
    resent: int = 0
    overloaded: int = 0
    deadlines: int = 0
    lies: Counter[str] = field(default_factory=Counter)  # wrong results with a good signature, by replica
    unsigned: Counter[str] = field(default_factory=Counter)  # replies that proved nothing, by replica


class Client:
    """One client key's connection to a group. Use as an async context manager, in one event loop."""

    def __init__(
        self,
        envelope: bytes,
        controller_keys: list[bytes],
        *,
        admitted: Admitted,
        key: Ed25519PrivateKey,
        numbers: Numbers | None = None,
        near: str | None = None,
        newer: RecordSource | None = None,
        route: Route = lambda _, address: address,
    ) -> None:
        """`envelope`: the ACTIVE record, which is verified; `admitted`: the client's entry in it; `key`: its own.

        `numbers`: see gateway/numbers; needed wherever the key outlives the process. `near`: the replica to ask first.
        `newer` gives the newest ACTIVE envelope; without it the client cannot follow a reconfiguration. `route`: where
        replicas are dialled if not at their addresses. Raises BadError if the record does not verify, BadInputError if
        the key is not admitted in it.
        """
        self._controller_keys = controller_keys
        self._verifier = Ed25519Verifier()
        self._record = self._open(envelope)
        self._key = key
        self._public = public_bytes(key)
        if self._record.client(self._public) is None:
            raise BadInputError(
                f"client {admitted.name} is not admitted in configuration {self._record.c} of {self._record.group}",
                next_command="add the client to the group",
            )
        self._credentials = Credentials(key, admitted.certificate)
        self._numbers: Numbers = numbers or MemoryNumbers()
        self._preferred = self._near = near or self._record.members[0].replica
        self._back_s = 0.0  # when the preferred replica is tried again
        self._away_s = FIRST_AWAY_S
        self._newer = newer
        self._route = route
        self._votes = Votes(self._public, Ed25519Verifier())
        self._votes.learn(self._record)
        self._diallers: dict[str, Dialler] = {}
        self._outbox: deque[_Waiting] = deque()
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._bundles: deque[_Bundle] = deque()
        self._of_number: dict[int, _Bundle] = {}
        self._flushing = False
        self._turn = Turn()
        self._tasks: list[asyncio.Task[None]] = []
        self._reads = Reads(self._public, self._verifier, lambda: self._record, self._to_all)
        self.counters: Counter[str] = Counter()
        self.figures = Figures(lies=self._votes.lies, unsigned=self._votes.unsigned)

    async def __aenter__(self) -> Self:
        self._connect()
        self._tasks = [asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for dialler in self._diallers.values():
            dialler.close()
        self._reads.close()
        for future in [*self._answers.values(), *(w.answer for w in self._outbox)]:
            future.cancel()
        self._numbers.close()
        await asyncio.sleep(0)

    @property
    def record(self) -> ConfigRecord:
        """The configuration that is believed to be the newest."""
        return self._record

    def submit(self, operation: bytes, *, timeout_s: float = DEADLINE_S) -> "asyncio.Future[bytes]":
        """Send an operation; the future gives its result. It fails with TemporaryError at the deadline: the operation
        may have been executed then, or may still be.

        Raises BadInputError if the operation does not fit into a bundle, TemporaryError if too many wait.
        """
        most = min(MAX_CLIENT_FRAME, self._record.parameters.max_batch_bytes) - 2 * _BUNDLE_OVERHEAD
        if len(operation) > most:
            raise BadInputError(f"operation of {len(operation)} bytes, the limit is {most}")
        if len(self._answers) + len(self._outbox) >= MAX_WAITING:
            raise TemporaryError(f"{MAX_WAITING} requests wait for their answers already")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(operation, loop.create_future(), loop.time() + timeout_s)
        self._outbox.append(waiting)
        self._flush_soon()
        return waiting.answer

    async def read(self, operation: bytes, *, timeout_s: float = DEADLINE_S) -> bytes:
        """The result of an operation that changes nothing, linearizable: from R equal answers if they come soon, else
        ordered like any other. Fails as `submit` does.
        """
        if self._reads.worth_trying:
            result = await self._reads.ask(operation)
            if result is not None:
                self.figures.answered += 1
                self.figures.unordered += 1
                return result
        return await self.submit(operation, timeout_s=timeout_s)

    async def call(self, operation: bytes, *, timeout_s: float = DEADLINE_S) -> bytes:
        """`submit`, and wait."""
        return await self.submit(operation, timeout_s=timeout_s)

    # --------------------------------------------------------------------------------------------------------- sending
    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        with self._turn:
            while self._outbox and (chosen := self._choose()):
                self._send_bundle(chosen)

    def _choose(self) -> list[tuple[int, _Waiting]]:
        """Requests for the next bundle: as many as fit it, the client's window, and one batch."""
        parameters = self._record.parameters
        room = min(MAX_CLIENT_FRAME, parameters.max_batch_bytes) - _BUNDLE_OVERHEAD
        most = min(parameters.max_batch_requests, MAX_BUNDLE_REQUESTS)
        chosen: list[tuple[int, _Waiting]] = []
        while self._outbox and len(chosen) < most and self._window_open(len(chosen)):
            waiting = self._outbox[0]
            room -= len(waiting.operation) + _REQUEST_OVERHEAD
            if chosen and room < 0:
                break
            self._outbox.popleft()
            if not waiting.answer.done():
                chosen.append((self._numbers.next(), waiting))
        return chosen

    def _window_open(self, more: int) -> bool:
        """Half of the window stays free: replicas move theirs by what they executed, perhaps in another order."""
        width = max(1, self._record.parameters.client_window // 2)
        if not self._answers:
            return more < width
        first = next(iter(self._answers))
        last = next(reversed(self._answers))
        return last + more + 1 - first < width

    def _send_bundle(self, chosen: list[tuple[int, _Waiting]]) -> None:
        now_s = asyncio.get_running_loop().time()
        requests = tuple(Request(number, waiting.operation) for number, waiting in chosen)
        body = encode(BundleBody(self._record.life, self._public, requests))
        data = encode(Bundle(body, self._key.sign(bundle_bytes(body))))
        near = self._nearest(now_s)
        deadline_s = max(waiting.deadline_s for _, waiting in chosen)
        bundle = _Bundle(data, near, {n for n, _ in chosen}, deadline_s, now_s + NEAR_TIMEOUT_S)
        for number, waiting in chosen:
            self._answers[number] = waiting.answer
            self._of_number[number] = bundle
            self._votes.expect(number)
        self._bundles.append(bundle)
        self.figures.bundles += 1
        self._diallers[near].send(data)

    def _nearest(self, now_s: float) -> str:
        """The preferred replica, unless it let a request wait not long ago, or cannot be reached."""
        if self._near != self._preferred and now_s >= self._back_s:
            self._near = self._preferred
        near = self._diallers.get(self._near)
        if near is not None and near.connected:
            return self._near
        reachable = (replica for replica, dialler in self._diallers.items() if dialler.connected)
        return next(reachable, self._near if near is not None else next(iter(self._diallers)))

    def _avoid(self, replica: str, now_s: float) -> None:
        """It may be down, or overlook us: another is asked first for a while."""
        if replica != self._near:
            return
        names = list(self._diallers)
        others = names[names.index(replica) + 1 :] + names[: names.index(replica)] if replica in names else names
        self._near = next((other for other in others if self._diallers[other].connected), replica)
        if replica == self._preferred:
            self._back_s = now_s + self._away_s
            self._away_s = min(2 * self._away_s, LAST_AWAY_S)

    # ------------------------------------------------------------------------------------------------------- receiving
    def _received(self, replica: str, data: bytes) -> None:
        try:
            message = decode_client(data)
        except (BadError, ValueError):
            self._votes.unsigned[replica] += 1
            return
        if isinstance(message, Overloaded):
            self.figures.overloaded += 1
            self._ask_others(replica, message)
        elif isinstance(message, ReadReply):
            if not self._reads.take(message):
                self._votes.unsigned[replica] += 1
        elif isinstance(message, Replies):
            for number, result in self._votes.take(replica, message).items():
                self._answer(number, result)
            if self._outbox:
                self._flush_soon()

    def _answer(self, number: int, result: bytes) -> None:
        future = self._answers.pop(number, None)
        self._close_number(number)
        if future is not None and not future.done():
            self.figures.answered += 1
            future.set_result(result)

    def _close_number(self, number: int) -> None:
        bundle = self._of_number.pop(number, None)
        if bundle is not None:
            bundle.open.discard(number)

    def _ask_others(self, replica: str, message: Overloaded) -> None:
        """One replica's word: the bundle goes to all a little later, at most once for each resend interval."""
        soon_s = asyncio.get_running_loop().time() + NEAR_TIMEOUT_S / 4
        for number in message.numbers[:MAX_BUNDLE_REQUESTS]:
            bundle = self._of_number.get(number)
            if bundle is not None and bundle.wait_s == RESEND_FIRST_S and replica == self._near:
                bundle.due_s = min(bundle.due_s, soon_s)

    # -------------------------------------------------------------------------------------------------------- watching
    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        looked_s = loop.time()
        while True:
            await asyncio.sleep(CHECK_S)
            now_s = loop.time()
            late = self._resend(now_s)
            unknown = self._votes.unknown_c is not None and self._votes.unknown_c > self._record.c
            if self._newer is not None and (late or unknown) and now_s - looked_s > REFRESH_S:
                looked_s = now_s
                await self._refresh(self._newer)

    def _resend(self, now_s: float) -> bool:
        """Send late bundles to all, give up those past their deadline. True if something is late."""
        late = False
        while self._bundles and not self._bundles[0].open:
            self._bundles.popleft()
        for bundle in self._bundles:
            if not bundle.open or now_s < bundle.due_s:
                continue
            late = True
            if now_s >= bundle.deadline_s:
                self._give_up(bundle)
                continue
            if bundle.wait_s == RESEND_FIRST_S:
                self._avoid(bundle.asked, now_s)
            bundle.due_s = now_s + bundle.wait_s
            bundle.wait_s = min(2 * bundle.wait_s, RESEND_LAST_S)
            self.figures.resent += 1
            self._to_all(bundle.data)
        while self._outbox and (self._outbox[0].answer.done() or now_s >= self._outbox[0].deadline_s):
            self._fail(self._outbox.popleft().answer)
        return late

    def _to_all(self, data: bytes) -> None:
        for dialler in self._diallers.values():
            dialler.send(data)

    def _give_up(self, bundle: _Bundle) -> None:
        for number in list(bundle.open):
            self._votes.give_up(number)
            self._close_number(number)
            future = self._answers.pop(number, None)
            if future is not None:
                self._fail(future)
        self._flush_soon()

    def _fail(self, future: "asyncio.Future[bytes]") -> None:
        if not future.done():
            self.figures.deadlines += 1
            connected = [replica for replica, dialler in self._diallers.items() if dialler.connected]
            future.set_exception(
                TemporaryError(
                    f"no {self._record.f + 1} equal answers of {self._record.group} in time "
                    f"(configuration {self._record.c}, connected to {', '.join(connected) or 'nobody'})",
                    next_command=f"cloudfit group show {self._record.group}",
                )
            )

    # --------------------------------------------------------------------------------------------------- configuration
    def update(self, envelope: bytes) -> bool:
        """Follow a newer ACTIVE record; False if it is not newer. Raises BadError if it does not verify."""
        record = self._open(envelope)
        if record.c <= self._record.c:
            return False
        self._record = record
        self._votes.learn(record)
        self._connect()
        for bundle in self._bundles:
            bundle.due_s = 0.0  # replicas of the old configuration may have lost it: to all of the new one, now
        return True

    async def _refresh(self, newer: RecordSource) -> None:
        with contextlib.suppress(BadError, TemporaryError):
            envelope = await newer()
            if envelope is not None and self.update(envelope):
                self.counters["reconfigured"] += 1

    def _open(self, envelope: bytes) -> ConfigRecord:
        record = open_record(envelope, self._controller_keys)
        if record.status is not Status.ACTIVE:
            raise BadError(f"record c={record.c} of {record.group} is {record.status}, a client needs an ACTIVE one")
        check_confirmations(record, self._verifier)
        return record

    def _connect(self) -> None:
        members = self._record.members
        wanted = {
            m.replica: _Replica(f"{m.replica}#{m.incarnation}", self._route(m.replica, m.address), m.channel_ca)
            for m in members
        }
        for replica, dialler in list(self._diallers.items()):
            if wanted.get(replica) != dialler.peer:
                dialler.close()
                del self._diallers[replica]
        for replica, peer in wanted.items():
            if replica not in self._diallers:
                self._diallers[replica] = self._dial(replica, peer)

    def _dial(self, replica: str, peer: _Replica) -> Dialler:
        return Dialler(
            peer,
            group=self._record.group,
            credentials=self._credentials,
            received=lambda _, data: self._received(replica, data),
            limit=MAX_PEER_FRAME,
            queue=SendQueue(MAX_QUEUE, self.counters, f"dropped for {replica}"),
            counters=self.counters,
            turn=self._turn,
        )
