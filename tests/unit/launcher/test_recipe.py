from pathlib import Path

import pytest

from cloudfit_orchestrator.launcher.recipe import RECIPES, load_recipe
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.image import Role

GOOD = f"""
name = "mine"
base = "{RECIPES / "base.toml"}"
role = "replica"
adversary = false
entry = "mine"
state_disk = "required"
rooms = ["model"]
"""


def write(directory: Path, text: str) -> Path:
    (directory / "recipe.toml").write_text(text)
    return directory


def test_the_shipped_recipes_load():
    recipes = {name: load_recipe(name) for name in ("replica", "recovery", "adversary")}
    assert {n: (r.role, r.adversary) for n, r in recipes.items()} == {
        "replica": (Role.REPLICA, False),
        "recovery": (Role.RECOVERY, False),
        "adversary": (Role.REPLICA, True),
    }
    assert len({r.base for r in recipes.values()}) == 1, "one base is built once for all"
    assert "testing" not in recipes["replica"].rooms + recipes["recovery"].rooms
    assert not recipes["replica"].files


def test_a_recipe_is_found_by_file_and_by_directory(tmp_path):
    write(tmp_path, GOOD)
    assert load_recipe(tmp_path) == load_recipe(tmp_path / "recipe.toml")
    assert load_recipe(tmp_path).rooms == ("model",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name = ", "title = "), "`title`|`name`"),
        (('"replica"', '"router"'), "`role` is 'router'"),
        (('"required"', '"maybe"'), "`state_disk` is 'maybe'"),
        (("false", '"no"'), "`adversary` must be true or false"),
        (('["model"]', '"model"'), "`rooms` must be a list of strings"),
        (('["model"]', "[1]"), "`rooms` must be a list of strings"),
        (('entry = "mine"\n', ""), "missing key `entry`"),
        (('name = "mine"', "name = mine"), "recipe.toml"),
        (("base.toml", "nowhere.toml"), "cannot read .*nowhere.toml"),
        (('entry = "mine"', 'entry = "mine"\nshell = true'), "unknown key `shell`"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, change, message):
    assert change[0] in GOOD
    with pytest.raises(BadInputError, match=message):
        load_recipe(write(tmp_path, GOOD.replace(*change)))


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(BadInputError) as caught:
        load_recipe("router")
    assert "adversary, recovery, replica" in caught.value.next_command
