"""The checker says of a history what trying all orders says; and it copes with histories as long as real ones."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.model.errors import UnknownError
from cloudfit_orchestrator.testing import history as checker
from cloudfit_orchestrator.testing.history import Call, History, Kind, Operation, Value, check, check_key

KEY = b"k"
VALUES = st.sampled_from([None, b"a", b"b"])
SOME = st.sampled_from([b"a", b"b"])
CALLS = st.one_of(
    st.builds(lambda v: Call(Kind.PUT, KEY, v), SOME),
    st.just(Call(Kind.GET, KEY)),
    st.just(Call(Kind.DELETE, KEY)),
    st.builds(lambda e, v: Call(Kind.CAS, KEY, v, e), VALUES, SOME),
)


def possible_results(call: Call) -> list[Value | bool]:
    return {Kind.PUT: [None], Kind.GET: [None, b"a", b"b"]}.get(call.kind, [True, False])  # type: ignore[return-value]


@st.composite
def histories(draw: st.DrawFn, *, max_size: int = 5) -> list[Operation]:
    """Any operations at any times with any results: most are not linearizable."""
    calls = draw(st.lists(CALLS, min_size=1, max_size=max_size))
    events = draw(st.permutations([*range(len(calls)), *range(len(calls))]))
    found = []
    for i, call in enumerate(calls):
        invoked, returned = (at for at, who in enumerate(events) if who == i)
        known = draw(st.booleans() | st.just(value=True))
        result = draw(st.sampled_from(possible_results(call)))
        found.append(Operation(f"c{i}", call, invoked, returned if known else None, result if known else None))
    return found


@st.composite
def linearizable_histories(draw: st.DrawFn) -> list[Operation]:
    """Operations that really took effect, one after the other, each within its interval; unknown ones perhaps not."""
    calls = draw(st.lists(CALLS, min_size=1, max_size=30))
    state: Value = None
    found = []
    for i, call in enumerate(calls):
        known = draw(st.booleans() | st.just(value=True))
        happened = known or draw(st.booleans())
        after, result = call.apply(state)
        if happened:
            state = after
        moment = 100 * i
        invoked = moment - draw(st.integers(0, 300)) * 2 - 1
        returned = moment + draw(st.integers(0, 300)) * 2 + 2
        found.append(Operation(f"c{i}", call, invoked, returned if known else None, result if known else None))
    return found


def brute_force(operations: list[Operation]) -> bool:
    """Whether any order of any subset that has all completed operations explains them."""
    completed = [o for o in operations if o.returned is not None]
    unknown = [o for o in operations if o.returned is None]
    for size in range(len(unknown) + 1):
        for extra in itertools.combinations(unknown, size):
            for order in itertools.permutations([*completed, *extra]):
                if explains(order):
                    return True
    return False


def explains(order: tuple[Operation, ...]) -> bool:
    state: Value = None
    for i, operation in enumerate(order):
        if any(later.returned is not None and later.returned < operation.invoked for later in order[i + 1 :]):
            return False
        state, result = operation.call.apply(state)
        if operation.returned is not None and result != operation.result:
            return False
    return True


@given(histories())
def test_agrees_with_trying_all_orders(operations: list[Operation]) -> None:
    assert (check(operations) is None) == brute_force(operations)


@given(linearizable_histories())
def test_accepts_what_really_happened(operations: list[Operation]) -> None:
    assert check(operations) is None


@given(linearizable_histories(), st.data())
def test_mutated_histories_are_judged_as_by_trying_all_orders(operations: list[Operation], data: st.DataObject) -> None:
    few = operations[:5]
    i = data.draw(st.integers(0, len(few) - 1))
    o = few[i]
    result = data.draw(st.sampled_from(possible_results(o.call)))
    few[i] = Operation(o.client, o.call, o.invoked, o.invoked + 1, result)
    assert (check(few) is None) == brute_force(few)


def put(client: str, value: bytes, invoked: int, returned: int | None) -> Operation:
    return Operation(client, Call(Kind.PUT, KEY, value), invoked, returned)


def get(client: str, result: Value, invoked: int, returned: int) -> Operation:
    return Operation(client, Call(Kind.GET, KEY), invoked, returned, result)


def test_a_stale_read_is_found_and_named() -> None:
    stale = get("c2", None, 3, 4)
    violation = check([put("c1", b"a", 1, 2), stale])
    assert violation is not None
    assert violation.stuck == (stale,)
    assert "get() -> None" in str(violation)


def test_a_read_may_not_go_back() -> None:
    write = put("c1", b"a", 1, 10)
    assert check([write, get("c2", None, 2, 3), get("c2", b"a", 4, 5)]) is None
    assert check([write, get("c2", b"a", 2, 3), get("c2", None, 4, 5)]) is not None


def test_a_lost_acknowledged_write_is_found() -> None:
    assert check([put("c1", b"a", 1, 2), put("c1", b"b", 3, 4), get("c1", b"a", 5, 6)]) is not None


def test_a_write_of_unknown_outcome_may_take_effect_late_or_never() -> None:
    lost = put("c1", b"a", 1, None)
    assert check([lost, get("c2", None, 2, 3)]) is None
    assert check([lost, get("c2", None, 2, 3), get("c2", b"a", 4, 5)]) is None
    assert check([lost, get("c2", b"a", 2, 3), get("c2", None, 4, 5)]) is not None


def test_two_winners_of_one_compare_and_swap_are_found() -> None:
    cas = Call(Kind.CAS, KEY, b"a", None)
    both = [Operation("c1", cas, 1, 3, result=True), Operation("c2", cas, 2, 4, result=True)]
    assert check(both) is not None
    assert check([both[0], Operation("c2", cas, 2, 4, result=False)]) is None


def test_keys_are_checked_alone() -> None:
    other = Operation("c1", Call(Kind.PUT, b"other", b"x"), 1, 2)
    assert check([other, get("c2", None, 3, 4)]) is None


def test_the_recorder_orders_events_by_its_calls() -> None:
    history = History()
    first = history.invoke("c1", Call(Kind.PUT, KEY, b"a"))
    second = history.invoke("c2", Call(Kind.GET, KEY))
    history.complete(first, None)
    history.complete(second, None)
    assert history.check() is None
    third = history.invoke("c2", Call(Kind.GET, KEY))
    history.complete(third, None)
    assert history.check() is not None
    assert history.pending == 0


def test_a_long_history_of_many_clients_is_checked() -> None:
    rng = random.Random(1)
    state: Value = None
    operations = []
    for i in range(3000):
        call = rng.choice([Call(Kind.GET, KEY), Call(Kind.PUT, KEY, b"%d" % i), Call(Kind.CAS, KEY, b"%d" % i, state)])
        state, result = call.apply(state)
        at = 10 * i
        operations.append(Operation("c", call, at - 2 * rng.randrange(20) - 1, at + 2 * rng.randrange(20) + 2, result))
    assert check(operations) is None


def test_says_so_when_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "MAX_STATES", 10)
    lost = [put("c1", b"%d" % i, i, None) for i in range(8)]
    with pytest.raises(UnknownError, match="more than 10 states"):
        check_key(KEY, [*lost, get("c2", b"never", 20, 21)])
