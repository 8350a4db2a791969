import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloudfit_orchestrator.config_store.sqlite import SqliteConfigStore
from cloudfit_orchestrator.model.errors import BadError, PermanentError, RefusedError
from cloudfit_orchestrator.model.record import NO_DIGEST, ConfigRecord, open_record, record_hash
from tests.unit.config_store.builders import Author


@pytest.fixture
def author() -> Author:
    return Author()


@pytest.fixture
def store(tmp_path: Path, author: Author) -> SqliteConfigStore:
    return SqliteConfigStore(tmp_path / "config.sqlite", author.trusted)


def opened(author: Author, envelope: bytes) -> ConfigRecord:
    return open_record(envelope, author.trusted)


def write_pair(store: SqliteConfigStore, author: Author, c: int, base: int | None) -> tuple[bytes, bytes]:
    prepared = author.prepared(c, base, store.head(author.group))
    store.append_prepared(prepared)
    active = author.active(prepared, opened(author, prepared))
    store.activate(active)
    return prepared, active


def test_a_chain_of_configurations_holds(store: SqliteConfigStore, author: Author) -> None:
    pairs = [write_pair(store, author, c, c - 1 or None) for c in (1, 2, 3)]
    assert store.active("ledger") == pairs[2][1]
    assert [e.envelope for e in store.log("ledger")] == [e for pair in pairs for e in pair]
    verdict = store.verify("ledger", record_hash(pairs[0][0]))
    assert verdict.good
    assert (verdict.records, verdict.active_c, verdict.head) == (6, 3, record_hash(pairs[2][1]))


def test_the_file_is_private(store: SqliteConfigStore, author: Author, tmp_path: Path) -> None:
    write_pair(store, author, 1, None)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert "config.sqlite-wal" in modes


def test_repeating_a_write_changes_nothing(store: SqliteConfigStore, author: Author) -> None:
    prepared, active = write_pair(store, author, 1, None)
    store.append_prepared(prepared)
    store.activate(active)
    assert len(store.log("ledger")) == 2


def test_two_preparers_race_and_one_wins(store: SqliteConfigStore, author: Author, tmp_path: Path) -> None:
    write_pair(store, author, 1, None)
    head = store.head("ledger")
    candidates = [author.prepared(2, 1, head), author.prepared(3, 1, head)]
    barrier = threading.Barrier(2)
    outcome: list[str] = []

    def write(envelope: bytes) -> None:
        mine = SqliteConfigStore(tmp_path / "config.sqlite", author.trusted)
        barrier.wait()
        try:
            mine.append_prepared(envelope)
            outcome.append("won")
        except RefusedError:
            outcome.append("lost")
        finally:
            mine.close()

    threads = [threading.Thread(target=write, args=(e,)) for e in candidates]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(outcome) == ["lost", "won"]
    assert len(store.log("ledger")) == 3


def test_only_the_newest_prepared_for_a_base_becomes_active(store: SqliteConfigStore, author: Author) -> None:
    write_pair(store, author, 1, None)
    second = author.prepared(2, 1, store.head("ledger"))
    store.append_prepared(second)
    third = author.prepared(3, 1, store.head("ledger"))
    store.append_prepared(third)
    with pytest.raises(RefusedError, match="not the newest"):
        store.activate(author.active(second, opened(author, second), previous=store.head("ledger")))
    store.activate(author.active(third, opened(author, third)))
    with pytest.raises(RefusedError, match="base 1"):
        store.append_prepared(author.prepared(4, 1, store.head("ledger")))


def test_activation_is_judged_completely(store: SqliteConfigStore, author: Author) -> None:
    envelope = author.prepared(1, None)
    store.append_prepared(envelope)
    record = opened(author, envelope)
    with pytest.raises(BadError, match="1 valid confirmations, 2 are needed"):
        store.activate(author.active(envelope, record, replicas=["r0"]))
    with pytest.raises(BadError, match="1 valid confirmations"):
        store.activate(author.active(envelope, record, replicas=["r0", "r0"]))
    with pytest.raises(BadError, match="differs from its PREPARED"):
        store.activate(author.active(envelope, record, service="counter"))
    with pytest.raises(BadError, match="another PREPARED"):
        store.activate(author.active(envelope, record, prepared=bytes(32)))
    with pytest.raises(BadError, match="none of which is trusted"):
        store.activate(Author().prepared(1, None))
    with pytest.raises(BadError, match="is PREPARED, not ACTIVE"):
        store.activate(envelope)
    assert store.active("ledger") is None


