"""Persistent hash tries: the content of one bucket, hashed so that a change costs its path and not the bucket.

A node never changes, so a store, its forks and its snapshots share all that they have in common. Its form depends on
the content alone: a subtree is a leaf if it holds at most `LEAF_ENTRIES` entries in at most `LEAF_BYTES`, or only one
entry, or if the bits of the hash have run out; else it is a branch into 8 by the next three bits. Equal content
therefore has an equal hash, whatever its history, and anybody can compute it from the entries.

Nodes are plain tuples (the collector of garbage forgets tuples that hold only bytes; it would visit a million objects
of a class again and again):

- leaf: (hash, size, n, key 1 … key n, value 1 … value n), keys ascending
- branch: (hash, size, None, n, child 0 … child 7)

`n` is the number of entries below the node, `size` that of their encoding in a chunk, in bytes. Keys are placed by 64
bits of their BLAKE2s: 10 choose the bucket, 54 lead through at most `MAX_DEPTH` branches. Two keys that share k bits
cost who looks for them 2^(k/2) hashes, and cost us k/3 branches of them both.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from hashlib import blake2s, sha256
from typing import Any, TypeVar

from cloudfit_orchestrator.model.errors import BadError

_V = TypeVar("_V")
Node = tuple[Any, ...]
Change = tuple[int, bytes, bytes | None]  # what is left of the place; the key; its new value, or None: deleted

BUCKET_BITS = 10
DIGIT_BITS = 3
WIDTH = 1 << DIGIT_BITS
MAX_DEPTH = (64 - BUCKET_BITS) // DIGIT_BITS  # 18: a leaf so deep holds what it must
LEAF_ENTRIES = 24  # a change hashes its leaf again; fewer would cost more memory an entry
LEAF_BYTES = 4096  # the same bound for large values: from there on an entry tends to have a leaf of its own
ENTRY_OVERHEAD = 8  # bytes of an entry in a chunk's encoding beside key and value

_LEAF = b"cloudfit/state-leaf/v2\0"
_BRANCH = b"cloudfit/state-branch/v2\0"
_BODY = 3  # where the keys of a leaf begin
_CHILD = 4  # where the children of a branch begin; the walk down looks at `None` only, which is always at hand
_DIGIT = WIDTH - 1
_BUCKET = (1 << BUCKET_BITS) - 1
_LENGTHS = [struct.Struct(f">{1 + 2 * n}I") for n in range(LEAF_ENTRIES + 1)]


def place(key: bytes) -> int:
    """Where `key` belongs, 64 bits: the lowest `BUCKET_BITS` are its bucket, the next ones its way in the trie."""
    return int.from_bytes(blake2s(key).digest()[:8], "little")


def lookup(node: Node, way: int, key: bytes) -> bytes | None:
    """The value of `key`, whose place without the bits of the bucket is `way`, or None."""
    while (n := node[2]) is None:
        node = node[_CHILD + (way & _DIGIT)]
        way >>= DIGIT_BITS
    i = bisect_left(node, key, _BODY, _BODY + n)
    if i < _BODY + n and node[i] == key:
        value: bytes = node[i + n]
        return value
    return None


def updated(node: Node, changes: list[Change], depth: int = 0) -> Node:
    """The node after `changes`, each of another key; the same one if they change nothing."""
    if node[2] is not None:
        return _updated_leaf(node, changes, depth)
    if len(changes) == 1:
        way, key, value = changes[0]
        i = _CHILD + (way & _DIGIT)
        old = node[i]
        new = updated(old, [(way >> DIGIT_BITS, key, value)], depth + 1)
        if new is old:
            return node
        size, n = node[1] + new[1] - old[1], count(new) - count(old) + node[3]
        return _branch((*node[_CHILD:i], new, *node[i + 1 :]), size, n)
    parts: dict[int, list[Change]] = {}
    for way, key, value in changes:
        parts.setdefault(way & _DIGIT, []).append((way >> DIGIT_BITS, key, value))
    children = list(node[_CHILD:])
    for digit, part in parts.items():
        children[digit] = updated(children[digit], part, depth + 1)
    if all(new is old for new, old in zip(children, node[_CHILD:], strict=True)):
        return node
    return _branch(tuple(children), sum([child[1] for child in children]), sum(map(count, children)))


def placed(items: Iterable[tuple[bytes, _V]], bucket: int | None = None) -> list[tuple[int, bytes, _V]]:
    """The entries with their ways below bucket `bucket` (without it: of the first one). Raises BadError for a key of
    another bucket.
    """
    found = []
    for key, value in items:
        where = place(key)
        if bucket is None:
            bucket = where & _BUCKET
        if where & _BUCKET != bucket:
            raise BadError(f"chunk {bucket} holds key {key[:16].hex()}, which belongs to chunk {where & _BUCKET}")
        found.append((where >> BUCKET_BITS, key, value))
    return found


def build(items: Iterable[tuple[bytes, bytes]], bucket: int | None = None) -> Node:
    """The trie of entries, each key once. Raises as `placed` does."""
    return _built(placed(items, bucket), 0)


def count(node: Node) -> int:
    """How many entries the node holds."""
    n: int = node[3] if node[2] is None else node[2]
    return n


def leaves(node: Node) -> Iterator[Node]:
    """All leaves below `node`, in the order of their places."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node[2] is None:
            waiting += node[: _CHILD - 1 : -1]
        else:
            yield node


