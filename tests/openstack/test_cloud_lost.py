"""A whole cloud is lost under a serving group, and comes back, as its operator lives through it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest
import yaml

from cloudfit_orchestrator.controller.journal import Journal
from cloudfit_orchestrator.testing.openstack_proxy import Proxy
from tests.openstack.lab.layout import DEFAULT_HOME, Lab
from tests.openstack.machines import everything
from tests.user import User

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

LAB = Lab(Path(os.environ.get("CLOUDFIT_LAB", DEFAULT_HOME)))
GROUP, LOST = "lostcloud", "passau"
RESERVE = {"name": "faro", "reserve": True, "libvirt": {"uri": "qemu:///system"}}


@pytest.fixture
def clouds_yaml(tmp_path: Path) -> Path:
    if not LAB.spec.exists():
        pytest.fail(f"no lab in {LAB.home}; run: make openstack-lab")
    return tmp_path / "clouds.yaml"


@pytest.fixture
def user(clouds_yaml: Path) -> Iterator[User]:
    spec = yaml.safe_load(LAB.spec.read_text())
    spec |= {"group": GROUP, "clouds": [*spec["clouds"], RESERVE]}
    with User.at_work(GROUP, yaml.safe_dump(spec), OS_CLIENT_CONFIG_FILE=str(clouds_yaml)) as someone:
        yield someone


def by_way_of(proxy: Proxy, file: Path) -> None:
    """Write clouds.yaml such that the lost cloud is reached through the proxy only."""
    document = yaml.safe_load(LAB.clouds_yaml.read_text())
    document["clouds"][LOST]["auth"]["auth_url"] = proxy.keystone
    file.write_text(yaml.safe_dump(document))


def cut_power(told: dict[str, Any], user: User) -> None:
    """The compute host is gone: its machines and its agent."""
    os.kill(user.agents()[LOST], signal.SIGKILL)
    connection = libvirt.open(told["libvirt_uri"])
    for row in Journal(user.home / "journal.sqlite").machines(GROUP):
        if row.cloud == LOST:
            connection.lookupByUUIDString(row.machine_id).destroy()


def place(user: User, replica: str) -> tuple[str, int]:
    member = user.members()[replica]
    return member["cloud"], member["incarnation"]


def test_what_a_lost_cloud_held_is_replaced_elsewhere_and_what_it_left_is_cleared(user: User, clouds_yaml: Path):
    told = json.loads(LAB.state.read_text())["clouds"][LOST]
    lab = {"name": LOST, "clouds_yaml": LAB.clouds_yaml}
    before = everything(lab)
    keystone = yaml.safe_load(LAB.clouds_yaml.read_text())["clouds"][LOST]["auth"]["auth_url"]
    user.run("image", "build")
    with Proxy(keystone).serving() as proxy:
        by_way_of(proxy, clouds_yaml)
        user.run("group", "apply", str(user.spec))
        lost = next(m for m in user.members().values() if m["cloud"] == LOST)
        user.put("colour", "blue")
        cut_power(told, user)
    # From here on nobody answers at the address that clouds.yaml names.
    assert user.get("colour") == "blue"
    user.put("colour", "green")
    began_s = time.monotonic()
    evacuated = user.json("group", "evacuate", GROUP, LOST)
    took_s = time.monotonic() - began_s
    now = place(user, lost["replica"])
    assert now[0] == RESERVE["name"]
    assert now[1] > lost["incarnation"]
    assert user.get("colour") == "green"
    assert everything(lab) > before, "nothing of ours stands in the lost cloud: then nothing was to be cleared"

    with Proxy(keystone).serving() as proxy:
        by_way_of(proxy, clouds_yaml)
        spec = yaml.safe_load(user.spec.read_text())
        for cloud in spec["clouds"]:
            cloud.pop("reserve", None)
            if cloud["name"] == LOST:
                cloud["reserve"] = True
        user.spec.write_text(yaml.safe_dump(spec))
        user.run("group", "apply", str(user.spec))
        assert place(user, lost["replica"]) == now
        user.put("colour", "red")
        assert user.get("colour") == "red"
        assert user.json("orphans", "list")["orphans"] == []
        user.run("group", "destroy", GROUP)
    assert everything(lab) == before
    print({"evacuate_s": round(took_s, 1), **{k: evacuated[k] for k in ("outage_s",) if k in evacuated}})
