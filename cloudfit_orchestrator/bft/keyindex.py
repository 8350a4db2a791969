"""All keys of a state in order, in blocks: an immutable index, of which a changed one copies only what changed.

A list of millions of keys would be moved by half at each insertion, and could not be shared with a fork. (The sorted
containers of the library of that name cannot be shared either: a fork would have to copy them.)
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator

BLOCK = 512  # keys; a changed block is copied, and so is the list of blocks: at 8 million keys 16,000 references


class KeyIndex:
    """Ordered keys. Never changes."""

    __slots__ = ("_blocks", "_firsts")

    def __init__(self, ordered: list[bytes]) -> None:
        """`ordered`: ascending, each once."""
        self._blocks = [tuple(ordered[i : i + BLOCK]) for i in range(0, len(ordered), BLOCK)]
        self._firsts = [block[0] for block in self._blocks]

    def updated(self, added: Collection[bytes], removed: Collection[bytes]) -> "KeyIndex":
        """With `added` (some may be here already), without `removed` (some may not be here). No key is in both."""
        if not self._blocks:
            return KeyIndex(sorted(added))
        touched: dict[int, tuple[set[bytes], set[bytes]]] = {}
        for which, keys in enumerate((added, removed)):
            for key in keys:
                i = max(0, bisect_right(self._firsts, key) - 1)
                touched.setdefault(i, (set(), set()))[which].add(key)
        twin = KeyIndex([])
        twin._blocks, twin._firsts = list(self._blocks), list(self._firsts)
        for i in sorted(touched, reverse=True):  # from behind: a split moves only what is done
            keys = _changed(self._blocks[i], *touched[i])
            step = BLOCK if len(keys) > 2 * BLOCK else 2 * BLOCK
            parts = [tuple(keys[j : j + step]) for j in range(0, len(keys), step)]
            twin._blocks[i : i + 1] = parts
            twin._firsts[i : i + 1] = [part[0] for part in parts]
        return twin

    def begin_with(self, prefix: bytes, after: bytes | None) -> Iterator[bytes]:
        """Keys that begin with `prefix` and are above `after`, in order."""
        start = prefix if after is None or after < prefix else after
        for i in range(max(0, bisect_right(self._firsts, start) - 1), len(self._blocks)):
            block = self._blocks[i]
            for key in block[bisect_left(block, start) :]:
                if not key.startswith(prefix):
                    return
                if key != after:
                    yield key


def _changed(block: tuple[bytes, ...], more: set[bytes], less: set[bytes]) -> list[bytes]:
    keys = list(block)
    for key in more:
        i = bisect_left(keys, key)
        if i == len(keys) or keys[i] != key:
            keys.insert(i, key)
    for key in less:
        i = bisect_left(keys, key)
        if i < len(keys) and keys[i] == key:
            del keys[i]
    return keys