def test_forged_confirmation_does_not_count(store: SqliteConfigStore, author: Author) -> None:
    envelope = author.prepared(1, None)
    store.append_prepared(envelope)
    stranger = Author()
    stranger.prepared(1, None)  # makes other keys for the same members
    stranger.key = author.key
    with pytest.raises(BadError, match="0 valid confirmations"):
        store.activate(stranger.active(envelope, opened(author, envelope)))


@pytest.mark.parametrize(
    ("tamper", "bad_link"),
    [
        ("UPDATE records SET envelope=CAST(replace(CAST(envelope AS TEXT), 'a', 'b') AS BLOB) WHERE sequence=3", 3),
        ("DELETE FROM records WHERE sequence=2", 2),
        ("DELETE FROM records WHERE sequence=1", 1),
        ("UPDATE records SET envelope=(SELECT envelope FROM records WHERE sequence=1) WHERE sequence=3", 3),
        ("DELETE FROM records WHERE sequence>2", 3),
        ("DELETE FROM records", 1),
    ],
)
def test_tampering_is_named(
    store: SqliteConfigStore, author: Author, tmp_path: Path, tamper: str, bad_link: int
) -> None:
    write_pair(store, author, 1, None)
    write_pair(store, author, 2, 1)
    remembered = store.head("ledger")
    db = sqlite3.connect(tmp_path / "config.sqlite")
    db.execute(tamper)
    db.commit()
    db.close()
    verdict = store.verify("ledger", remembered)
    assert not verdict.good
    assert verdict.bad_link == bad_link
    assert verdict.reason


def test_rolled_back_database_is_detected_by_the_remembered_head(author: Author, tmp_path: Path) -> None:
    path = tmp_path / "config.sqlite"
    store = SqliteConfigStore(path, author.trusted)
    write_pair(store, author, 1, None)
    store.close()
    old = path.read_bytes()
    store = SqliteConfigStore(path, author.trusted)
    write_pair(store, author, 2, 1)
    remembered = store.head("ledger")
    store.close()
    path.write_bytes(old)
    store = SqliteConfigStore(path, author.trusted)
    assert store.verify("ledger").good, "an old copy is consistent in itself"
    assert "rolled back" in store.verify("ledger", remembered).reason


def test_archive_frees_the_name_and_keeps_the_records(store: SqliteConfigStore, author: Author, tmp_path: Path) -> None:
    write_pair(store, author, 1, None)
    store.archive("ledger")
    store.archive("nobody")
    assert store.log("ledger") == []
    assert store.head("ledger") == NO_DIGEST
    write_pair(store, author, 2, None)
    assert store.groups() == ["ledger"]
    db = sqlite3.connect(tmp_path / "config.sqlite")
    assert db.execute("SELECT COUNT(*) FROM records").fetchone() == (4,)
    db.close()


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "config.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(PermanentError, match=r"config\.sqlite"):
        SqliteConfigStore(path, [])


_WRITER = """
import sys
from pathlib import Path
from cloudfit_orchestrator.config_store.sqlite import SqliteConfigStore
from cloudfit_orchestrator.model.record import open_record
from tests.unit.config_store.builders import Author
author = Author()
Path(sys.argv[2]).write_bytes(author.trusted[0])
store = SqliteConfigStore(Path(sys.argv[1]), author.trusted)
c = 1
while True:
    prepared = author.prepared(c, c - 1 or None, store.head("ledger"))
    store.append_prepared(prepared)
    print(2 * c - 1, flush=True)
    store.activate(author.active(prepared, open_record(prepared, author.trusted)))
    print(2 * c, flush=True)
    c += 1
"""


@pytest.mark.parametrize("acknowledged", [1, 2, 7, 20])
def test_kill_in_the_middle_loses_nothing_acknowledged(tmp_path: Path, acknowledged: int) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "config.sqlite"), str(tmp_path / "key")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}) as p:
        assert p.stdout
        for line in p.stdout:
            if int(line) >= acknowledged:
                break
        p.send_signal(signal.SIGKILL)
    store = SqliteConfigStore(tmp_path / "config.sqlite", [(tmp_path / "key").read_bytes()])
    verdict = store.verify("ledger")
    assert verdict.good, verdict
    assert verdict.records >= acknowledged
