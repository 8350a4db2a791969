import errno

import pytest

from cloudfit_orchestrator.launcher import tools
from cloudfit_orchestrator.launcher.build import build_image
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError

from .images import KEY


def test_a_missing_tool_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(tools, "_PATH", "/nowhere")
    with pytest.raises(PermanentError) as caught:
        tools.run("mkfs.erofs")
    assert caught.value.next_command == "apt-get install erofs-utils"


def test_a_failing_tool_is_quoted():
    with pytest.raises(tools.ToolError, match=r"mkfs.erofs failed with exit code \d+: .*source directory"):
        tools.run("mkfs.erofs", "/nowhere/image", "/nowhere/tree")


def test_a_full_disk_is_told_from_other_failures():
    assert tools.is_disk_full(OSError(errno.ENOSPC, "full"))
    assert tools.is_disk_full(tools.ToolError("failed", "write error (28: No space left on device)"))
    assert not tools.is_disk_full(OSError(errno.EACCES, "no"))
    assert not tools.is_disk_full(tools.ToolError("failed", "unknown option"))


def test_a_wrong_recipe_touches_no_store(tmp_path):
    with pytest.raises(BadInputError):
        build_image("router", tmp_path / "store", KEY, print)
    assert not (tmp_path / "store").exists()
