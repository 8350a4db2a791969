"""The key-value service as a client sees it: asynchronous, and synchronous for commands and scripts."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from cloudfit_orchestrator.gateway.client import DEADLINE_S, Client, Figures
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.services import kv

CONCURRENT = 64  # operations of one program under way at once
T = TypeVar("T")


class KvClient:
    """Typed operations over a `Client`: TemporaryError at the deadline, BadInputError if the service refuses."""

    def __init__(self, client: Client, *, timeout_s: float = DEADLINE_S) -> None:
        """`timeout_s`: of each operation."""
        self.client = client
        self._timeout_s = timeout_s

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        return _expect(await self._read(kv.Get(key)), kv.Value).value

    async def put(self, key: bytes, value: bytes) -> bool:
        """Set; False if the key held this value already."""
        return _expect(await self._call(kv.Put(key, value)), kv.Done).changed

    async def delete(self, key: bytes) -> bool:
        """Remove; False if it was not there."""
        return _expect(await self._call(kv.Delete(key)), kv.Done).changed

    async def compare_and_swap(self, key: bytes, expected: bytes | None, value: bytes | None) -> bool:
        """Set `key` to `value` (None: delete) if it holds `expected` (None: absent); whether it did."""
        return isinstance(await self._call(kv.CompareAndSwap(key, expected, value)), kv.Done)

    async def list(self, prefix: bytes = b"") -> AsyncIterator[tuple[bytes, bytes]]:
        """Entries under `prefix` in key order, page by page: each page is consistent, all together need not be."""
        after: bytes | None = None
        while True:
            page = _expect(await self._read(kv.List(prefix, after)), kv.Entries)
            for item in page.items:
                yield item
            if not page.more or not page.items:
                return
            after = page.items[-1][0]

    async def _call(self, operation: kv.Operation) -> kv.Result:
        return kv.decode_result(await self.client.call(kv.encode_operation(operation), timeout_s=self._timeout_s))

    async def _read(self, operation: kv.Operation) -> kv.Result:
        return kv.decode_result(await self.client.read(kv.encode_operation(operation), timeout_s=self._timeout_s))


def _expect(result: kv.Result, kind: type[T]) -> T:
    if isinstance(result, kv.Failed):
        raise BadInputError(f"the kv service refused: {result.reason}")
    if not isinstance(result, kind):
        raise BadError(f"the kv service answered {type(result).__name__}, expected {kind.__name__}")
    return result


class SyncKv:
    """`KvClient` for code without an event loop: runs one in a thread of its own. A context manager."""

    def __init__(self, make: Callable[[], Client], *, timeout_s: float = DEADLINE_S) -> None:
        """`make` builds the client."""
        self._make = make
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kv client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._client = self._run(self._begin())
        except BaseException:
            self._stop()
            raise
        self._kv = KvClient(self._client, timeout_s=self._timeout_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._client.__aexit__(kind, error, trace))
        self._stop()

    @property
    def figures(self) -> Figures:
        """What happened so far."""
        return self._client.figures

    def get(self, key: bytes) -> bytes | None:
        """See KvClient."""
        return self._run(self._kv.get(key))

    def put(self, key: bytes, value: bytes) -> bool:
        """See KvClient."""
        return self._run(self._kv.put(key, value))

    def delete(self, key: bytes) -> bool:
        """See KvClient."""
        return self._run(self._kv.delete(key))

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Set all, many at once."""
        self._run(self._all(self._kv.put(key, value) for key, value in items))

    def get_many(self, keys: Sequence[bytes]) -> "list[bytes | None]":
        """The values, in the order of `keys`, many at once."""
        return self._run(self._all(self._kv.get(key) for key in keys))

    async def _all(self, work: Iterable[Coroutine[Any, Any, T]]) -> "list[T]":
        slots = asyncio.Semaphore(CONCURRENT)

        async def one(item: Coroutine[Any, Any, T]) -> T:
            async with slots:
                return await item

        return await asyncio.gather(*(one(item) for item in work))

    def list(self, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        """See KvClient; all of it at once."""

        async def collect() -> list[tuple[bytes, bytes]]:
            return [item async for item in self._kv.list(prefix)]

        return self._run(collect())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self) -> Client:
        return await self._make().__aenter__()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
