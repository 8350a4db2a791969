"""The client table (protocol §3): each request once, its reply kept; deterministic, and bounded per client."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bft import clients
from cloudfit_orchestrator.bft.clients import (
    MAX_RESULT,
    TOO_LARGE,
    ClientWindow,
    Executed,
    execute,
    reply_root,
    reply_tree,
)
from cloudfit_orchestrator.bft.messages import BundleBody, Request, Result, reply_leaf
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.services.counter import CounterService, add, value

ME, YOU = b"m" * 32, b"y" * 32
WIDTH = 8


class Echo:
    """Counts executions; the result is as long as the operation says."""

    def __init__(self) -> None:
        self.executed: list[bytes] = []

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        self.executed.append(operation)
        return bytes(int.from_bytes(operation, "big"))


def window(store: StateStore, client: bytes) -> tuple[int, int]:
    row = ClientWindow(store, client)
    return row.low, row.high


def body(*requests: tuple[int, int], client: bytes = ME) -> BundleBody:
    return BundleBody("ledger", client, tuple(Request(n, add(x)) for n, x in requests))


def sized(number: int, size: int) -> BundleBody:
    return BundleBody("ledger", ME, (Request(number, size.to_bytes(4, "big")),))


def run(store: StateStore, *bodies: BundleBody) -> list[Executed]:
    return execute(store, CounterService(), bodies, WIDTH)[0]


def results(executed: list[Executed]) -> dict[tuple[bytes, int], int | None]:
    return {(e.client, r.number): value(r.result) for e in executed for r in e.results}


def test_a_repeated_request_is_answered_from_the_table() -> None:
    store = StateStore()
    first = run(store, body((1, 5), (2, 7)))
    assert results(first) == {(ME, 1): 5, (ME, 2): 12}
    root = store.root()
    assert run(store, body((2, 7)), body((1, 5))) == [Executed(ME, (first[0].results[1], first[0].results[0]))]
    assert store.root() == root, "nothing was executed again"


def test_another_operation_under_a_used_number_is_not_executed() -> None:
    store = StateStore()
    run(store, body((1, 5)))
    assert results(run(store, body((1, 99)))) == {(ME, 1): 5}


def test_requests_may_be_ordered_out_of_order() -> None:
    store = StateStore()
    run(store, body((5, 1)))
    assert results(run(store, body((3, 1)))) == {(ME, 3): 2}
    assert window(store, ME) == (0, 5)


def test_numbers_outside_the_window_get_no_reply_and_change_nothing() -> None:
    store = StateStore()
    run(store, body((1, 1)))
    root = store.root()
    assert run(store, body((2 + WIDTH, 1))) == []
    assert store.root() == root
    run(store, body((1 + WIDTH, 1)))
    assert window(store, ME) == (1, 1 + WIDTH)
    assert ClientWindow(store, ME).cached(1) is None, "its reply went with the window"
    assert run(store, body((1, 1))) == []
    assert [ClientWindow(store, ME).acceptable(n, WIDTH) for n in (1, 2, 9, 17, 18)] == [False, True, True, True, False]


def test_clients_do_not_share_a_window() -> None:
    store = StateStore()
    executed = run(store, body((1, 1)), body((1, 1), client=YOU), body((2, 1)))
    assert [(e.client, [r.number for r in e.results]) for e in executed] == [(ME, [1, 2]), (YOU, [1])]


def test_a_result_that_is_too_large_is_an_error_of_the_request() -> None:
    store = StateStore()
    echo = Echo()
    (done,), _ = execute(store, echo, (sized(1, MAX_RESULT + 1), sized(2, MAX_RESULT)), WIDTH)
    assert [len(r.result) if r.result != TOO_LARGE else -1 for r in done.results] == [-1, MAX_RESULT]


def test_kept_replies_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_REPLIES_BYTES", 1000)
    store = StateStore()
    echo = Echo()
    for n in range(1, 7):
        execute(store, echo, (sized(n, 400),), WIDTH)
    kept = [n for n in range(1, 7) if ClientWindow(store, ME).cached(n) is not None]
    assert kept == [4, 5, 6], "the window shrinks from below; the newest reply always fits"
    before = len(echo.executed)
    execute(store, echo, (sized(1, 400),), WIDTH)
    assert len(echo.executed) == before, "what fell out of the window is never executed again"


operations = st.lists(
    st.tuples(st.integers(1, WIDTH), st.integers(1, 9)), min_size=1, max_size=12, unique_by=lambda x: x[0]
)


@given(operations, st.data())
def test_any_order_of_duplicates_gives_the_same_table(wanted: list[tuple[int, int]], data: st.DataObject) -> None:
    """Several proposers may order a client's request more than once: only its first place counts."""
    once, often = StateStore(), StateStore()
    for item in wanted:
        run(once, body(item))
    done: list[tuple[int, int]] = []
    for item in wanted:
        done.append(item)
        repeats = data.draw(st.lists(st.sampled_from(done), max_size=3))
        batch = [body(item), *(body(again) for again in repeats)]
        run(often, *batch)
    assert once.root() == often.root()


@given(st.lists(st.tuples(st.sampled_from([ME, YOU]), st.integers(1, 40), st.integers(1, 9)), max_size=30))
def test_each_request_is_executed_at_most_once_and_deterministically(said: list[tuple[bytes, int, int]]) -> None:
    stores = [StateStore(), StateStore()]
    seen: set[tuple[bytes, int]] = set()
    total = 0
    for client, number, delta in said:
        before = ClientWindow(stores[0], client).acceptable(number, WIDTH) and (client, number) not in seen
        outcomes = [run(store, body((number, delta), client=client)) for store in stores]
        assert outcomes[0] == outcomes[1]
        if before:
            total += delta
            seen.add((client, number))
            assert results(outcomes[0]) == {(client, number): total}
    assert stores[0].root() == stores[1].root()
    fresh = StateStore.from_snapshot(Snapshot.from_chunks([stores[0].snapshot().chunk(i) for i in range(1024)]))
    assert [window(fresh, c) for c in (ME, YOU)] == [window(stores[0], c) for c in (ME, YOU)], (
        "it travels with the state"
    )


@given(st.integers(1, 20))
def test_every_clients_path_leads_to_the_root_of_the_replies(count: int) -> None:
    executed = [Executed(bytes([i]) * 32, (Result(i, b"x%d" % i),)) for i in range(count)]
    root, paths = reply_tree(executed)
    for item, path in zip(executed, paths, strict=True):
        assert reply_root(reply_leaf(item.client, item.results), path) == root
        assert reply_root(reply_leaf(item.client, (Result(99, b"lie"),)), path) != root
