"""Every rule is needed, and the simulator notices: engines that lack one (`mutants.py`) are found out, by name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloudfit_orchestrator.model.record import Algorithm
from tests.simulation.mutants import MUTANTS, Mutant

HOME = Path(__file__).parent.parent.parent
TIMEOUT_S = 300  # a few seeds of an engine that may not make progress any more
LEAST = 20  # rules that are taken out; fewer would not be a fair sample of the protocol


CAUGHT = [mutant for mutant in MUTANTS.values() if mutant.most]
SCRIPTED = [mutant for mutant in MUTANTS.values() if mutant.script]


@pytest.mark.parametrize("mutant", CAUGHT, ids=lambda mutant: mutant.name)
def test_an_engine_that_lacks_a_rule_is_found_out_and_the_real_one_is_clean(mutant: Mutant) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.mutants", mutant.name],
        cwd=HOME,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found is not None, f"without {mutant.rule!r} none of {mutant.most} seeds shows anything"
    seed, algorithm, kind = found
    assert kind in mutant.kinds, f"without {mutant.rule!r} seed {seed} under {algorithm} shows {kind!r}"
    assert mutant.run(seed, Algorithm(algorithm)) == "", f"seed {seed} fails with all rules in force"


@pytest.mark.parametrize("mutant", SCRIPTED, ids=lambda mutant: mutant.name)
def test_what_chance_does_not_find_is_a_written_execution_with_and_without_its_rule(mutant: Mutant) -> None:
    path, _, name = mutant.script.partition("::")
    functions = {f.name: f for f in ast.parse((HOME / path).read_text()).body if isinstance(f, ast.FunctionDef)}
    assert name in functions, f"{mutant.script} is gone: what shows now that {mutant.rule!r} is needed?"
    decorators = [ast.unparse(decorator) for decorator in functions[name].decorator_list]
    assert "with_and_without" in decorators, f"{mutant.script} does not run without its rule"


def test_each_mutant_is_caught_somehow() -> None:
    assert [m.name for m in MUTANTS.values() if not m.most and not m.script] == []
    assert len(CAUGHT) >= LEAST
