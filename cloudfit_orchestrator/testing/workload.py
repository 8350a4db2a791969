"""Clients of a simulated group: they write and read a few keys, ask again when no answer comes, and record a history.

Each operation carries a name of its own. The service underneath notes names in the state itself, so an operation that
took effect twice is seen in the lineage of states in which it did, whatever was rolled back meanwhile.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cloudfit_orchestrator.bft.messages import (
    Bundle,
    BundleBody,
    Overloaded,
    Read,
    ReadReply,
    Replies,
    Request,
    bundle_bytes,
    decode_client,
    encode,
)
from cloudfit_orchestrator.bft.readvotes import ReadVotes
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.voting import Votes
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.services.kv import (
    CompareAndSwap,
    Delete,
    Done,
    Get,
    KvService,
    Put,
    Value,
    decode_result,
    encode_operation,
)
from cloudfit_orchestrator.testing.crypto import Signer
from cloudfit_orchestrator.testing.history import Call, History, Result
from cloudfit_orchestrator.testing.history import Kind as Of
from cloudfit_orchestrator.testing.network import Schedule

NAME_BYTES = 8
RETRY_S = 0.6
RETRY_SPREAD = 0.2  # of it, to both sides
BUNDLE_SIZES = (1, 1, 1, 2, 3)
MAX_RETRY_S = 4.0
READ_WAIT_S = 0.25  # for R equal answers; then the read is ordered


def waiting_s(operations: int, faulty: float) -> float:
    """How long a client waits for its own retries until so many operations are answered, if that share of the members
    is faulty: it asks one member first, and all others only when that one has not helped.
    """
    bundles = operations * len(BUNDLE_SIZES) / sum(BUNDLE_SIZES)
    return bundles * faulty * RETRY_S * (1 + RETRY_SPREAD)


class OnceService:
    """The kv service, watched: `executed` is told of each operation, and whether the state has it already."""

    def __init__(self, executed: Callable[[bytes, bool], None], *, lies: Callable[[], bool]) -> None:
        """While `lies()`, some results are made up."""
        self._kv = KvService()
        self._executed = executed
        self._lies = lies

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        """See `bft.interfaces.Service`."""
        name, inner = operation[:NAME_BYTES], operation[NAME_BYTES:]
        mark = b"once/" + name
        self._executed(operation, store.get(mark) is not None)
        store.put(mark, b"")
        result = self._kv.execute(store, inner)
        if name[-1:] and name[-1] % 2 and self._lies():
            return encode_operation(Put(b"made", b"up")) if name[-1] % 4 == 1 else KvService().execute(store, b"")
        return result

    def read(self, store: StateStore, operation: bytes) -> bytes | None:
        """See `bft.interfaces.Readable`."""
        return self._kv.read(store, operation[NAME_BYTES:])


def to_operation(call: Call) -> bytes:
    """The kv operation of a call in a history."""
    match call.kind:
        case Of.PUT:
            assert call.value is not None
            return encode_operation(Put(call.key, call.value))
        case Of.GET:
            return encode_operation(Get(call.key))
        case Of.DELETE:
            return encode_operation(Delete(call.key))
        case Of.CAS:
            return encode_operation(CompareAndSwap(call.key, call.expected, call.value))


def to_result(call: Call, data: bytes) -> Result:
    """The call's result in a history. Raises BadError if the service did not answer so."""
    result = decode_result(data)
    match call.kind, result:
        case Of.PUT, Done():
            return None
        case Of.GET, Value(value):
            return value
        case Of.DELETE, Done(changed):
            return changed
        case Of.CAS, Done():
            return True
        case Of.CAS, Value():
            return False
    raise BadError(f"{call.kind} was answered by {result!r}")


class WrongAnswerError(AssertionError):
    """A client believes an answer that the service never gives."""


class Reach(Protocol):
    """What a client needs of the simulation around it."""

    schedule: Schedule

    def ask(self, client: str, key: bytes, replica: str, body: bytes) -> None:
        """A frame of the client with that name and raw key to the machine of a member."""
        ...

    def issued(self, operation: bytes) -> None:
        """A client has asked for it: it may be executed."""
        ...

    def newest(self) -> ConfigRecord:
        """The ACTIVE record in CONFIG STORAGE."""
        ...


@dataclass(slots=True)
class Open:
    """A bundle without all of its answers."""

    frame: bytes
    calls: dict[int, tuple[int, Call]]  # number -> (handle in the history, call)
    retry_s: float = RETRY_S
    turned_away: bool = False  # by the one that was asked first


@dataclass(frozen=True, slots=True)
class Reading:
    """How often a client reads without ordering. `rng` is for this alone, so that runs without reads draw as ever."""

    rng: random.Random
    share: float = 0.0  # of its turns

    def now(self) -> bool:
        """Whether this turn is such a one."""
        return self.share > 0 and self.rng.random() < self.share


