"""`cloudfit orphans` and `cloudfit group preflight`, on homes without machines."""

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloudfit_orchestrator.cli.main import cli
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.journal import GroupState, Journal
from cloudfit_orchestrator.controller.spec import parse_spec, to_json

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 0
clouds:
  - {name: lisbon, openstack: {cloud: lisbon, flavor: small, network: replicas, agent: {}}}
"""


@pytest.fixture
def home(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="cf") as name:
        monkeypatch.setenv("CLOUDFIT_HOME", name)
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", f"{name}/nowhere.yaml")
        yield Home(Path(name))


def run(*arguments):
    return CliRunner().invoke(cli, arguments)


def remember(home, state):
    journal = Journal(home.journal)
    journal.put_group("ledger", state, to_json(parse_spec(SPEC, "spec.yaml")))
    journal.close()


@pytest.mark.parametrize("command", ["list", "sweep"])
def test_a_home_that_never_had_a_group_has_no_orphans(home, command):
    done = run("orphans", command)
    assert (done.exit_code, done.stdout) == (0, "no orphans\n")


@pytest.mark.parametrize("command", ["list", "sweep"])
@pytest.mark.parametrize("state", [GroupState.ACTIVE, GroupState.GONE])
def test_a_cloud_that_cannot_be_looked_at_is_said(home, command, state):
    remember(home, state)
    done = run("orphans", command, "-f", "json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["orphans"] == []
    assert "there is no clouds.yaml" in document["problems"][0]["problem"]
    assert "lisbon: there is no clouds.yaml" in done.stderr


def test_nothing_is_swept_while_an_operation_runs(home):
    remember(home, GroupState.ACTIVE)
    with home.lock("group-ledger"):
        done = run("orphans", "sweep")
    assert done.exit_code == 1
    assert "another cloudfit command works on group-ledger" in done.stderr


def test_preflight_says_that_the_image_and_the_cloud_are_missing(home, tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = run("group", "preflight", str(tmp_path / "spec.yaml"), "-f", "json")
    assert done.exit_code == 1
    assert "no image 'replica'" in done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["cloud"], finding["verdict"]) == ("lisbon", "fail")
    assert "there is no clouds.yaml" in finding["finding"]
