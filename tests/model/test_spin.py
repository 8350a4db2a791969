"""The Promela models of docs/model: with all rules on nothing is violated, and each rule left out is missed."""

import re
from pathlib import Path

import pytest

from tests.model.spin import BROKEN, INSTALL, MODELS, SETTINGS, WHOLE, CheckerError, check, main, tool

README = (MODELS / "README.md").read_text()


@pytest.mark.parametrize("name", WHOLE)
def test_with_all_rules_no_execution_violates(name, tmp_path):
    result = check(WHOLE[name], tmp_path)
    assert result.errors == 0, result.trail
    # The search is the same everywhere: another count means that the README speaks of another model.
    assert f"| `{name}` |" in README
    assert f"| {result.states:,} |" in next(line for line in README.splitlines() if f"| `{name}` |" in line)


@pytest.mark.parametrize("name", BROKEN)
def test_without_the_rule_an_execution_violates(name, tmp_path):
    result = check(BROKEN[name], tmp_path)
    assert result.errors > 0, f"nothing found without {BROKEN[name].rule}"
    assert re.search(f"VIOLATION: .*{BROKEN[name].violates}", result.trail), result.trail


def switches_of(model: Path) -> set[str]:
    """What a model tests by `#ifdef` or `defined(…)`."""
    return set(re.findall(r"(?:#ifdef |defined\()([A-Z_0-9]+)", model.read_text()))


@pytest.mark.parametrize("model", sorted({setting.model for setting in SETTINGS.values()}))
def test_every_switch_of_a_model_is_used(model):
    used = {d.partition("=")[0] for setting in SETTINGS.values() if setting.model == model for d in setting.defines}
    assert switches_of(MODELS / f"{model}.pml") <= used


def test_every_rule_left_out_is_named_in_the_readme():
    assert [name for name in BROKEN if f"| `{name}` |" not in README] == []


def test_a_missing_tool_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckerError, match="spin is not installed") as error:
        check(WHOLE["two-records"], tmp_path)
    assert INSTALL in str(error.value)


def test_a_step_that_fails_is_no_result(tmp_path):
    with pytest.raises(CheckerError, match="failed"):
        tool(["spin", "-a", "nowhere.pml"], tmp_path)


def test_a_violation_is_shown_as_messages(capsys):
    assert main(["proposes-twice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "PREPARE(view 0, slot 1)" in line and "(faulty)" in line]
    assert lines[-1] == "VIOLATION: agreement on slot 1"


def test_an_unknown_setting_is_refused(capsys):
    assert main(["nothing-such"]) == 2
    assert "no such setting" in capsys.readouterr().err
