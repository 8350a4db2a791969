"""docs/protocol.md says of each rule what has tried to break it (§9): every rule, and only what exists."""

import ast
import re
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

from cloudfit_orchestrator.testing.profiles import PROFILES
from tests.model.spin import BROKEN
from tests.simulation.mutants import MUTANTS

HOME = Path(__file__).parent.parent
TAG = re.compile(r"\[[MD][\]:]")  # [M], [D], [M: with a reason]
SECTION = re.compile(r"#+ (\w+)")
TABLE = "| § | rule | tests"


class Row(NamedTuple):
    """A rule, and the names of what has tried to break it."""

    section: str
    rule: str
    tests: list[str]
    mutants: list[str]
    model: list[str]
    profiles: list[str]


def section(heading: str) -> str:
    """As the table names it."""
    number = SECTION.match(heading)
    assert number is not None
    return "5 PBFT" if number[1] == "PBFT" else number[1]


def tags() -> Counter[str]:
    """How many rules each section marks. What comes before the sections explains the marks, and §8 cites them."""
    found: Counter[str] = Counter()
    at = ""
    for line in (HOME / "docs/protocol.md").read_text().splitlines():
        if line.startswith("#"):
            at = section(line)
        if at in {"1", "2", "3", "4", "5", "5 PBFT", "6", "7"}:
            found[at] += len(TAG.findall(line))
    return found


def rows() -> list[Row]:
    """The table."""
    after = (HOME / "docs/protocol.md").read_text().partition(TABLE)[2].splitlines()[2:]
    lines = takewhile(lambda line: line.startswith("|"), after)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(at, rule, *(re.findall(r"`([^`]+)`", cell) for cell in names)) for at, rule, *names in cells]


def functions() -> set[str]:
    """All test functions, without their `test_`."""
    trees = (ast.parse(path.read_text()) for path in (HOME / "tests").rglob("test_*.py"))
    return {
        node.name.removeprefix("test_")
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_each_marked_rule_has_a_row() -> None:
    assert Counter(row.section for row in rows()) == tags()


def test_each_rule_that_is_built_has_a_test() -> None:
    assert [row.rule for row in rows() if not row.tests and not row.rule.endswith("(not built)")] == []


@pytest.mark.parametrize(
    ("column", "known"),
    [("tests", functions()), ("mutants", set(MUTANTS)), ("model", set(BROKEN)), ("profiles", set(PROFILES))],
)
def test_what_the_table_names_exists(column: str, known: set[str]) -> None:
    named = {name for row in rows() for name in getattr(row, column)}
    assert named
    assert sorted(named - known) == []


def test_no_mutant_and_no_setting_is_left_out() -> None:
    assert sorted(set(MUTANTS) - {name for row in rows() for name in row.mutants}) == []
    assert sorted(set(BROKEN) - {name for row in rows() for name in row.model}) == []
