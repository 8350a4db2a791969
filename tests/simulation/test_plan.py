"""Plans can be cut down, runs be replayed, campaigns be counted."""

import json
import shlex

import pytest
from click.testing import CliRunner

from cloudfit_orchestrator.cli.simulate import bench_simulate
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.testing import simulator
from cloudfit_orchestrator.testing.campaign import campaign, jobs
from cloudfit_orchestrator.testing.plan import Plan, draw, rows
from cloudfit_orchestrator.testing.profiles import MIXED
from cloudfit_orchestrator.testing.shrink import Shrinker
from cloudfit_orchestrator.testing.simulator import Report, run

EBAWA = Algorithm.EBAWA


def test_what_is_left_out_changes_nothing_of_the_rest() -> None:
    whole = draw(7, 3, EBAWA, "chaos", {})
    crashes = [t.name for t in whole.troubles if t.kind == "crash"]
    assert len(crashes) > 1
    less = whole.without(crashes[:1])
    assert [t for t in whole.troubles if t.name != crashes[0]] == list(less.troubles)
    assert (less.taken, less.parameters, less.next_attacks) == (whole.taken, whole.parameters, whole.next_attacks)
    assert less.command == f"{whole.command} --without {crashes[0]}"


def test_a_name_that_is_not_in_the_plan_is_a_mistake() -> None:
    with pytest.raises(BadInputError, match="crash:99"):
        draw(7, 3, EBAWA, "chaos", {}).without(["crash:99"])


@pytest.mark.parametrize("n", range(3, 8))
def test_a_mixed_run_has_one_of_the_rows_of_the_protocol(n: int) -> None:
    for f, k in rows(n, EBAWA):
        assert n >= 2 * f + k + 1
    assert {(plan.f, plan.k) for plan in (draw(seed, n, EBAWA, MIXED, {}) for seed in range(60))} == set(rows(n, EBAWA))


def test_the_shrinker_leaves_what_the_failure_needs() -> None:
    def crashes(plan: Plan) -> Report:
        report = run(plan)
        report.kind = "saw a crash" if any(name.startswith("fault:crash") for name in report.happened) else ""
        return report

    plan = draw(3, 3, EBAWA, "chaos", {"operations": 4, "trouble_s": 6.0})
    assert len(plan.names) > 3
    small = Shrinker(plan, crashes).shrink()
    assert [name.partition(":")[0] for name in small.plan.names] == ["crash"]
    assert (small.plan.profile.operations, small.plan.profile.clients) == (1, 1)
    assert crashes(small.plan).kind == "saw a crash"
    assert small.report.command == small.plan.command


def test_workers_see_what_one_process_sees() -> None:
    wanted = list(jobs(range(1, 3), [4], Algorithm, MIXED, {}))
    alone, together = (campaign(wanted, processes=count).document(1.0) for count in (1, 2))
    for seen in (alone, together):
        del seen["runs_per_cpu_s"]
    assert alone == together
    assert alone["runs"] == len(wanted)


def test_the_command_says_what_it_covered() -> None:
    done = CliRunner().invoke(
        bench_simulate, ["--seeds", "2", "--profile", "puppets", "--algorithm", "ebawa", "-f", "json"]
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["attacks"]["puppet"] > 0
    assert document["failures"] == []


def test_a_failure_is_replayed_by_the_command_that_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulator, "LIVENESS_S", 0.0)
    done = CliRunner().invoke(bench_simulate, ["--seeds", "1", "--first-seed", "5", "--algorithm", "ebawa", "--shrink"])
    assert done.exit_code == 1
    small = done.stdout.rpartition("smallest: ")[2]
    words = shlex.split(small)
    assert words[:3] == ["python", "-m", "cloudfit_orchestrator.testing.simulator"]
    assert simulator.main(words[3:]) == 1
    assert "FAILED (liveness)" in capsys.readouterr().out
    assert simulator.main([*words[3:], "--plan"]) == 0
