"""Request numbers: each is used once for each client key, for ever, and they do not run ahead of the client's window.

A replica answers a repeated number from its table, so a program that began again at 1 would be given old answers.
"""

import fcntl
import os
from pathlib import Path
from typing import Protocol

from cloudfit_orchestrator.model.errors import BadInputError

BLOCK = 64  # numbers reserved at once: a program that dies wastes at most so many of a window of thousands


class Numbers(Protocol):
    """A source of numbers."""

    def next(self) -> int:
        """A number above all earlier ones."""
        ...

    def close(self) -> None:
        """Give back what is not used, where possible."""
        ...


class MemoryNumbers:
    """For keys that live as long as the process."""

    def __init__(self, first: int = 1) -> None:
        """`first`: the first number."""
        self._next = first

    def next(self) -> int:
        """See `Numbers`."""
        self._next += 1
        return self._next - 1

    def close(self) -> None:
        """See `Numbers`."""


class FileNumbers:
    """For keys in files: the first free number stands in a file beside the key; several programs may share it."""

    def __init__(self, path: Path) -> None:
        """`path` is made if there is none."""
        self._path = path
        self._next = self._end = 0

    def next(self) -> int:
        """See `Numbers`. Raises BadInputError if the file holds no number."""
        if self._next == self._end:
            self._next = self._exchange(lambda first: first + BLOCK)
            self._end = self._next + BLOCK
        self._next += 1
        return self._next - 1

    def close(self) -> None:
        """Give back the rest of the block, if no other program took one after it."""
        rest, end = self._next, self._end
        if rest != end:
            self._exchange(lambda first: rest if first == end else first)
        self._next = self._end = 0

    def _exchange(self, change: "Change") -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            text = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "1"
            if not text.isdigit() or not 0 < int(text) < 1 << 62:
                raise BadInputError(
                    f"{self._path} holds {text!r}, not a request number",
                    next_command="use a new client key, or write a number above all that were used",
                )
            first = int(text)
            os.pwrite(fd, f"{change(first):020d}\n".encode(), 0)
            os.fsync(fd)
            return first
        finally:
            os.close(fd)


class Change(Protocol):
    """First free number to first free number."""

    def __call__(self, first: int, /) -> int: ...
