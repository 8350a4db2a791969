"""A checkpoint costs what changed: counted in bytes hashed and bytes written, at two sizes of state."""

import hashlib
import random

import pytest

from cloudfit_orchestrator.bft import store as store_module
from cloudfit_orchestrator.bft import trie
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles

SMALL, FACTOR = 20_000, 10  # entries; times as many
CHANGED = 150  # few enough for most to have a leaf of their own in both
ROUNDS = 10  # enough for pieces to be merged


class Counter:
    """Counts what is hashed."""

    def __init__(self, monkeypatch) -> None:
        self.bytes = 0
        monkeypatch.setattr(trie, "sha256", self._constructor)
        monkeypatch.setattr(store_module, "sha256", self._of_parts)

    def _constructor(self, data: bytes):
        self.bytes += len(data)
        return hashlib.sha256(data)

    def _of_parts(self, *parts: bytes) -> bytes:
        return self._constructor(b"".join(parts)).digest()


def costs(entries: int, directory, counter: Counter) -> tuple[float, float]:
    """Bytes hashed, and bytes that came to the disk, by checkpoint."""
    dice = random.Random(1)
    names = [b"key-%012d" % i for i in range(entries)]
    store, files = StateStore(), SnapshotFiles(directory)
    for name in names:
        store.put(name, dice.randbytes(100))
    files.save(1, 0, store.snapshot())
    hashed = written = 0
    for slot in range(1, ROUNDS + 1):
        for name in dice.sample(names, CHANGED):
            store.put(name, dice.randbytes(100))
        before = counter.bytes
        snapshot = store.snapshot()
        hashed += counter.bytes - before
        written += files.save(1, slot, snapshot) + (directory / f"index-1-{slot}").stat().st_size
        files.keep_only([(1, slot), (1, slot - 1)])
    return hashed / ROUNDS, written / ROUNDS


def test_the_same_changes_cost_the_same_in_a_state_ten_times_as_large(tmp_path, monkeypatch):
    counter = Counter(monkeypatch)
    hashed, written = costs(SMALL, tmp_path / "small", counter)
    hashed_more, written_more = costs(FACTOR * SMALL, tmp_path / "large", counter)
    assert hashed_more <= 2 * hashed
    assert written_more <= 2 * written
    assert hashed_more <= CHANGED * (trie.LEAF_BYTES + 4096), "a leaf and its path each"
    assert written_more <= 3 * CHANGED * 120 + 64 * 1024, "the entries, some of them again, and an index"


@pytest.mark.parametrize("what", ["put", "delete"])
def test_one_change_in_a_large_state_hashes_one_leaf_and_its_path(monkeypatch, what):
    store = StateStore()
    for i in range(20_000):
        store.put(b"key %d" % i, b"v" * 100)
    store.root()
    counter = Counter(monkeypatch)
    store.put(b"key 7", b"new") if what == "put" else store.delete(b"key 7")
    store.root()
    assert 0 < counter.bytes <= trie.LEAF_BYTES + trie.MAX_DEPTH * 300 + 3 * 1100
    assert counter.bytes <= trie.LEAF_BYTES + 300 + 3 * 1100, "so few entries stand one branch deep at most"
