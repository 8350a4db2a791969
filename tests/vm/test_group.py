"""The main job as a user does it, on real machines: `cloudfit` commands, images, libvirt domains, agents, a client.

One story, since each step needs the one before: a controller that is killed and one that is interrupted, a machine that
is reset within its epoch, a recovery, and nothing left at the end.
"""

import base64
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

import libvirt
import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

GROUP = "vmtest"
SPEC = f"""
apiVersion: cloudfit/v1
group: {GROUP}
service: kv
f: 1
clouds:
  - {{name: lisbon, libvirt: {{uri: "qemu:///system"}}}}
  - {{name: passau, libvirt: {{uri: "qemu:///system"}}}}
  - {{name: ulm,    libvirt: {{uri: "qemu:///system"}}}}
"""
CLOUDFIT = [sys.executable, "-m", "cloudfit_orchestrator.cli"]


class User:
    """Someone at a shell with a home of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.spec = home / "group.yaml"
        self.spec.write_text(SPEC)
        self.environment = {**os.environ, "CLOUDFIT_HOME": str(home)}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*CLOUDFIT, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*CLOUDFIT, *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == code, f"cloudfit {' '.join(arguments)}: {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout

    def json(self, *arguments: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run(*arguments, "-f", "json"))
        assert document["schema"] == 1
        return document

    def stop_when(self, stage: str, number: signal.Signals, *arguments: str) -> int:
        """Run a command and send it a signal as soon as it says that it has reached `stage`."""
        process = self.start(*arguments)
        assert process.stderr is not None
        for line in process.stderr:
            if f'"stage": "{stage}"' in line:
                process.send_signal(number)
                break
        else:
            pytest.fail(f"cloudfit {' '.join(arguments)} never reached {stage}")
        process.communicate(timeout=120)
        return process.returncode

    def domains(self) -> dict[str, "libvirt.virDomain"]:
        """Running machines of this home, by replica#incarnation."""
        deployment = next(iter(self.machines_dir())).name if any(self.machines_dir()) else "none"
        connection = libvirt.open("qemu:///system")
        found = {}
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            parts = domain.name().split("-")
            if parts[0] == deployment and parts[1] == GROUP and parts[4] == "replica":
                found[f"{parts[2]}#{parts[3]}"] = domain
        return found

    def machines_dir(self) -> list[Path]:
        return [p for p in (self.home / "machines").iterdir() if p.is_dir() and p.name != "probe"]

    def agents(self) -> list[int]:
        pids = []
        for place in (self.home / "agents").glob("*/agent.pid"):
            pid = json.loads(place.read_text().split()[0])
            if Path(f"/proc/{pid}").exists():
                pids.append(pid)
        return pids


@pytest.fixture
def user() -> Iterator[User]:
    home = Path(tempfile.mkdtemp(prefix="cfvm", dir="/var/tmp"))  # sockets need a short path, QEMU's user a way in
    home.chmod(0o711)
    someone = User(home)
    yield someone
    subprocess.run([*CLOUDFIT, "group", "destroy", GROUP], env=someone.environment, check=False, capture_output=True)
    shutil.rmtree(home)


def put(user: User, key: str, value: str) -> None:
    user.run("kv", "put", GROUP, key, value)


def get(user: User, key: str) -> str:
    document = user.json("kv", "get", GROUP, key)
    return base64.b64decode(document["value_base64"]).decode()


def members(user: User) -> dict[str, int]:
    return {m["replica"]: m["incarnation"] for m in user.json("group", "show", GROUP)["members"]}


def names_in_libvirt() -> list[str]:
    """Of all machines and networks there are, running or not."""
    connection = libvirt.open("qemu:///system")
    return [x.name() for x in (*connection.listAllDomains(), *connection.listAllNetworks())]


def test_apply_write_recover_destroy(user: User) -> None:
    user.run("image", "build")
    names = {name for image in user.json("image", "list")["images"] for name in image["names"]}
    assert {"replica", "recovery"} <= names

    # A controller that is killed, then one that is interrupted: the same command finishes the job.
    assert user.stop_when("create", signal.SIGKILL, "group", "apply", str(user.spec)) == -signal.SIGKILL
    assert user.stop_when("prepare", signal.SIGINT, "group", "apply", str(user.spec)) == 130
    user.run("group", "apply", str(user.spec))
    before = members(user)
    assert sorted(before) == ["r0", "r1", "r2"]
    assert sorted(user.domains()) == sorted(f"{r}#{i}" for r, i in before.items())  # no orphan, no duplicate
    user.run("group", "apply", str(user.spec))
    assert members(user) == before

    put(user, "colour", "blue")
    assert get(user, "colour") == "blue"

    # Power lost in one machine: it comes back from its log, in the same epoch, and is needed for the next write.
    user.domains()[f"r2#{before['r2']}"].reset()
    user.domains()[f"r0#{before['r0']}"].suspend()
    put(user, "colour", "green")
    user.domains()[f"r0#{before['r0']}"].resume()
    assert get(user, "colour") == "green"

    figures = user.json("recovery", "start", GROUP, "r1")
    assert figures["outcome"] == "done"
    after = members(user)
    assert after["r1"] == figures["new_incarnation"] != before["r1"]
    assert {**after, "r1": 0} == {**before, "r1": 0}
    assert sorted(user.domains()) == sorted(f"{r}#{i}" for r, i in after.items())
    assert get(user, "colour") == "green"
    put(user, "colour", "red")
    assert get(user, "colour") == "red"
    user.run("config", "verify", GROUP)

    deployment = user.machines_dir()[0].name
    assert sum(deployment in name for name in names_in_libvirt()) == 6  # three machines, three networks
    assert len(user.agents()) == 3
    user.run("group", "destroy", GROUP)
    assert not [name for name in names_in_libvirt() if deployment in name]
    assert user.agents() == []
    assert [path for place in user.machines_dir() for path in place.iterdir()] == []
