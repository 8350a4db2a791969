import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloudfit_orchestrator.launcher import store as module
from cloudfit_orchestrator.launcher.store import Store, content_key


def stage(work: Path, content: str) -> Path:
    (work / "image").mkdir()
    (work / "image" / "manifest.json").write_text(content)
    return work / "image"


def listing(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.name not in (".lock", ".cache", "names")}


def test_a_finished_image_becomes_visible_under_its_digest_and_name(tmp_path):
    store = Store(tmp_path / "store")
    with store.build(print) as work:
        directory = store.commit(stage(work, "one"), "small", "sha256:11")
    assert listing(store.path) == {"sha256-11"}
    assert (directory / "manifest.json").read_text() == "one"
    assert store.find("small") == store.find("sha256:11") == directory
    assert directory.stat().st_mode & 0o777 == 0o755, "the hypervisor's user reads it"
    assert (directory / "manifest.json").stat().st_mode & 0o777 == 0o644


def test_a_name_follows_the_newest_image_and_the_old_one_stays(tmp_path):
    store = Store(tmp_path)
    for digest in ("sha256:11", "sha256:22"):
        with store.build(print) as work:
            store.commit(stage(work, digest), "small", digest)
    assert store.names() == {"small": "sha256-22"}
    assert listing(tmp_path) == {"sha256-11", "sha256-22"}


def test_building_the_same_image_again_repairs_it(tmp_path):
    store = Store(tmp_path)
    for content in ("damaged", "sound"):
        with store.build(print) as work:
            store.commit(stage(work, content), "small", "sha256:11")
    assert (store.find("small") / "manifest.json").read_text() == "sound"
    assert listing(tmp_path) == {"sha256-11"}


def test_an_intact_image_is_left_alone_because_machines_may_run_from_it(tmp_path):
    store = Store(tmp_path)
    files = []
    for _ in range(2):
        with store.build(print) as work:
            directory = store.commit(stage(work, "one"), "small", "sha256:11")
        files.append((directory / "manifest.json").stat().st_ino)
    assert files[0] == files[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interrupt_leaves_the_store_as_it_was(tmp_path, error):
    store = Store(tmp_path)
    with store.build(print) as work:
        store.commit(stage(work, "one"), "small", "sha256:11")

    def interrupted() -> None:
        with store.build(print) as work:
            stage(work, "half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == {"sha256-11"}


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    store = Store(tmp_path)
    program = (
        "import os, pathlib, sys; from cloudfit_orchestrator.launcher.store import Store\n"
        "with Store(pathlib.Path(sys.argv[1])).build(print) as work: (work / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(name.startswith(".tmp-") for name in listing(tmp_path))
    with store.build(print) as work:
        assert listing(tmp_path) == {work.name}
    assert listing(tmp_path) == set()


def test_a_second_build_waits_for_the_first(tmp_path):
    store, order, waiting = Store(tmp_path), [], threading.Event()

    def second() -> None:
        with store.build(lambda line: (order.append(line), waiting.set())):
            order.append("second")

    with store.build(print) as work:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert work.is_dir(), "the second removes nothing of a build that is going on"
        order.append("first")
    thread.join(30)
    assert order == [f"waiting for another build in {tmp_path}", "first", "second"]


def test_a_prepared_tree_comes_back_and_a_damaged_one_does_not(tmp_path):
    store = Store(tmp_path)
    key = content_key("base", "a", ("b",))
    with store.build(print) as work:
        (work / "tree").mkdir()
        (work / "tree" / "file").write_text("content")
        (work / "tree" / "link").symlink_to("/absolute")
        assert not store.restore(key, work / "copy")
        store.keep(key, work / "tree")
        assert store.restore(key, work / "copy")
        assert (work / "copy" / "file").read_text() == "content"
        assert (work / "copy" / "link").readlink() == Path("/absolute")
        (archive,) = store.trees.iterdir()
        archive.write_bytes(archive.read_bytes().replace(b"content", b"CONTENT"))
        assert not store.restore(key, work / "again")
        assert not list(store.trees.iterdir())


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TREES", 2)
    store = Store(tmp_path)
    for number in range(4):
        with store.build(print) as work:
            (work / "tree").mkdir()
            store.keep(f"base{number}", work / "tree")
            (newest,) = store.trees.glob(f"base{number}-*")
            os.utime(newest, (number, number))
    assert {p.name[:5] for p in store.trees.iterdir()} == {"base2", "base3"}


def test_a_key_depends_on_every_part_and_on_their_borders():
    assert len({content_key("k", *p) for p in [("ab", "c"), ("a", "bc"), ("a", "b", "c"), ("abc",)]}) == 4
