"""A group without any hold on its hosts, on real machines: config drives, agents inside, PBFT (docs/decisions/0014)."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import libvirt
import pytest

from cloudfit_orchestrator.cli.output import EXIT_CHANGES_PENDING
from tests.user import CLOUDFIT, User

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

GROUP = "nonevm"
CLOUDS = ("lisbon", "passau", "ulm", "graz")
SPEC = f"""
apiVersion: cloudfit/v1
group: {GROUP}
service: kv
f: 1
trust: none
algorithm: pbft
clouds:
""" + "".join(f'  - {{name: {name}, libvirt: {{uri: "qemu:///system"}}}}\n' for name in CLOUDS)


@pytest.fixture
def user() -> Iterator[User]:
    with User.at_work(GROUP, SPEC) as someone:
        yield someone


def domains(user: User) -> dict[str, "libvirt.virDomain"]:
    """Machines of this home's group, by replica."""
    places = [p.name for p in (user.home / "machines").iterdir() if p.is_dir() and p.name != "probe"]
    found = {}
    for domain in libvirt.open("qemu:///system").listAllDomains():
        parts = domain.name().split("-")
        if parts[0] in places and parts[1] == GROUP:
            found[parts[2]] = domain
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """A machine that boots tells nobody."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(2)


def test_a_group_of_real_machines_that_trusts_no_host(user: User) -> None:
    user.run("image", "build")
    planned = subprocess.run(
        [*CLOUDFIT, "group", "plan", str(user.spec), "-f", "json"],
        env=user.environment,
        capture_output=True,
        check=False,
    )
    assert planned.returncode == EXIT_CHANGES_PENDING
    assert json.loads(planned.stdout)["malicious_cloud"].endswith("each holds at most 1, so it counts within f=1")
    # A controller that dies while machines boot makes the same drives again, and goes on.
    assert user.stop_when("create", signal.SIGKILL, "group", "apply", str(user.spec)) == -signal.SIGKILL
    user.run("group", "apply", str(user.spec))
    before = user.incarnations()
    assert sorted(domains(user)) == sorted(before) == ["r0", "r1", "r2", "r3"]
    assert {m["verified"] for m in user.members().values()} == {"unmeasured"}
    assert user.agents() == {}
    user.put("colour", "blue")
    assert user.get("colour") == "blue"

    # Power lost: the machine finds its keys again, and is needed for the next write.
    domains(user)["r2"].reset()
    wait_for(lambda: user.members()["r2"]["epoch"] != "open")
    wait_for(lambda: user.members()["r2"]["epoch"] == "open")
    domains(user)["r0"].suspend()
    user.put("colour", "green")
    domains(user)["r0"].resume()
    assert user.get("colour") == "green"

    figures = user.json("recovery", "start", GROUP, "r1")
    assert figures["outcome"] == "done"
    after = user.incarnations()
    assert after["r1"] == figures["new_incarnation"] != before["r1"]
    assert {**after, "r1": 0} == {**before, "r1": 0}
    assert user.get("colour") == "green"
    user.put("colour", "red")
    assert user.get("colour") == "red"
    user.run("config", "verify", GROUP)

    user.run("group", "destroy", GROUP)
    assert domains(user) == {}
    places = [p for p in (user.home / "machines").iterdir() if p.is_dir() and p.name != "probe"]
    assert [file for place in places for file in place.iterdir()] == []
