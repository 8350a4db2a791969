import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from cloudfit_orchestrator.cli.main import cli

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, process: {}}
  - {name: passau, process: {}}
  - {name: ulm, process: {}}
"""


@pytest.fixture
def home() -> Iterator[Path]:
    name = tempfile.mkdtemp(prefix="cf", dir="/tmp")  # short: it holds unix sockets
    yield Path(name)
    shutil.rmtree(name)


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloudfit_orchestrator.cli", *arguments]
    environment = {**os.environ, "CLOUDFIT_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def as_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    doc: dict[str, Any] = json.loads(result.stdout)
    assert doc["schema"] == 1
    return doc


def commands(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            found.append((prefix + name, command))
    return found


def test_every_command_has_help_with_an_example_of_itself() -> None:
    found = commands(cli)
    assert len(found) == 27
    for name, command in found:
        assert command.help, name
        assert (command.epilog or "").startswith(f"Example: cloudfit {name}"), name


def test_help_tells_of_each_command_what_the_command_does() -> None:
    """The overview is written down, so that it needs no imports."""
    context = click.Context(cli, info_name="cloudfit", max_content_width=400, terminal_width=400)
    overview = cli.get_help(context).partition("Commands:\n")[2].partition("\n\n")[0]
    told = dict(line.split(maxsplit=1) for line in overview.splitlines())
    assert told == {name: c.get_short_help_str(400) for name, c in cli.commands.items() if not c.hidden}


def test_a_command_that_there_is_not_is_told_the_nearest(home: Path) -> None:
    result = run(home, "grop", "list")
    assert result.returncode == 2
    assert "Did you mean 'group'?" in result.stderr


def test_every_read_command_has_json() -> None:
    writes = {"kv put", "kv del", "agent run", "bench plot"}
    for name, command in commands(cli):
        has = any("--format" in getattr(p, "opts", []) for p in command.params)
        assert has != (name in writes), name


def test_a_bad_spec_is_one_error_without_a_traceback(home: Path) -> None:
    (home / "bad.yaml").write_text("apiVersion: cloudfit/v1\ngrup: x\n")
    result = run(home, "group", "apply", str(home / "bad.yaml"))
    assert result.returncode == 1
    assert "bad.yaml:2:1: unknown key 'grup' (did you mean 'group'?)" in result.stderr
    assert "next: correct" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["group", "show", "nobody"], "there is no group nobody"),
        (["kv", "get", "nobody", "k"], "no ACTIVE configuration"),
        (["recovery", "start", "nobody", "r0"], "there is no group nobody"),
        (["image", "verify", "nothing"], "no image 'nothing'"),
        (["group", "apply", "/nonexistent.yaml"], "cannot read spec"),
    ],
)
def test_what_is_not_there_is_said_with_the_next_command(home: Path, arguments: list[str], words: str) -> None:
    result = run(home, *arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert "next: " in result.stderr
    assert "Traceback" not in result.stderr


def test_an_empty_home_lists_nothing(home: Path) -> None:
    assert as_json(run(home, "group", "list", "-f", "json"))["groups"] == []
    assert as_json(run(home, "image", "list", "-f", "json"))["images"] == []
    assert as_json(run(home, "agent", "status", "-f", "json"))["agents"] == []
    gone = as_json(run(home, "group", "destroy", "nobody", "-f", "json"))
    assert gone["changed"] is False


def test_usage_and_version(home: Path) -> None:
    assert run(home, "group", "aply").returncode == 2
    assert run(home, "--version").stdout.startswith("cloudfit, version ")


def test_a_home_too_long_for_sockets_is_refused(home: Path) -> None:
    result = run(home, "--home", str(home / ("x" * 90)), "group", "list")
    assert result.returncode == 1
    assert "too long for unix sockets" in result.stderr


def test_a_group_of_processes_from_apply_to_destroy(home: Path) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(SPEC)
    try:
        applied = run(home, "group", "apply", str(spec), "-f", "json")
        assert as_json(applied)["changed"] is True
        progress = [json.loads(line) for line in applied.stderr.splitlines()]
        assert {"create", "admit", "ready"} <= {p["stage"] for p in progress}
        assert as_json(run(home, "group", "apply", str(spec), "-f", "json"))["changed"] is False
        assert run(home, "kv", "put", "ledger", "colour", "blue").returncode == 0
        assert run(home, "kv", "get", "ledger", "colour").stdout == "blue\n"
        done = as_json(run(home, "recovery", "start", "ledger", "r1", "-f", "json"))
        assert (done["outcome"], done["c"]) == ("done", 2)
        assert run(home, "kv", "get", "ledger", "colour").stdout == "blue\n"
        assert run(home, "kv", "del", "ledger", "colour").returncode == 0
        assert run(home, "kv", "get", "ledger", "colour").returncode == 1
        shown = as_json(run(home, "group", "show", "ledger", "-f", "json"))
        axes = {(m["machine"], m["reachable"], m["verified"], m["epoch"]) for m in shown["members"]}
        assert axes == {("running", "yes", "good", "open")}
        assert as_json(run(home, "config", "verify", "ledger", "-f", "json"))["records"] == 4
        log = as_json(run(home, "config", "log", "ledger", "-f", "json"))["records"]
        assert [(r["c"], r["status"]) for r in log] == [(1, "PREPARED"), (1, "ACTIVE"), (2, "PREPARED"), (2, "ACTIVE")]
    finally:
        destroyed = run(home, "group", "destroy", "ledger", "-f", "json")
    assert as_json(destroyed)["machines"] == 3
    assert as_json(run(home, "group", "list", "-f", "json"))["groups"] == []
    assert all(not a["running"] for a in as_json(run(home, "agent", "status", "-f", "json"))["agents"])
    alive = [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if str(home).encode() in _read(p)]
    assert alive == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("delay_stage", ["cloud", "create", "prepare"])
def test_interrupted_apply_goes_on_when_run_again_and_destroy_leaves_nothing(home: Path, delay_stage: str) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(SPEC)
    command = [sys.executable, "-m", "cloudfit_orchestrator.cli", "--home", str(home), "group", "apply", str(spec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if json.loads(line)["stage"] == delay_stage:
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate(timeout=60)
    try:
        assert process.returncode in {1, 130}, said
        assert "run the same command again" in said
        assert "Traceback" not in said
        assert as_json(run(home, "group", "apply", str(spec), "-f", "json"))["changed"] is True
        shown = as_json(run(home, "group", "show", "ledger", "-f", "json"))
        assert len(shown["members"]) == 3
    finally:
        destroyed = run(home, "group", "destroy", "ledger", "-f", "json")
    assert as_json(destroyed)["machines"] == 3
    assert list((home / "machines").glob("*/*.sock")) == []


def test_a_group_whose_agents_were_killed_is_destroyed_all_the_same(home: Path) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(SPEC)
    try:
        assert run(home, "group", "apply", str(spec)).returncode == 0
        for agent in as_json(run(home, "agent", "status", "-f", "json"))["agents"]:
            os.kill(agent["pid"], signal.SIGKILL)
        shown = as_json(run(home, "group", "show", "ledger", "-f", "json"))
        assert {(m["machine"], m["reachable"], m["verified"]) for m in shown["members"]} == {
            ("running", "unknown", "unknown")
        }
    finally:
        destroyed = run(home, "group", "destroy", "ledger", "-f", "json")
    assert as_json(destroyed)["machines"] == 3
