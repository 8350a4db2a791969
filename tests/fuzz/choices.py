"""Bytes as a sequence of choices: a fuzzer that changes a byte changes one choice, and any bytes mean something.

Deterministic and free of any fuzzing engine, so that an input found by one is a regression test without it.
"""

from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

MAX_ITEMS = 4  # of a list
EDGES = (0, 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -(1 << 63))
NAMES = ("r0", "r1", "r2", "", "stranger", "r2#3")
OCTETS = (b"", b"x", bytes(32), bytes(64), b"\xff" * 32)


class Choices:
    """Reads `data` from its beginning; behind its end everything is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether something is left."""
        return self._at < len(self._data)

    def raw(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def rest(self) -> bytes:
        return self.raw(len(self._data))

    def byte(self) -> int:
        return (self.raw(1) or b"\0")[0]

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.byte() % len(options)]

    def integer(self) -> int:
        """Mostly small, sometimes an edge of what a field can hold."""
        first = self.byte()
        if first < 192:
            return first % 8
        return EDGES[first % len(EDGES)] if first < 240 else int.from_bytes(self.raw(8), "big")

    def octets(self) -> bytes:
        first = self.byte()
        return OCTETS[first % len(OCTETS)] if first < 160 else self.raw(first - 160)

    def build(self, kind: Any) -> Any:
        """A value of that type: messages, tuples of them, unions, and what their fields hold."""
        if kind in (int, str, bytes, bool):
            return {int: self.integer, str: lambda: self.pick(NAMES), bytes: self.octets, bool: self._flag}[kind]()
        origin = get_origin(kind)
        if origin is tuple:
            inner = get_args(kind)
            if inner[-1] is Ellipsis:
                return tuple(self.build(inner[0]) for _ in range(self.byte() % (MAX_ITEMS + 1)))
            return tuple(self.build(item) for item in inner)
        if origin is UnionType:
            return self.build(self.pick(get_args(kind)))
        return kind(**{name: self.build(hint) for name, hint in _hints(kind).items()})

    def _flag(self) -> bool:
        return bool(self.byte() & 1)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if not name.startswith("__")}
