import shutil
from pathlib import Path

import pytest

from cloudfit_orchestrator.launcher import verity
from cloudfit_orchestrator.launcher.tools import ToolError, run
from cloudfit_orchestrator.model.errors import BadError

from .images import flip, make_tree


def test_our_reading_of_a_tree_agrees_with_veritysetup(tmp_path):
    tree = verity.make_root(make_tree(tmp_path / "tree"), tmp_path / "image")
    assert tree.blocks > 128, "more than one level of hashes"
    verity.check_tree(tmp_path / "image", tree)
    image, offset = tmp_path / "image", f"--hash-offset={tree.blocks * verity.BLOCK}"
    run("veritysetup", "verify", offset, image, image, tree.root)
    flip(image, 5000)
    with pytest.raises(BadError, match="root:"):
        verity.check_tree(image, tree)
    with pytest.raises(ToolError):
        run("veritysetup", "verify", offset, image, image, tree.root)


@pytest.mark.parametrize("size", [100, 127 * 4096, 128 * 4096, 129 * 4096, 3 << 20])
def test_trees_of_every_shape_verify(tmp_path, size):
    tree = verity.make_root(make_tree(tmp_path / "tree", size), tmp_path / "image")
    verity.check_tree(tmp_path / "image", tree)
    with (tmp_path / "image").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadError, match="behind the hash tree"):
        verity.check_tree(tmp_path / "image", tree)


def test_the_same_tree_gives_the_same_image_wherever_it_lies(tmp_path):
    first = make_tree(tmp_path / "a")
    second = tmp_path / "elsewhere" / "b"
    (second / "usr").mkdir(parents=True)
    for name in ("text", "data"):  # another order of creation
        shutil.copy2(first / "usr" / name, second / "usr" / name)
    from cloudfit_orchestrator.launcher.root import normalise

    trees = []
    for tree, image in ((first, tmp_path / "1"), (second, tmp_path / "2")):
        normalise(tree)
        trees.append(verity.make_root(tree, image))
    assert trees[0] == trees[1]
    assert Path(tmp_path / "1").read_bytes() == Path(tmp_path / "2").read_bytes()


def test_parameters_survive_the_command_line():
    tree = verity.Verity(7, 8, "ab" * 32, "cd" * 32)
    assert verity.parse_command_line(f"console=ttyS0 {tree.argument()} quiet") == tree


@pytest.mark.parametrize(
    "value", ["", "1", "1,2,ab,cd", f"-1,2,{'ab' * 32},{'cd' * 32}", f"1,2,{'AB' * 32},{'cd' * 32}"]
)
def test_malformed_parameters_are_refused(value):
    with pytest.raises(BadError, match="malformed verity parameters"):
        verity.parse_command_line(f"cloudfit.verity={value}")
