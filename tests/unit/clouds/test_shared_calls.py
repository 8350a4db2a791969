"""Threads that ask for the same share a call, and nobody gets an answer that is older than the question."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudfit_orchestrator.clouds.shared_calls import SharedCalls

ASKERS = 6


class Slow:
    """A call that begins, and ends when it may; it returns its own number."""

    def __init__(self):
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        number = self.calls
        self.begun.release()
        assert self.may_end.acquire(timeout=10)
        return number


def waiting(shared, key):
    """Until all askers but the one under way stand in line."""
    done = threading.Event()
    while not done.wait(0.001):
        line = shared._lines.get(key)
        if line is not None and line.users == ASKERS:
            return


def test_who_comes_during_a_call_waits_for_the_next_one_together():
    shared, slow = SharedCalls(), Slow()
    with ThreadPoolExecutor(ASKERS) as pool:
        first = pool.submit(shared.ask, "k", slow)
        assert slow.begun.acquire(timeout=10)
        others = [pool.submit(shared.ask, "k", slow) for _ in range(ASKERS - 1)]
        waiting(shared, "k")
        slow.may_end.release(2)
        assert first.result(10) == 1
        assert [o.result(10) for o in others] == [2] * (ASKERS - 1)
    assert slow.calls == 2
    assert shared._lines == {}


def test_other_keys_do_not_wait():
    shared, slow = SharedCalls(), Slow()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.ask, "a", slow)
        assert slow.begun.acquire(timeout=10)
        assert shared.ask("b", lambda: "other") == "other"
        slow.may_end.release()
        assert first.result(10) == 1


def test_an_error_is_of_who_met_it():
    shared = SharedCalls()

    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        shared.ask("k", fail)
    assert shared.ask("k", lambda: 1) == 1
    assert shared._lines == {}
