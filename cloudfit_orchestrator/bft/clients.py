"""The client table and execution (protocol §3): a window of request numbers per client and the reply of each.

It lives in the state store under the library's reserved keys: the state's root covers it, a checkpoint carries it, and
a state transfer brings it along.
"""

import struct
from dataclasses import dataclass

from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.messages import BundleBody, Request, Result, reply_leaf, reply_node
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.errors import BadInputError

MAX_RESULT = 128 << 10  # bytes kept and sent; a larger result is an error of the request
MAX_REPLIES_BYTES = 2 << 20  # kept for one client; the window shrinks from below to stay under it
TOO_LARGE = b"\xc1result too large"  # 0xc1 is never used by msgpack: no service answers so
_WINDOW = struct.Struct(">QQQ")  # low (answered no more), high (highest seen), bytes kept


def _window_key(client: bytes) -> bytes:
    return StateStore.RESERVED + b"w" + client


def _reply_key(client: bytes, number: int) -> bytes:
    return StateStore.RESERVED + b"r" + client + number.to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Executed:
    """Results of one client in one slot."""

    client: bytes
    results: tuple[Result, ...]


def window(store: StateStore, client: bytes) -> tuple[int, int]:
    """(low, high): numbers up to `low` are refused, `high` is the highest executed."""
    low, high, _ = _WINDOW.unpack(store.get(_window_key(client)) or bytes(_WINDOW.size))
    return low, high


def cached(store: StateStore, client: bytes, number: int) -> bytes | None:
    """The kept reply of an executed request, or None."""
    return store.get(_reply_key(client, number))


def acceptable(store: StateStore, client: bytes, number: int, width: int) -> bool:
    """Whether an executed or new request with `number` is inside the client's window of `width`."""
    low, high = window(store, client)
    return low < number and (high == 0 or number <= high + width)  # the first number seen may be any


def execute(store: StateStore, service: Service, bodies: tuple[BundleBody, ...], width: int) -> list[Executed]:
    """Execute a decided batch: each request once, in order; a repeated one gets its kept reply; one outside the
    client's window gets none. Returns the results by client, in order of first appearance.
    """
    by_client: dict[bytes, list[Result]] = {}
    for body in bodies:
        results = by_client.setdefault(body.client, [])
        for request in body.requests:
            result = _execute_one(store, service, body.client, request, width)
            if result is not None:
                results.append(Result(request.number, result))
    return [Executed(client, tuple(results)) for client, results in by_client.items() if results]


def _execute_one(store: StateStore, service: Service, client: bytes, request: Request, width: int) -> bytes | None:
    number = request.number
    key = _reply_key(client, number)
    kept = store.get(key)
    if kept is not None:
        return kept
    low, high, total = _WINDOW.unpack(store.get(_window_key(client)) or bytes(_WINDOW.size))
    if high == 0:
        low = max(0, number - width)
    elif not low < number <= high + width:
        return None
    result = service.execute(store.service_view(), request.operation)
    if len(result) > MAX_RESULT:
        result = TOO_LARGE
    high = max(high, number)
    total += len(result)
    while low < high - width or total > MAX_REPLIES_BYTES + len(result):
        low += 1
        old = store.get(_reply_key(client, low))
        if old is not None:
            total -= len(old)
            store.delete(_reply_key(client, low))
    if low < number:
        try:
            store.put_reply(key, result)
        except BadInputError:  # the bucket is full: the window closes over the request, it will not be executed again
            total -= len(result)
            low = max(low, number)
    store.put(_window_key(client), _WINDOW.pack(low, high, total))
    return result


def reply_tree(executed: list[Executed]) -> tuple[bytes, list[tuple[tuple[bool, bytes], ...]]]:
    """The Merkle root over the clients' leaves of one slot, and each one's path: (sibling is left, hash) upwards."""
    level = [reply_leaf(item.client, item.results) for item in executed]
    paths: list[list[tuple[bool, bytes]]] = [[] for _ in level]
    places = list(range(len(level)))
    while len(level) > 1:
        for owner, place in enumerate(places):
            sibling = place ^ 1
            if sibling < len(level):
                paths[owner].append((sibling < place, level[sibling]))
        level = [
            reply_node(level[i], level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)
        ]
        places = [place // 2 for place in places]
    return level[0], [tuple(path) for path in paths]


def reply_root(leaf: bytes, path: tuple[tuple[bool, bytes], ...]) -> bytes:
    """The root that `leaf` and `path` lead to."""
    for is_left, sibling in path:
        leaf = reply_node(sibling, leaf) if is_left else reply_node(leaf, sibling)
    return leaf
