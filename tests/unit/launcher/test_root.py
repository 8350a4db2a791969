import os
import stat

import pytest

from cloudfit_orchestrator.launcher.root import check_contents, normalise
from cloudfit_orchestrator.model.errors import PermanentError


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    python = tmp_path / "usr/bin/python3.11"
    python.touch()
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["usr/bin/sh", "opt/bash", "usr/lib/busybox", "usr/sbin/sshd", "usr/lib/apt/apt-helper"]
)
def test_ways_in_are_refused_wherever_they_lie(tree, name):
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(0o755)
    with pytest.raises(PermanentError, match=f"/{name} "):
        check_contents(tree)


def test_a_link_to_a_shell_is_refused(tree):
    (tree / "usr/lib").mkdir()
    (tree / "usr/lib/dash").symlink_to("nowhere")
    with pytest.raises(PermanentError, match="dash"):
        check_contents(tree)


def test_any_other_program_is_refused(tree):
    (tree / "usr/bin/env").touch()
    with pytest.raises(PermanentError, match="no program but Python"):
        check_contents(tree)


def test_set_id_is_refused_and_normalised_away(tree):
    (tree / "usr/bin/python3.11").chmod(0o4711)
    with pytest.raises(PermanentError, match="set-id"):
        check_contents(tree)
    normalise(tree)
    check_contents(tree)
    assert stat.S_IMODE((tree / "usr/bin/python3.11").stat().st_mode) == 0o755


def test_a_plain_module_may_be_called_like_a_program(tree):
    (tree / "usr/lib").mkdir()
    (tree / "usr/lib/mount").touch()
    check_contents(tree)


def test_modes_and_times_do_not_depend_on_the_builder(tree):
    secret = tree / "usr/secret"
    secret.touch()
    secret.chmod(0o600)
    (tree / "link").symlink_to("usr")
    normalise(tree)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o644
    assert len({os.lstat(p).st_mtime for p in [tree, *tree.rglob("*")]}) == 1
