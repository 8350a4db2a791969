"""The state store against a plain dict, and its decoder against hostile bytes."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.bft import store as s
from cloudfit_orchestrator.bft import trie
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError

KEYS = st.binary(max_size=3)
VALUES = st.binary(max_size=20)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, VALUES),
        st.tuples(st.just("delete"), KEYS, st.just(b"")),
        st.tuples(st.sampled_from(["root", "snapshot", "fork", "items"]), st.just(b""), st.just(b"")),
    ),
    max_size=60,
)


def filled(content: dict[bytes, bytes]) -> StateStore:
    store = StateStore()
    for key, value in content.items():
        store.put(key, value)
    return store


def entry(key: bytes, value: bytes) -> bytes:
    return struct.pack(">I", len(key)) + key + struct.pack(">I", len(value)) + value


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_agrees_with_a_dict_and_never_disturbs_snapshots_or_forks(operations):
    store, model = StateStore(), {}
    kept: list[tuple[Snapshot | StateStore, dict[bytes, bytes]]] = []
    for what, key, value in operations:
        if what == "put":
            store.put(key, value)
            model[key] = value
        elif what == "delete":
            assert store.delete(key) == (model.pop(key, None) is not None)
        elif what == "root":
            store.root()
        elif what == "items":
            assert list(store.items()) == sorted(model.items())
        elif what == "snapshot":
            kept.append((store.snapshot(), dict(model)))
        else:
            kept.append((store, dict(model)))
            store = store.fork()
        assert store.get(key) == model.get(key)
    for value, content in [*kept, (store, model)]:
        seen = StateStore.from_snapshot(value) if isinstance(value, Snapshot) else value
        assert list(seen.items()) == sorted(content.items())
        assert seen.root() == filled(content).root()


@given(st.dictionaries(st.binary(max_size=6), VALUES, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_root_depends_on_the_content_and_not_on_the_history(content, random):
    direct = filled(content)
    detour = StateStore()
    keys = list(content) * 2 + [b"gone-%d" % i for i in range(5)]
    random.shuffle(keys)
    for key in keys:
        detour.put(key, b"something else")
        detour.root()
    for key in keys:
        if key in content:
            detour.put(key, content[key])
        else:
            detour.delete(key)
    assert detour.root() == direct.root()
    other = direct.fork()
    other.put(b"one more", b"")
    assert other.root() != direct.root()


def test_chunks_rebuild_the_state_and_its_root():
    store = filled({b"key %d" % i: b"v" * i for i in range(500)})
    snapshot = store.snapshot()
    assert s.root_of(snapshot.chunk_hashes) == snapshot.root == store.root()
    chunks = [snapshot.chunk(i) for i in range(s.BUCKETS)]
    assert tuple(map(s.chunk_hash, chunks)) == snapshot.chunk_hashes
    again = Snapshot.from_chunks(chunks)
    assert again == snapshot
    assert list(StateStore.from_snapshot(again).items()) == list(store.items())
    chunks[0], chunks[1] = chunks[1], chunks[0]
    with pytest.raises(BadError):
        Snapshot.from_chunks(chunks)


def test_only_changed_buckets_are_copied_and_hashed():
    store = filled({b"key %d" % i: b"" for i in range(5000)})
    before = store.snapshot()
    store.put(b"key 7", b"new")
    after = store.snapshot()
    index = s.bucket_of(b"key 7")
    assert [i for i in range(s.BUCKETS) if before.chunk_hashes[i] != after.chunk_hashes[i]] == [index]
    assert [i for i in range(s.BUCKETS) if before.buckets[i] is not after.buckets[i]] == [index]


def same_bucket(count: int) -> list[bytes]:
    keys, i = [], 0
    while len(keys) < count:
        key = b"%06d" % i
        i += 1
        if s.bucket_of(key) == 5:
            keys.append(key)
    return keys


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda a, b: entry(b, b"") + entry(a, b""), "follow"),
        (lambda a, b: entry(a, b"") + entry(a, b""), "follow"),
        (lambda a, b: entry(a, b"")[:-1], "length|field"),
        (lambda a, b: entry(a, b"x")[:-1], "field"),
        (lambda a, b: entry(a, b"") + b"\0", "length"),
        (lambda a, b: struct.pack(">I", 0xFFFFFFFF) + a, "field"),
        (lambda a, b: entry(b"k" * (s.MAX_KEY + 1), b""), "field"),
        (lambda a, b: entry(a, bytes(s.MAX_VALUE + 1)), "field"),
        (lambda a, b: bytes(s.MAX_CHUNK + 1), "limit"),
    ],
)
def test_a_chunk_that_is_not_canonical_is_refused(make, why):
    a, b = same_bucket(2)
    assert trie.entries(s.decode_chunk(entry(a, b"1") + entry(b, b"2"), 5)) == {a: b"1", b: b"2"}
    with pytest.raises(BadError, match=why):
        s.decode_chunk(make(a, b), None)


def test_a_chunk_of_another_bucket_is_refused():
    (key,) = same_bucket(1)
    with pytest.raises(BadError, match="belongs to chunk 5"):
        s.decode_chunk(entry(key, b""), 6)


@given(st.binary(max_size=64))
def test_random_bytes_are_refused_or_canonical(data):
    try:
        node = s.decode_chunk(data)
    except BadError:
        return
    assert s.encode_chunk(trie.entries(node)) == data


def test_limits_change_nothing():
    store = StateStore()
    root = store.root()
    for key, value in [(b"k" * (s.MAX_KEY + 1), b""), (b"k", bytes(s.MAX_VALUE + 1))]:
        with pytest.raises(BadInputError):
            store.put(key, value)
    assert store.root() == root
    with pytest.raises(BadError):
        s.root_of([bytes(32)] * 1023)


def test_a_service_cannot_fill_the_room_of_the_library_in_a_bucket():
    store = StateStore()
    view = store.service_view()
    keys = same_bucket(s.MAX_SERVICE_CHUNK // s.MAX_VALUE + 1)
    for key in keys[:15]:
        view.put(key, bytes(s.MAX_VALUE))
    with pytest.raises(BadInputError, match="its limit is"):
        view.put(keys[15], bytes(s.MAX_VALUE))
    assert len(store.snapshot().chunk(5)) <= s.MAX_SERVICE_CHUNK
    store.put(keys[-1], bytes(s.MAX_VALUE))
    view.put(keys[0], b"shrinking is always allowed")


def test_a_service_neither_sees_nor_changes_the_library_keys():
    store = StateStore()
    store.put(b"\0clients", b"table")
    view = store.service_view()
    view.put(b"a", b"1")
    assert list(view.items()) == [(b"a", b"1")]
    assert store.get(b"a") == b"1"
    for act in (
        lambda: view.get(b"\0clients"),
        lambda: view.put(b"\0clients", b""),
        lambda: view.delete(b"\0clients"),
        view.root,
        view.snapshot,
        view.fork,
    ):
        with pytest.raises(RefusedError):
            act()
    assert store.get(b"\0clients") == b"table"


def test_items_with_a_prefix_are_sorted_and_complete_after_changes():
    store = filled({b"a/%03d" % i: b"%d" % i for i in range(100)} | {b"b": b"", b"a": b"", b"\xff\xff": b"x"})
    assert [k for k, _ in store.items(b"a/")] == [b"a/%03d" % i for i in range(100)]
    assert [k for k, _ in store.items(b"\xff")] == [b"\xff\xff"]
    running = store.items(b"a/")
    store.delete(b"a/000")
    store.put(b"a/0005", b"new")
    assert [k for k, _ in running] == [b"a/%03d" % i for i in range(1, 100)]
    assert [k for k, _ in store.items(b"a/", after=b"a/097")] == [b"a/098", b"a/099"]
    assert [k for k, _ in store.items(b"a/00")][:2] == [b"a/0005", b"a/001"]
