"""Histories of concurrent clients, and whether they are linearizable (Herlihy and Wing, TOPLAS'90).

The checker is Wing and Gong's search with the memory of Lowe (CCPE'17): a state reached with the same set of operations
done is not searched twice. A key-value store is a product of registers and linearizability is local, so each key is
checked alone; that is what makes it fast enough. An operation without a known outcome may have taken effect at any
moment after its invocation, or never.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from cloudfit_orchestrator.model.errors import UnknownError

MAX_STATES = 2_000_000  # of one key: about 300 MB; beyond it the answer is "could not tell", never "fine"

Value = bytes | None  # of a register; None: no such key
Result = bytes | bool | None  # of a call


class Kind(StrEnum):
    """Operations on one key."""

    PUT = "put"  # (value) -> None
    GET = "get"  # () -> the value or None
    DELETE = "delete"  # () -> whether there was a value
    CAS = "cas"  # (expected or None, value) -> whether it was replaced


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asks of one key. `value` for PUT and CAS, `expected` for CAS."""

    kind: Kind
    key: bytes
    value: Value = None
    expected: Value = None

    def apply(self, state: Value) -> tuple[Value, Result]:
        """The register's value after this call on `state`, and the call's result."""
        match self.kind:
            case Kind.PUT:
                return self.value, None
            case Kind.GET:
                return state, state
            case Kind.DELETE:
                return None, state is not None
            case Kind.CAS:
                return (self.value, True) if state == self.expected else (state, False)


@dataclass(frozen=True, slots=True)
class Operation:
    """A call in a history. `invoked` and `returned` are positions in one total order of all events."""

    client: str
    call: Call
    invoked: int
    returned: int | None = None  # None: the outcome is not known
    result: Result = None

    def __str__(self) -> str:
        c = self.call
        arguments = {Kind.PUT: f"{c.value!r}", Kind.CAS: f"{c.expected!r}, {c.value!r}"}.get(c.kind, "")
        outcome = "?" if self.returned is None else f"{self.result!r}"
        end = "…" if self.returned is None else f"{self.returned}"
        return f"[{self.invoked:>5}, {end:>5}] {self.client}: {c.kind}({arguments}) -> {outcome}"


@dataclass(frozen=True, slots=True)
class Violation:
    """A key whose history no order explains."""

    key: bytes
    longest: tuple[Operation, ...]  # the longest order found that explains its operations
    stuck: tuple[Operation, ...]  # operations that then had to come next, and none of which could

    def __str__(self) -> str:
        head = f"key {self.key!r}: {len(self.longest)} operations can be ordered, the last of them:"
        last = [f"  {o}" for o in self.longest[-8:]]
        return "\n".join([head, *last, "and none of these can follow:", *(f"  {o}" for o in self.stuck)])


class History:
    """Records operations as they happen. Events get their place by the order of the recorder's calls."""

    def __init__(self) -> None:
        self._clock = 0
        self._open: dict[int, Operation] = {}
        self._done: list[Operation] = []

    def _next(self) -> int:
        self._clock += 1
        return self._clock

    def invoke(self, client: str, call: Call) -> int:
        """`client` begins `call`. Returns the handle for `complete`."""
        at = self._next()
        self._open[at] = Operation(client, call, at)
        return at

    def complete(self, handle: int, result: Result) -> None:
        """The operation of `handle` returned `result`. What is never completed has an unknown outcome."""
        begun = self._open.pop(handle)
        self._done.append(Operation(begun.client, begun.call, begun.invoked, self._next(), result))

    @property
    def operations(self) -> list[Operation]:
        """All operations, in order of invocation, those of unknown outcome included."""
        return sorted([*self._done, *self._open.values()], key=lambda o: o.invoked)

    @property
    def pending(self) -> int:
        """Operations without an outcome so far."""
        return len(self._open)

    def check(self) -> Violation | None:
        """None if linearizable. Raises UnknownError if that cannot be told within MAX_STATES."""
        return check(self.operations)


def check(operations: Iterable[Operation]) -> Violation | None:
    """The violation of the first key (in order of keys) that has one, or None. Raises UnknownError."""
    keys: dict[bytes, list[Operation]] = defaultdict(list)
    for operation in operations:
        keys[operation.call.key].append(operation)
    for key in sorted(keys):
        violation = check_key(key, keys[key])
        if violation is not None:
            return violation
    return None


def check_key(key: bytes, operations: Iterable[Operation], *, initial: Value = None) -> Violation | None:
    """As `check`, for the operations on one `key`, whose register begins as `initial`."""
    # A read of unknown outcome constrains nothing.
    todo = sorted(
        (o for o in operations if o.returned is not None or o.call.kind is not Kind.GET), key=lambda o: o.invoked
    )
    must = sum(1 << i for i, o in enumerate(todo) if o.returned is not None)
    order: dict[tuple[int, Value], tuple[int, Value, int]] = {}  # how each state was reached: for the report
    best = (0, initial)
    best_done = 0
    seen = {(0, initial)}
    stack = [(0, initial)]
    while stack:
        done, state = stack.pop()
        if done & must == must:
            return None
        if (count := (done & must).bit_count()) > best_done:
            best, best_done = (done, state), count
        for i in _may_be_next(todo, done):
            after, result = todo[i].call.apply(state)
            if todo[i].returned is not None and result != todo[i].result:
                continue
            reached = (done | 1 << i, after)
            if reached not in seen:
                seen.add(reached)
                order[reached] = (done, state, i)
                stack.append(reached)
        if len(seen) > MAX_STATES:
            raise UnknownError(
                f"history of key {key!r} with {len(todo)} operations needs more than {MAX_STATES} states",
                next_command="check fewer operations a key, or let fewer of them end without an outcome",
            )
    stuck = tuple(todo[i] for i in _may_be_next(todo, best[0]) if todo[i].returned is not None)
    return Violation(key, _path(todo, order, best), stuck)


def _may_be_next(todo: list[Operation], done: int) -> list[int]:
    """Operations not in `done` that began before every other such one had returned."""
    found = []
    earliest: int | None = None
    i = ((~done) & (done + 1)).bit_length() - 1  # the lowest operation that is not done
    while i < len(todo):
        operation = todo[i]
        if not done >> i & 1:
            if earliest is not None and operation.invoked > earliest:
                break  # and so are all later ones
            found.append(i)
            if operation.returned is not None and (earliest is None or operation.returned < earliest):
                earliest = operation.returned
        i += 1
    return found


def _path(
    todo: list[Operation], order: dict[tuple[int, Value], tuple[int, Value, int]], end: tuple[int, Value]
) -> tuple[Operation, ...]:
    found = []
    while end in order:
        done, state, i = order[end]
        found.append(todo[i])
        end = (done, state)
    return tuple(reversed(found))
