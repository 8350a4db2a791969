"""A group on two real OpenStack clouds of which nothing is asked but the API: no agent on their hosts, keys by Nova's
config drive (docs/decisions/0014). One boots by UEFI, one has its state on its only disk; the other two replicas of
four stand on this host's libvirt.
"""

from collections.abc import Iterator

import pytest
import yaml

from tests.openstack.lab.layout import DEFAULT_CLOUDS, Lab
from tests.openstack.machines import HOME, everything, user_of_lab
from tests.user import User

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(2700)]

LAB = Lab(HOME)
GROUP = "nonelab"


def spec() -> str:
    """The lab's clouds without their agents, and two of our own."""
    clouds = [c for c in yaml.safe_load(LAB.spec.read_text())["clouds"] if "openstack" in c]
    for cloud, way in zip(clouds, ({"boot": "uefi"}, {"state": "instance"}), strict=True):
        cloud["openstack"].pop("agent")
        cloud["openstack"] |= way
    clouds += [{"name": name, "libvirt": {"uri": "qemu:///system"}} for name in ("ulm", "graz")]
    head = {"apiVersion": "cloudfit/v1", "group": GROUP, "service": "kv", "f": 1, "trust": "none", "algorithm": "pbft"}
    return yaml.safe_dump({**head, "clouds": clouds}, sort_keys=False)


@pytest.fixture
def user() -> Iterator[User]:
    with user_of_lab(GROUP, spec) as someone:
        yield someone


def test_a_group_over_clouds_that_nobody_has_a_hold_on(user: User) -> None:
    labs = [{"name": name, "clouds_yaml": LAB.clouds_yaml} for name in DEFAULT_CLOUDS]
    before = [everything(lab) for lab in labs]
    user.run("image", "build")
    user.run("group", "preflight", str(user.spec))
    user.run("group", "apply", str(user.spec))
    members = user.members()
    assert {m["cloud"] for m in members.values()} == {*DEFAULT_CLOUDS, "ulm", "graz"}
    assert {(m["reachable"], m["verified"], m["epoch"]) for m in members.values()} == {("yes", "unmeasured", "open")}
    user.put("colour", "blue")
    assert user.get("colour") == "blue"

    for cloud in DEFAULT_CLOUDS:
        replica = next(r for r, m in members.items() if m["cloud"] == cloud)
        assert user.json("recovery", "start", GROUP, replica)["outcome"] == "done"
        assert user.members()[replica]["epoch"] == "open"
        assert user.get("colour") == "blue"
    user.put("colour", "green")
    assert user.get("colour") == "green"

    user.run("group", "destroy", GROUP)
    assert user.json("orphans", "list")["orphans"] == []
    assert [everything(lab) for lab in labs] == before
