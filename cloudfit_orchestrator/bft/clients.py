"""The client table and execution (protocol §3): a window of request numbers per client and the reply of each.

It lives in the state store under the library's reserved keys: the state's root covers it, a checkpoint carries it, and
a state transfer brings it along. Replies of neighbouring numbers share a *page*, one entry of the store: a client's
numbers come one after the other, and a bundle then costs one entry, not one a request.
"""

import struct

import msgspec

from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.messages import BundleBody, Result, Value, reply_leaf, reply_node
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.errors import BadInputError

MAX_RESULT = 128 << 10  # bytes kept and sent; a larger result is an error of the request
MAX_REPLIES_BYTES = 2 << 20  # kept for one client; the window shrinks from below to stay under it
MAX_SLOT_RESULTS = 16 << 20  # bytes of results of one slot that are told at once; the rest when it is asked for again
TOO_LARGE = b"\xc1result too large"  # 0xc1 is never used by msgpack: no service answers so
PAGE = 64  # numbers whose replies share an entry
LARGE = 1024  # bytes; a longer reply has an entry of its own, so a page has at most 64 KiB
_WINDOW = struct.Struct(">QQQ")  # low (answered no more), high (highest seen), bytes kept
_Page = list[bytes | int | None]  # by number: the reply; the length of one that is kept apart; none
_pages = msgspec.msgpack.Decoder(_Page)
_encode = msgspec.msgpack.Encoder().encode


def _window_key(client: bytes) -> bytes:
    return StateStore.RESERVED + b"w" + client


def _page_key(client: bytes, index: int) -> bytes:
    return StateStore.RESERVED + b"p" + client + index.to_bytes(8, "big")


def _reply_key(client: bytes, number: int) -> bytes:
    return StateStore.RESERVED + b"r" + client + number.to_bytes(8, "big")


class Executed(Value, frozen=True):
    """Results of one client in one slot."""

    client: bytes
    results: tuple[Result, ...]


class ClientWindow:
    """One client's row of the table, read once for many requests. What `keep` changes is in the store after `save`."""

    def __init__(self, store: StateStore, client: bytes) -> None:
        """Numbers up to `low` are refused; `high` is the highest executed."""
        self._store = store
        self._client = client
        row: tuple[int, int, int] = _WINDOW.unpack(store.get(_window_key(client)) or bytes(_WINDOW.size))
        self.low, self.high, self._bytes = row
        self._read: dict[int, _Page] = {}
        self._changed: set[int] = set()
        self._stored = self.high // PAGE  # the store has no page beyond it
        self._dropped = self.low  # replies up to here are not kept any more; those up to `low` are, until `_drop`

    def cached(self, number: int) -> bytes | None:
        """The kept reply of an executed request, or None."""
        if not self.low < number <= self.high:
            return None
        reply = self._page(number // PAGE)[number % PAGE]
        return self._store.get(_reply_key(self._client, number)) if isinstance(reply, int) else reply

    def acceptable(self, number: int, width: int) -> bool:
        """Whether an executed or new request with `number` is inside the window of `width`; the first number seen may
        be any.
        """
        return self.low < number and (self.high == 0 or number <= self.high + width)

    def keep(self, number: int, reply: bytes, width: int) -> None:
        """A request was executed. The window moves up to it, and shrinks from below to stay under its bytes."""
        if self.high == 0:
            self.low = self._dropped = max(0, number - width)
        self.high = max(self.high, number)
        self.low = max(self.low, self.high - width)
        size = len(reply)
        self._bytes += size
        if self._bytes > MAX_REPLIES_BYTES + size:
            self._drop()
            while self._bytes > MAX_REPLIES_BYTES + size:
                self.low += 1
                self._drop()
        if number <= self.low:  # the window closed over it
            self._bytes -= size
            return
        index, place = divmod(number, PAGE)
        page = self._read.get(index) or self._page(index)
        self._changed.add(index)
        if size <= LARGE:
            page[place] = reply
            return
        self._drop()  # makes room in the buckets
        try:
            self._store.put_reply(_reply_key(self._client, number), reply)
        except BadInputError:
            self._close_over(number)
            self._bytes -= size
        else:
            page[place] = size

    def save(self) -> None:
        """Write what `keep` changed."""
        self._drop()
        for index in sorted(self._changed):
            if (index + 1) * PAGE - 1 <= self.low:
                continue
            try:
                self._store.put_reply(_page_key(self._client, index), _encode(self._page(index)))
            except BadInputError:
                self._close_over(min(self.high, (index + 1) * PAGE - 1))
        self._changed.clear()
        self._stored = self.high // PAGE
        self._store.put(_window_key(self._client), _WINDOW.pack(self.low, self.high, self._bytes))

    def _close_over(self, number: int) -> None:
        """The bucket is full: what cannot be remembered must not be executed again, so the window closes over it."""
        self.low = max(self.low, number)
        self._drop()

    def _drop(self) -> None:
        """Let go of the replies that the window has closed over, page by page."""
        used: list[int] | None = None  # pages with replies that are not in the store yet, the first one last
        while self._dropped < self.low:
            first = self._dropped + 1
            index, place = divmod(first, PAGE)
            last = self._dropped = min(self.low, (index + 1) * PAGE - 1)
            if index > self._stored and index not in self._read:
                # Nothing was kept there: a client may leave out a window of numbers with each request.
                used = sorted((i for i in self._read if i > index), reverse=True) if used is None else used
                while used and used[-1] <= index:
                    used.pop()
                self._dropped = min(self.low, used[-1] * PAGE - 1) if used else self.low
                continue
            for number, reply in enumerate(self._page(index)[place : place + last - first + 1], first):
                if isinstance(reply, int):
                    self._store.delete(_reply_key(self._client, number))
                    self._bytes -= reply
                elif reply is not None:
                    self._bytes -= len(reply)
            if last % PAGE == PAGE - 1:
                self._store.delete(_page_key(self._client, index))
                del self._read[index]

    def _page(self, index: int) -> _Page:
        page = self._read.get(index)
        if page is None:
            data = self._store.get(_page_key(self._client, index)) if index <= self._stored else None
            page = self._read[index] = _pages.decode(data) if data is not None else [None] * PAGE
        return page


def execute(
    store: StateStore, service: Service, bodies: tuple[BundleBody, ...], width: int
) -> tuple[list[Executed], list[bytes]]:
    """Execute a decided batch: each request once, in order; a repeated one gets its kept reply; one outside the
    client's window gets none. Returns the results by client, in order of first appearance, as far as there is room for
    them, and the service's keys that were written.
    """
    view = store.service_view()
    room = MAX_SLOT_RESULTS
    by_client: dict[bytes, list[Result]] = {}
    for body in bodies:
        results = by_client.setdefault(body.client, [])
        row = ClientWindow(store, body.client)
        changed = False
        for request in body.requests:
            number = request.number
            result = row.cached(number) if number <= row.high else None
            if result is None:
                if not row.acceptable(number, width):
                    continue
                result = service.execute(view, request.operation)
                if len(result) > MAX_RESULT:
                    result = TOO_LARGE
                row.keep(number, result, width)
                changed = True
            if len(result) <= room:
                room -= len(result)
                results.append(Result(number, result))
        if changed:
            row.save()
    executed = [Executed(client, tuple(results)) for client, results in by_client.items() if results]
    return executed, view.written


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
