"""Clients of a group for commands: they follow its configuration through this home's CONFIG STORAGE."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Self, TypeVar

from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.gateway.client import Client
from cloudfit_orchestrator.gateway.kv import KvClient
from cloudfit_orchestrator.gateway.numbers import FileNumbers
from cloudfit_orchestrator.model.errors import PermanentError

CONCURRENT = 64  # operations under way at once
_T = TypeVar("_T")


def make_client(context: Context, home: Home, group: str) -> Client:
    """A client of `group` with this home's operator key. Raises PermanentError if the group has no configuration."""
    envelope = context.store.active(group)
    if envelope is None:
        raise PermanentError(f"group {group} has no ACTIVE configuration", next_command="cloudfit group list")
    identity = home.client()

    async def newest() -> bytes | None:
        return await asyncio.to_thread(context.store.active, group)

    return Client(
        envelope,
        context.trusted,
        admitted=identity.public,
        key=identity.key,
        numbers=FileNumbers(home.root / "keys" / f"client-{identity.name}.{group}.number"),
        newer=newest,
    )


class Kv:
    """The kv service of a group, for code without an event loop; many operations at once."""

    def __init__(self, context: Context, home: Home, group: str, *, timeout_s: float) -> None:
        """`timeout_s`: of each operation. Connects when entered."""
        self._context, self._home, self._group = context, home, group
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

    def __exit__(self, *_: object) -> None:
        self._run(self._client.__aexit__(None, None, None))
        self._stop()

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Set all."""
        self._run(self._all(self._kv.put(k, v) for k, v in items))

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values, in the order of `keys`."""
        return self._run(self._all(self._kv.get(k) for k in keys))

    def delete(self, key: bytes) -> bool:
        """Remove; False if it was not there."""
        return self._run(self._kv.delete(key))

    @property
    def lies(self) -> dict[str, int]:
        """Wrong results with a good signature, by replica."""
        return dict(self._client.figures.lies)

    async def _all(self, work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
        slots = asyncio.Semaphore(CONCURRENT)

        async def one(item: Coroutine[Any, Any, _T]) -> _T:
            async with slots:
                return await item

        return await asyncio.gather(*(one(item) for item in work))

    async def _begin(self) -> Client:
        return await make_client(self._context, self._home, self._group).__aenter__()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
