"""Every call of create, snapshot and destroy, spoilt in every way: the same final state, no orphan, no duplicate.

Each case spoils one call. A caller that is told "temporary" asks again, as the controller does. By default a sample of
the matrix runs; CLOUDFIT_FAULTS=all runs the whole of it (some minutes).
"""

import copy
import os
from dataclasses import replace

import pytest

from cloudfit_orchestrator.clouds.base import MachineState
from cloudfit_orchestrator.model.errors import TemporaryError
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from cloudfit_orchestrator.testing.openstack_proxy import Fault, Proxy
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, owner, quick

MAX_TRIES = 4  # of one act: one spoilt call costs one of them at most, a stall or two more
READ_TIMEOUT_S = 0.5
WHOLE = os.environ.get("CLOUDFIT_FAULTS") == "all"
STRIDE = 1 if WHOLE else 17  # prime to the lengths of the acts, so that the sample wanders over all calls


class Stage:
    """A cloud behind a proxy, and machines of ours and of a stranger in it."""

    place = PLACE

    def __init__(self, directory, fake, proxy):
        self.directory, self.fake, self.proxy = directory, fake, proxy
        self.keystone = proxy.keystone.removesuffix("/identity/v3")

    def driving(self):
        return driving(self.directory, self.fake, self.place, url=self.keystone, read_timeout_s=READ_TIMEOUT_S)

    def again(self, act):
        for _ in range(MAX_TRIES - 1):
            try:
                return act()
            except TemporaryError:
                continue
        return act()

    def kinds(self):
        return {kind: len(found) for kind, found in self.fake.objects.items() if found}

    # The acts, each on what the one before left.

    def create(self):
        with self.driving() as cloud:
            spec = self.again(lambda: machine_spec(self.directory, cloud))
            made = self.again(lambda: cloud.create(spec))
            self.again(lambda: cloud.admit("dep", "ledger", [spec.network.address], 7000))
        assert made.state is MachineState.RUNNING
        assert self.kinds() == {
            "servers": 1, "server_groups": 1, "images": 4, "ports": 1, "security_groups": 1,
            "security_group_rules": 2, "volumes": 1,
        }  # fmt: skip
        server = self.fake.objects["servers"][made.id]
        (volume,) = self.fake.objects["volumes"].values()
        assert server["os-extended-volumes:volumes_attached"] == [{"id": volume["id"]}]
        assert volume["status"] == "in-use"
        assert all(i["status"] == "active" for i in self.fake.objects["images"].values())

    def snapshot(self):
        with self.driving() as cloud:
            machine = self.again(lambda: cloud.find(owner()))
            machine = self.again(lambda: cloud.pause(machine))
            taken = self.again(lambda: cloud.snapshot(machine, "rec1"))
            assert self.again(lambda: cloud.resume(machine)).state is MachineState.RUNNING
            assert [s.id for s in self.again(lambda: cloud.snapshots("dep"))] == [taken.id]
            reader = owner(incarnation=2, operation="rec1")
            spec = self.again(lambda: machine_spec(self.directory, cloud, reader, disk=False, attach=taken))
            self.again(lambda: cloud.create(spec))
        assert self.kinds() | {"images": 4, "security_group_rules": 2} == {
            "servers": 2, "server_groups": 1, "images": 4, "ports": 2, "security_groups": 1,
            "security_group_rules": 2, "volumes": 2, "snapshots": 1,
        }  # fmt: skip

    def destroy(self):
        with self.driving() as cloud:
            for incarnation in (2, 1):
                machine = self.again(lambda n=incarnation: cloud.find(owner(incarnation=n)))
                self.again(lambda m=machine: cloud.destroy(m))
            (taken,) = self.again(lambda: cloud.snapshots("dep"))
            self.again(lambda: cloud.delete_snapshot(taken))
            self.again(lambda: cloud.delete_network("dep", "dep-lisbon"))
        assert self.kinds() == {}


# What there is without Cinder once a machine is made.
ONE_MACHINE = {
    "servers": 1, "server_groups": 1, "images": 3, "ports": 1, "security_groups": 1, "security_group_rules": 2,
}  # fmt: skip


class OneDisk(Stage):
    """The same without Cinder."""

    place = replace(PLACE, volume_type="", state="instance")

    def create(self):
        with self.driving() as cloud:
            spec = self.again(lambda: machine_spec(self.directory, cloud))
            self.again(lambda: cloud.create(spec))
            self.again(lambda: cloud.admit("dep", "ledger", [spec.network.address], 7000))
        assert self.kinds() == ONE_MACHINE

    def snapshot(self):
        with self.driving() as cloud:
            machine = self.again(lambda: cloud.find(owner()))
            taken = self.again(lambda: cloud.snapshot(machine, "rec1"))
            assert [s.id for s in self.again(lambda: cloud.snapshots("dep"))] == [taken.id]
            reader = owner(incarnation=2, operation="rec1")
            spec = self.again(lambda: machine_spec(self.directory, cloud, reader, disk=False, attach=taken))
            self.again(lambda: cloud.create(spec))
        assert self.kinds() == ONE_MACHINE | {"servers": 2, "ports": 2, "images": 5}  # the server's, and a carrier
        assert all(i["status"] == "active" for i in self.fake.objects["images"].values())


ACTS = ("create", "snapshot", "destroy")


@pytest.fixture(params=[Stage, OneDisk])
def stage(request, monkeypatch, tmp_path):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake, Proxy(f"{fake.url}/identity/v3").serving() as proxy:
        yield request.param(tmp_path, fake, proxy)


@pytest.mark.parametrize("fault", list(Fault))
def test_one_call_is_spoilt(stage, fault):
    starts, lengths = [], []
    for name in ACTS:  # unspoilt: where each act begins, and how many calls it makes
        starts.append(copy.deepcopy(stage.fake.objects))
        stage.proxy.watch()
        getattr(stage, name)()
        lengths.append(sum(1 for c in stage.proxy.calls if c.number))
    assert min(lengths) > 15
    tried, offset = 0, list(Fault).index(fault)
    for name, start, length in zip(ACTS, starts, lengths, strict=True):
        for at in range(1 + (0 if WHOLE else offset % STRIDE), length + 1, STRIDE):
            stage.fake.objects = copy.deepcopy(start)
            stage.proxy.spoil(at, fault)
            try:
                getattr(stage, name)()
            except Exception as error:
                error.add_note(f"{name}, {fault} at call {at}: {stage.proxy.spoilt}")
                raise
            if stage.proxy.spoilt is None:  # how often it looks depends on how fast the machine is
                assert at > length // 2, f"{name} made fewer than {at} calls"
                break
            tried += 1
    print(f"{fault}: {tried} of {sum(lengths)} calls spoilt")
