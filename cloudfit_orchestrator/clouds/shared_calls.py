"""Threads that want to know the same at the same time ask once."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Call:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.result: Any = None
        self.good = False


class _Line:
    """Who waits for one thing: at most one call is under way, and one more is waited for."""

    def __init__(self) -> None:
        self.running = threading.Lock()
        self.next: _Call | None = None
        self.users = 0


class SharedCalls:
    """`ask` from any thread. An answer is never older than the question: its call began after the caller came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[Hashable, _Line] = {}

    def ask(self, key: Hashable, call: Callable[[], _T]) -> _T:
        """What `call` returns, here or in a thread that asked for the same `key`. Results are shared: change none."""
        with self._lock:
            line = self._lines.setdefault(key, _Line())
            line.users += 1
            mine = line.next is None
            waited = line.next = line.next or _Call()
        try:
            if not mine:
                waited.ended.wait()
                return waited.result if waited.good else call()  # an error is of who met it
            return self._run(line, waited, call)
        finally:
            with self._lock:
                line.users -= 1
                if not line.users:
                    del self._lines[key]

    def _run(self, line: _Line, waited: _Call, call: Callable[[], _T]) -> _T:
        try:
            with line.running:
                with self._lock:
                    line.next = None  # who comes from now on waits for another one
                result = call()
            waited.result, waited.good = result, True
            return result
        finally:
            waited.ended.set()
