"""The OpenStack driver against a cloud in memory, over real HTTP."""

from dataclasses import replace

import pytest

from cloudfit_orchestrator.clouds.base import MachineState, OrphanKind
from cloudfit_orchestrator.clouds.openstack_tags import group_label
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, owner, quick


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


@pytest.fixture
def cloud(fake, tmp_path):
    with driving(tmp_path, fake) as cloud:
        yield cloud


def left(fake):
    return {kind: [d.get("name") for d in found.values()] for kind, found in fake.objects.items() if found}


def test_a_machines_life(fake, cloud, tmp_path):
    spec = machine_spec(tmp_path, cloud)
    made = cloud.create(spec)
    assert made.state is MachineState.RUNNING
    assert made.reference == {"driver": "libvirt", "uri": "qemu:///system", "uuid": made.id}
    assert cloud.create(spec).id == made.id
    assert cloud.find(spec.owner).id == made.id
    assert [m.id for m in cloud.machines("dep")] == [made.id]
    paused = cloud.pause(made)
    assert paused.state is MachineState.PAUSED
    taken = cloud.snapshot(paused, "rec1")
    assert cloud.snapshot(paused, "rec1").id == taken.id
    assert cloud.resume(paused).state is MachineState.RUNNING
    new = cloud.create(machine_spec(tmp_path, cloud, owner(incarnation=2, operation="rec1")))
    exporter_owner = owner(incarnation=3, operation="rec2")
    exporter = cloud.create(machine_spec(tmp_path, cloud, exporter_owner, disk=False, attach=taken))
    assert len(fake.objects["volumes"]) == 3
    cloud.destroy(exporter)
    cloud.destroy(made)
    assert cloud.find(made.owner) is None
    assert len(fake.objects["volumes"]) == 2, "the volume below the evidence stays"
    assert cloud.stop(new).state is MachineState.STOPPED
    assert cloud.start(new).state is MachineState.RUNNING
    cloud.destroy(new)
    cloud.delete_snapshot(taken)
    cloud.delete_network("dep", "dep-lisbon")
    assert left(fake) == {}


def test_a_machine_that_lost_its_group_tag_is_still_ours(fake, cloud, tmp_path):
    spec = machine_spec(tmp_path, cloud)
    made = cloud.create(spec)
    fake.objects["servers"][made.id]["tags"] = []
    assert cloud.create(spec).id == made.id
    cloud.destroy(made)
    assert not fake.objects["servers"]


@pytest.mark.parametrize("told", [{"server": "soon"}, {"server": {"id": 7}}, {"server": {"id": "another"}}, {}])
def test_what_an_answer_says_of_a_new_server_is_only_a_hint(monkeypatch, fake, cloud, tmp_path, told):
    real = fake.answer

    def answer(method, target, headers, body):
        status, document, more = real(method, target, headers, body)
        return status, told if method == "POST" and target.endswith("/servers") else document, more

    monkeypatch.setattr(fake, "answer", answer)
    made = cloud.create(machine_spec(tmp_path, cloud))
    assert list(fake.objects["servers"]) == [made.id]


@pytest.mark.parametrize(("listing", "key"), [("/servers/detail", "servers"), ("/ports", "ports")])
def test_a_machine_costs_the_same_however_many_there_are(monkeypatch, fake, cloud, tmp_path, listing, key):
    for replica in ("r1", "r2", "r3"):
        cloud.create(machine_spec(tmp_path, cloud, owner(replica)))
    real, shown = fake.answer, []

    def answer(method, target, headers, body):
        answered = real(method, target, headers, body)
        if method == "GET" and listing in target:
            shown.append(len(answered[1][key]))
        return answered

    monkeypatch.setattr(fake, "answer", answer)
    cloud.create(machine_spec(tmp_path, cloud, owner(group="other")))
    assert shown
    assert max(shown) <= 1


@pytest.mark.parametrize("known", [False, True])
def test_the_port_that_a_machine_left_goes_with_its_evidence_or_by_itself(fake, tmp_path, known):
    with driving(tmp_path, fake, replace(PLACE, state="instance")) as cloud:
        made = cloud.create(machine_spec(tmp_path, cloud))
        fake._server_gone(fake.objects["servers"][made.id])
        found = cloud.orphans("dep", [], evidence=[made.owner] if known else [])
        wanted = (OrphanKind.DISK, made.owner) if known else (OrphanKind.NETWORK, None)
        assert wanted in [(o.kind, o.owner) for o in found]
        cloud.sweep("dep", [o for o in found if (o.kind, o.owner) == wanted])
        assert not fake.objects["ports"]


@pytest.mark.parametrize("members", [[], ["s"]])
def test_server_groups_are_listed_once_where_the_group_is_new_and_of_two_one_stays(fake, cloud, tmp_path, members):
    old = fake._new("server_groups", {"name": group_label("dep", "ledger"), "members": [*members], "id": "~"})
    fake.objects["server_groups"] = {"~": old}  # the last by id
    cloud.create(machine_spec(tmp_path, cloud))
    (group,) = fake.objects["server_groups"].values()
    assert len(group["members"]) == len(members) + 1
    assert fake.calls.count("GET compute:/os-server-groups") == 1
    cloud.api.forget()
    cloud.create(machine_spec(tmp_path, cloud, owner("r2")))
    assert len(group["members"]) == len(members) + 2, "the group is not new any more"
    assert fake.calls.count("POST compute:/os-server-groups") == 1