class SimClient:
    """One closed loop: a bundle at a time, until `operations` are answered."""

    def __init__(
        self,
        reach: Reach,
        *,
        name: str,
        key: Signer,
        verifier: Verifier,
        history: History,
        rng: random.Random,
        keys: list[bytes],
        operations: int,
        pause_s: float,
        reading: Reading,
    ) -> None:
        """`keys` are shared with other clients; `pause_s` is the mean time between answer and next bundle."""
        self.name = name
        self.key = key
        self.left = operations
        self.answered = 0
        self._reach = reach
        self._history = history
        self._rng = rng
        self._keys = keys
        self._pause_s = pause_s
        self._reading = reading
        self._number = 0
        self._open: Open | None = None
        self._votes = Votes(key.public, verifier)
        self._reads = ReadVotes(key.public, verifier)
        self._read: list[tuple[int, Call]] = []  # (handle in the history, call) of the read under way
        self.unordered = 0  # reads that R replicas answered equally
        self._last: dict[bytes, bytes | None] = {}  # what this client saw last: good guesses for CAS

    @property
    def idle(self) -> bool:
        """Every operation was answered."""
        return self._open is None and not self._read and self.left <= 0

    @property
    def open_frame(self) -> bytes | None:
        """The bundle that is not answered yet, as it was sent."""
        return self._open.frame if self._open is not None else None

    def start(self) -> None:
        """Begin."""
        self._plan()

    def read_all(self) -> None:
        """When idle: one more read of each key."""
        assert self.idle
        self._send([Call(Of.GET, key) for key in self._keys])

    def _plan(self) -> None:
        if self.left > 0:
            self._reach.schedule.after(self._rng.expovariate(1 / self._pause_s), self._next)

    def _next(self) -> None:
        count = min(self.left, self._rng.choice(BUNDLE_SIZES))
        self.left -= count
        if self._reading.now():
            self._look([Call(Of.GET, self._reading.rng.choice(self._keys)) for _ in range(count)])
        else:
            self._send([self._call() for _ in range(count)])

    def _call(self) -> Call:
        key = self._rng.choice(self._keys)
        value = f"{self.name}:{self._number}:{self._rng.randrange(1 << 20)}".encode()
        kind = self._rng.choice([Of.GET, Of.GET, Of.PUT, Of.PUT, Of.CAS, Of.CAS, Of.DELETE])
        if kind is Of.PUT:
            return Call(kind, key, value)
        if kind is Of.CAS:
            return Call(kind, key, value, self._last.get(key))
        return Call(kind, key)

    def _look(self, calls: list[Call]) -> None:
        """Read without ordering; what R members do not answer equally is ordered."""
        self._number += 1
        self._read = [(self._history.invoke(self.name, call), call) for call in calls]
        read = Read(self._number, tuple(bytes(NAME_BYTES) + to_operation(call) for call in calls))
        record = self._reach.newest()
        self._reads.expect(read, record)
        for member in record.members:
            self._ask(member.replica, encode(read))

        def late() -> None:
            if self._reads.give_up(read.number):
                self._settle((None,) * len(self._read))

        self._reach.schedule.after(READ_WAIT_S, late)

    def _settle(self, results: tuple[bytes | None, ...]) -> None:
        read, self._read = self._read, []
        again = []
        for (handle, call), result in zip(read, results, strict=True):
            if result is None:
                again.append((handle, call))
            else:
                self.unordered += 1
                self._complete(handle, call, result)
        if again:
            self._order(again)
        else:
            self._plan()

    def _send(self, calls: list[Call]) -> None:
        self._order([(self._history.invoke(self.name, call), call) for call in calls])

    def _order(self, calls: list[tuple[int, Call]]) -> None:
        requests = []
        opened: dict[int, tuple[int, Call]] = {}
        for handle, call in calls:
            self._number += 1
            self._votes.expect(self._number)
            opened[self._number] = (handle, call)
            name = self.key.public[:4] + self._number.to_bytes(4, "big")
            operation = name + to_operation(call)
            self._reach.issued(operation)
            requests.append(Request(self._number, operation))
        body = encode(BundleBody(self._reach.newest().life, self.key.public, tuple(requests)))
        self._open = Open(encode(Bundle(body, self.key.sign(bundle_bytes(body)))), opened)
        near = self._rng.choice(self._reach.newest().members)
        self._ask(near.replica, self._open.frame)
        self._plan_retry(self._open)

    def _ask(self, replica: str, frame: bytes) -> None:
        self._reach.ask(self.name, self.key.public, replica, frame)

    def _plan_retry(self, waiting: Open) -> None:
        def again() -> None:
            if self._open is waiting:
                for member in self._reach.newest().members:
                    self._ask(member.replica, waiting.frame)
                waiting.retry_s = min(MAX_RETRY_S, 2 * waiting.retry_s)
                self._plan_retry(waiting)

        self._reach.schedule.after(waiting.retry_s * self._rng.uniform(1 - RETRY_SPREAD, 1 + RETRY_SPREAD), again)

    def receive(self, replica: str, body: bytes) -> None:
        """A frame on the connection to `replica`; what is no correctly signed reply to an open request is nothing."""
        try:
            message = decode_client(body)
        except BadError:
            return
        if isinstance(message, ReadReply):
            self._seen(message)
        if isinstance(message, Overloaded) and self._open is not None and not self._open.turned_away:
            self._open.turned_away = True  # whoever was asked first cannot help: ask all
            for member in self._reach.newest().members:
                self._ask(member.replica, self._open.frame)
        if not isinstance(message, Replies) or self._open is None:
            return
        self._votes.learn(self._reach.newest())
        for number, result in self._votes.take(replica, message).items():
            if number in self._open.calls:
                self._answered(number, result)
        if not self._open.calls:
            self._open = None
            self._plan()

    def _seen(self, reply: ReadReply) -> None:
        try:
            outcome = self._reads.take(reply)
        except BadError:
            return
        if outcome is not None:
            self._settle(outcome.results)

    def _answered(self, number: int, data: bytes) -> None:
        assert self._open is not None
        handle, call = self._open.calls.pop(number)
        self._complete(handle, call, data)

    def _complete(self, handle: int, call: Call, data: bytes) -> None:
        try:
            result = to_result(call, data)
        except BadError as error:
            raise WrongAnswerError(f"{self.name} believes it: {error}") from error
        self._history.complete(handle, result)
        self.answered += 1
        if call.kind is Of.GET:
            self._last[call.key] = result if isinstance(result, bytes) else None
        elif call.kind is Of.PUT:
            self._last[call.key] = call.value
