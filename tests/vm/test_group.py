"""The main job as a user does it, on real machines: `cloudfit` commands, images, libvirt domains, agents, a client.

One story, since each step needs the one before: a controller that is killed and one that is interrupted, a machine that
is reset within its epoch, a recovery, and nothing left at the end.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from tests.user import User

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


@pytest.fixture
def user() -> Iterator[User]:
    with User.at_work(GROUP, SPEC) as someone:
        yield someone


def machines_dir(user: User) -> list[Path]:
    return [p for p in (user.home / "machines").iterdir() if p.is_dir() and p.name != "probe"]


def domains(user: User) -> dict[str, "libvirt.virDomain"]:
    """Running machines of this home, by replica#incarnation."""
    deployment = next((p.name for p in machines_dir(user)), "none")
    connection = libvirt.open("qemu:///system")
    found = {}
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        parts = domain.name().split("-")
        if parts[0] == deployment and parts[1] == GROUP and parts[4] == "replica":
            found[f"{parts[2]}#{parts[3]}"] = domain
    return found


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
    before = user.incarnations()
    assert sorted(before) == ["r0", "r1", "r2"]
    assert sorted(domains(user)) == sorted(f"{r}#{i}" for r, i in before.items())  # no orphan, no duplicate
    user.run("group", "apply", str(user.spec))
    assert user.incarnations() == before

    user.put("colour", "blue")
    assert user.get("colour") == "blue"

    # Power lost in one machine: it comes back from its log, in the same epoch, and is needed for the next write.
    domains(user)[f"r2#{before['r2']}"].reset()
    domains(user)[f"r0#{before['r0']}"].suspend()
    user.put("colour", "green")
    domains(user)[f"r0#{before['r0']}"].resume()
    assert user.get("colour") == "green"

    figures = user.json("recovery", "start", GROUP, "r1")
    assert figures["outcome"] == "done"
    after = user.incarnations()
    assert after["r1"] == figures["new_incarnation"] != before["r1"]
    assert {**after, "r1": 0} == {**before, "r1": 0}
    assert sorted(domains(user)) == sorted(f"{r}#{i}" for r, i in after.items())
    assert user.get("colour") == "green"
    user.put("colour", "red")
    assert user.get("colour") == "red"
    user.run("config", "verify", GROUP)

    deployment = machines_dir(user)[0].name
    assert sum(deployment in name for name in names_in_libvirt()) == 6  # three machines, three networks
    assert len(user.agents()) == 3
    user.run("group", "destroy", GROUP)
    assert not [name for name in names_in_libvirt() if deployment in name]
    assert user.agents() == {}
    assert [path for place in machines_dir(user) for path in place.iterdir()] == []