def keys(node: Node) -> list[bytes]:
    """All keys below `node`."""
    return [key for leaf in leaves(node) for key in leaf[_BODY : _BODY + leaf[2]]]


def entries(node: Node) -> dict[bytes, bytes]:
    """All entries below `node`."""
    found: dict[bytes, bytes] = {}
    for leaf in leaves(node):
        middle = _BODY + leaf[2]
        found.update(zip(leaf[_BODY:middle], leaf[middle:], strict=True))
    return found


def differences(old: Node, new: Node) -> dict[bytes, bytes | None]:
    """What turns `old` into `new`: keys with their new values, None for those that are gone. Costs what differs."""
    found: dict[bytes, bytes | None] = {}
    waiting = [(old, new)]
    while waiting:
        before, after = waiting.pop()
        if before is after or before[0] == after[0]:
            continue
        if before[2] is None and after[2] is None:
            waiting += zip(before[_CHILD:], after[_CHILD:], strict=True)
            continue
        gone = entries(before)
        found.update((key, value) for key, value in entries(after).items() if gone.pop(key, None) != value)
        found.update(dict.fromkeys(gone))  # what `after` does not hold
    return found


def _updated_leaf(node: Node, changes: list[Change], depth: int) -> Node:
    size, n = node[1], node[2]
    body: tuple[bytes, ...]
    if len(changes) == 1:
        _, key, value = changes[0]
        i = bisect_left(node, key, _BODY, _BODY + n)
        if i < _BODY + n and node[i] == key:
            if value is None:
                body = (*node[_BODY:i], *node[i + 1 : i + n], *node[i + n + 1 :])
                size -= ENTRY_OVERHEAD + len(key) + len(node[i + n])
                n -= 1
            else:
                body = (*node[_BODY : i + n], value, *node[i + n + 1 :])
                size += len(value) - len(node[i + n])
        elif value is None:
            return node
        else:
            body = (*node[_BODY:i], key, *node[i : i + n], value, *node[i + n :])
            size += ENTRY_OVERHEAD + len(key) + len(value)
            n += 1
    else:
        content = entries(node)
        for _, key, value in changes:
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        body = (*sorted(content), *[content[key] for key in sorted(content)])
        n = len(content)
        size = sum(map(len, body)) + ENTRY_OVERHEAD * n
    if not _fits(n, size) and depth < MAX_DEPTH:
        shift = BUCKET_BITS + DIGIT_BITS * depth
        return _built([(place(key) >> shift, key, value) for key, value in zip(body[:n], body[n:], strict=True)], depth)
    leaf = _leaf(body, size)
    return node if leaf[0] == node[0] else leaf


def _built(items: list[tuple[int, bytes, bytes]], depth: int) -> Node:
    size = sum([len(key) + len(value) for _, key, value in items]) + ENTRY_OVERHEAD * len(items)
    if _fits(len(items), size) or depth == MAX_DEPTH:
        return _leaf_of([(key, value) for _, key, value in items], size)
    parts: list[list[tuple[int, bytes, bytes]]] = [[] for _ in range(WIDTH)]
    for way, key, value in items:
        parts[way & _DIGIT].append((way >> DIGIT_BITS, key, value))
    return _hashed_branch(tuple([_built(part, depth + 1) if part else EMPTY for part in parts]), size, len(items))


def _fits(n: int, size: int) -> bool:
    return (n <= LEAF_ENTRIES and size <= LEAF_BYTES) or n <= 1


def _leaf_of(pairs: list[tuple[bytes, bytes]], size: int) -> Node:
    pairs.sort()
    return _leaf((*[key for key, _ in pairs], *[value for _, value in pairs]), size)


def _leaf(body: tuple[bytes, ...], size: int) -> Node:
    """`body`: keys, then values. Hashed: tag ‖ n u32 ‖ their lengths, u32 each ‖ keys ‖ values."""
    n = len(body) // 2
    lengths = _LENGTHS[n] if n <= LEAF_ENTRIES else struct.Struct(f">{1 + 2 * n}I")
    return sha256(b"".join((_LEAF, lengths.pack(n, *map(len, body)), *body))).digest(), size, n, *body


def _branch(children: tuple[Node, ...], size: int, n: int) -> Node:
    if _fits(n, size):  # then every child is a leaf
        return _leaf_of([pair for child in children for pair in entries(child).items()], size)
    return _hashed_branch(children, size, n)


def _hashed_branch(children: tuple[Node, ...], size: int, n: int) -> Node:
    """Hashed: tag ‖ the children's hashes, 32 bytes each."""
    digest = sha256(b"".join((_BRANCH, *[child[0] for child in children]))).digest()
    return digest, size, None, n, *children


EMPTY = _leaf((), 0)
