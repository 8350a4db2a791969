"""A replica is recovered on clouds that are said to have no Cinder: its state is on its machine's own disk, and the
recovery machine reads a server image of it.
"""

from collections.abc import Iterator

import pytest
import yaml

from tests.openstack.lab.layout import DEFAULT_CLOUDS, Lab
from tests.openstack.machines import HOME, everything, user_of_lab
from tests.user import User

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(2700)]

LAB = Lab(HOME)
GROUP, WRITES = "bare", 20


def spec() -> str:
    document = yaml.safe_load(LAB.spec.read_text())
    for cloud in document["clouds"]:
        if "openstack" in cloud:
            cloud["openstack"] |= {"state": "instance", "flavor": "cloudfit.medium"}
            cloud["openstack"].pop("volume_type")
    soon = {"checkpoint_period": 8, "window": 32}  # so few writes must reach a checkpoint: a disk is read up to one
    return yaml.safe_dump(document | {"group": GROUP, "service": "kv", "parameters": soon}, sort_keys=False)


@pytest.fixture
def user() -> Iterator[User]:
    with user_of_lab(GROUP, spec) as someone:
        yield someone


def test_a_replica_without_a_volume_is_recovered(user: User) -> None:
    labs = [{"name": name, "clouds_yaml": LAB.clouds_yaml} for name in DEFAULT_CLOUDS]
    before = [everything(lab) for lab in labs]
    user.run("image", "build")
    user.run("group", "apply", str(user.spec))
    for number in range(WRITES):
        user.put(f"key{number}", f"value{number}")
    old = next(m for m in user.members().values() if m["cloud"] == DEFAULT_CLOUDS[0])

    figures = user.json("recovery", "start", GROUP, old["replica"])
    assert figures["outcome"] == "done"
    # Of so small a state each chunk may have changed since: then the disk's is read, and found stale.
    asked = {source for kind in ("from", "stale", "absent") for source in figures["transfer"][kind]}
    assert any(source.startswith(old["replica"]) for source in asked), f"nobody read the old machine's disk: {asked}"
    new = user.members()[old["replica"]]
    assert new["incarnation"] > old["incarnation"]
    assert (new["reachable"], new["epoch"]) == ("yes", "open")
    user.put("key0", "later")
    assert user.get("key0") == "later"
    assert user.get(f"key{WRITES - 1}") == f"value{WRITES - 1}"

    user.run("group", "destroy", GROUP)
    assert user.json("orphans", "list")["orphans"] == []
    assert [everything(lab) for lab in labs] == before
    print({name: figures[name] for name in ("stages_s", "total_s") if name in figures})
