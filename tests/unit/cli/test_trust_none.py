"""A group without any hold on its hosts, as a user runs it, with processes for machines (docs/protocol.md §5).

One story, since each step needs the one before.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.clouds.base import Machine
from cloudfit_orchestrator.clouds.process import ProcessCloud
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import LocalSites, open_context
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.model.drive import USER_DATA, Drive
from tests.unit.cli.test_cli import as_json, home, run

__all__ = ["home"]

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
trust: none
algorithm: pbft
parameters: {checkpoint_period: 8, window: 32}
clouds:
  - {name: lisbon, process: {}}
  - {name: passau, process: {}}
  - {name: ulm, process: {}}
  - {name: graz, process: {}}
"""


@pytest.fixture
def spec(home: Path) -> Path:
    path = home / "ledger.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def context(home: Path) -> Iterator[Context]:
    opened = open_context(Home(home), lambda _: None)
    yield opened
    assert isinstance(opened.sites, LocalSites)
    opened.sites.close()
    opened.journal.close()


def put(home: Path, key: str, value: str) -> None:
    done = run(home, "kv", "put", "ledger", key, value)
    assert done.returncode == 0, done.stderr


def get(home: Path, key: str) -> str:
    done = run(home, "kv", "get", "ledger", key)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def shown(home: Path) -> dict[str, dict[str, str]]:
    members = as_json(run(home, "group", "show", "ledger", "-f", "json"))["members"]
    return {m["replica"]: m for m in members}


class Machines:
    """The processes of a home's machines."""

    def __init__(self, home: Path, context: Context) -> None:
        self._cloud = ProcessCloud(home=home)
        self._deployment = context.journal.deployment

    def of(self, replica: str) -> Machine:
        return next(m for m in self._cloud.machines(self._deployment) if m.owner.replica == replica)

    def left(self) -> list[object]:
        return [*self._cloud.machines(self._deployment), *self._cloud.snapshots(self._deployment)]

    def power_off(self, replica: str) -> None:
        self._cloud.stop(self.of(replica))

    def power_on(self, replica: str) -> None:
        self._cloud.start(self.of(replica))

    def kill(self, replica: str, module: str) -> None:
        """Only the process that runs `module`; what keeps it running goes on."""
        place = str(self.of(replica).console.parent)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            words = entry.read_text(errors="replace").split("\0")
            if words[1:3] == ["-m", module] and any(place in word for word in words):
                os.kill(int(entry.parent.name), signal.SIGKILL)
                return
        pytest.fail(f"{replica} runs no {module}")

    def drive(self, replica: str) -> bytes:
        return (self.of(replica).console.parent / "drive" / USER_DATA).read_bytes()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """A process that comes back tells nobody."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_group_that_trusts_no_host(home: Path, spec: Path, context: Context) -> None:
    machines = Machines(home, context)
    plan = run(home, "group", "plan", str(spec), "-f", "json")
    assert plan.returncode == 2
    assert json.loads(plan.stdout)["malicious_cloud"].endswith("each holds at most 1, so it counts within f=1")
    try:
        assert as_json(run(home, "group", "apply", str(spec), "-f", "json"))["c"] == 1
        assert {m["verified"] for m in shown(home).values()} == {"unmeasured"}
        put(home, "colour", "blue")

        drives = {r: Drive.decode(machines.drive(r)) for r in ("r0", "r1", "r2", "r3")}
        assert len({d.seed for d in drives.values()}) == 4
        kept = b"".join((home / name).read_bytes() for name in ("journal.sqlite", "config.sqlite"))
        for d in drives.values():
            assert d.seed not in kept
            assert base64.b64encode(d.seed) not in kept

        # Killed inside their guest, agent and replica come back with the same keys: with r1 off, each is needed.
        machines.kill("r0", "cloudfit_orchestrator.wormhole.inside")
        machines.kill("r2", "cloudfit_orchestrator.guest")
        machines.power_off("r1")
        put(home, "colour", "green")
        # So does a machine that lost its power, its memory and its agent's.
        machines.power_on("r1")
        wait_for(lambda: shown(home)["r1"]["epoch"] == "open")
        machines.power_off("r3")
        put(home, "colour", "red")
        machines.power_on("r3")
        assert get(home, "colour") == "red"

        # One that lost its disk lost half of its keys' secret: it is silent until it is replaced, not two-tongued.
        machines.power_off("r2")
        state = machines.of("r2").state_disk
        assert state is not None
        shutil.rmtree(state)
        state.mkdir()
        machines.power_on("r2")
        wait_for(lambda: shown(home)["r2"]["reachable"] == "yes")
        assert shown(home)["r2"]["epoch"] == "none"
        put(home, "colour", "grey")
        figures = as_json(run(home, "recovery", "start", "ledger", "r2", "-f", "json"))
        assert (figures["outcome"], figures["c"]) == ("done", 2)
        assert shown(home)["r2"]["epoch"] == "open"

        # A machine that is gone, and one that is only due.
        machines.power_off("r0")
        figures = as_json(run(home, "recovery", "start", "ledger", "r0", "-f", "json"))
        assert (figures["outcome"], figures["lost"], figures["c"]) == ("done", True, 3)
        figures = as_json(run(home, "recovery", "start", "ledger", "r3", "-f", "json"))
        assert (figures["outcome"], figures["lost"], figures["c"]) == ("done", False, 4)
        assert get(home, "colour") == "grey"
        assert run(home, "config", "verify", "ledger").returncode == 0
        assert run(home, "group", "plan", str(spec)).returncode == 0
        assert as_json(run(home, "orphans", "list", "-f", "json"))["orphans"] == []
    finally:
        gone = run(home, "group", "destroy", "ledger")
    assert gone.returncode == 0, gone.stderr
    assert machines.left() == []
    assert not list((home / "agents").glob("*/agent.pid"))


def test_a_recovery_costs_no_liveness_where_k_allows_for_it(home: Path, context: Context) -> None:
    """Six replicas for f=1 and k=1: with one off, the group goes on while another one is recovered."""
    spec = home / "ledger.yaml"
    more = "".join(f"  - {{name: {name}, process: {{}}}}\n" for name in ("porto", "wien"))
    spec.write_text(SPEC.replace("f: 1\n", "f: 1\nk: 1\n") + more)
    machines = Machines(home, context)
    try:
        assert len(as_json(run(home, "group", "apply", str(spec), "-f", "json"))["members"]) == 6
        put(home, "before", "1")
        machines.power_off("r1")
        command = [sys.executable, "-m", "cloudfit_orchestrator.cli", "recovery", "start", "ledger", "r2", "-f", "json"]
        environment = {**os.environ, "CLOUDFIT_HOME": str(home)}
        written = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as recovery:
            while recovery.poll() is None:
                put(home, f"during-{written}", str(written))
                written += 1
            said, told = recovery.communicate()
        assert recovery.returncode == 0, told
        assert json.loads(said)["outcome"] == "done"
        assert written > 1
        assert [get(home, f"during-{i}") for i in range(written)] == [str(i) for i in range(written)]
        assert shown(home)["r2"]["epoch"] == "open"
    finally:
        gone = run(home, "group", "destroy", "ledger")
    assert gone.returncode == 0, gone.stderr
