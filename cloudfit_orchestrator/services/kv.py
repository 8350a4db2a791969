"""A key-value store. Operations and results are msgpack arrays tagged by their name; clients use the helpers below."""

from collections.abc import Callable
from typing import Any

import msgspec

from cloudfit_orchestrator.bft.clients import MAX_RESULT
from cloudfit_orchestrator.bft.store import MAX_KEY, StateStore
from cloudfit_orchestrator.model.errors import BadError, BadInputError

MAX_LIST_ENTRIES = 1000  # entries in one result; `List.after` goes on from the last
MAX_STORED = MAX_RESULT - 2048  # bytes of a value: it must fit into a result, with its key in a listing
MAX_LIST_BYTES = MAX_RESULT // 2  # keys and values in one result, framing aside; one entry may be larger


class Get(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Answer: Value."""

    key: bytes


class Put(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Answer: Done."""

    key: bytes
    value: bytes


class Delete(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Answer: Done, `changed` being False if the key was not there."""

    key: bytes


class CompareAndSwap(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Set `key` to `value` (None: delete) if it holds `expected` (None: absent). Answer: Done or, if not, Value."""

    key: bytes
    expected: bytes | None
    value: bytes | None


class List(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Entries under `prefix` with keys above `after`, in order, at most `limit`. Answer: Entries."""

    prefix: bytes = b""
    after: bytes | None = None
    limit: int = MAX_LIST_ENTRIES


class Value(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """What a key holds, None if it is not there."""

    value: bytes | None


class Done(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """It was carried out; `changed` says whether the state is another one now."""

    changed: bool


class Entries(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Entries in key order; `more` if there were others behind the last one."""

    items: list[tuple[bytes, bytes]]
    more: bool


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Nothing was changed, and will not be by asking again."""

    reason: str


Operation = Get | Put | Delete | CompareAndSwap | List
Result = Value | Done | Entries | Failed

_encoder = msgspec.msgpack.Encoder()
_operations = msgspec.msgpack.Decoder(Operation)
_results = msgspec.msgpack.Decoder(Result)


def encode_operation(operation: Operation) -> bytes:
    """The bytes that a client sends."""
    return _encoder.encode(operation)


def decode_result(data: bytes) -> Result:
    """What the service answered. Raises BadError if it is no result of this service."""
    try:
        result: Result = _results.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadError(f"not a result of the kv service: {error}") from error
    return result


class KvService:
    """See `bft.interfaces.Service`. Keys are stored as they are."""

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        """Apply `operation`; anything malformed gives `Failed`, in words that do not depend on a library's version."""
        try:
            decoded: Operation = _operations.decode(operation)
        except (msgspec.MsgspecError, ValueError, RecursionError):  # ValueError: a tag that is not UTF-8
            return _encoder.encode(Failed("malformed operation"))
        result = self._apply(store, decoded)
        return _DONE[result.changed] if type(result) is Done else _encoder.encode(result)

    def read(self, store: StateStore, operation: bytes) -> bytes | None:
        """See `bft.interfaces.Readable`."""
        try:
            decoded: Operation = _operations.decode(operation)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        return _encoder.encode(self._apply(store, decoded)) if isinstance(decoded, Get | List) else None

    def _apply(self, store: StateStore, operation: Operation) -> Result:
        if isinstance(operation, List):
            key = operation.prefix
        else:
            key = operation.key
            if not key or key.startswith(store.RESERVED):
                return Failed("a key must not be empty and must not begin with a zero byte")
        if len(key) > MAX_KEY:
            return Failed(f"a key has at most {MAX_KEY} bytes")
        return _HANDLERS[type(operation)](store, operation)


def _get(store: StateStore, operation: Get) -> Result:
    return Value(store.get(operation.key))


def _put(store: StateStore, operation: Put) -> Result:
    return _write(store, operation.key, operation.value)


def _delete(store: StateStore, operation: Delete) -> Result:
    return _write(store, operation.key, None)


def _compare_and_swap(store: StateStore, operation: CompareAndSwap) -> Result:
    held = store.get(operation.key)
    if held != operation.expected:
        return Value(held)
    return _write(store, operation.key, operation.value)


def _write(store: StateStore, key: bytes, value: bytes | None) -> Result:
    if value is None:
        return _CHANGED if store.delete(key) else _UNCHANGED
    if len(value) > MAX_STORED:
        return Failed(f"a value has at most {MAX_STORED} bytes")
    try:
        return _CHANGED if store.put(key, value) else _UNCHANGED
    except BadInputError as error:
        return Failed(error.fact)


def _list(store: StateStore, operation: List) -> Result:
    limit = min(operation.limit, MAX_LIST_ENTRIES)
    items: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in store.items(operation.prefix, operation.after):
        size += len(key) + len(value)
        if len(items) >= limit or (items and size > MAX_LIST_BYTES):
            return Entries(items, more=True)
        items.append((key, value))
    return Entries(items, more=False)


_CHANGED, _UNCHANGED = Done(changed=True), Done(changed=False)  # most results: made and encoded once
_DONE = {done.changed: _encoder.encode(done) for done in (_UNCHANGED, _CHANGED)}
_HANDLERS: dict[type, Callable[[StateStore, Any], Result]] = {
    Get: _get,
    Put: _put,
    Delete: _delete,
    CompareAndSwap: _compare_and_swap,
    List: _list,
}
