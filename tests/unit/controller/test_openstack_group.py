"""A group's whole way over two OpenStack clouds in memory: apply, recovery, destroy, with agents that are fakes."""

import tempfile
from pathlib import Path

import pytest

from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.orphans import orphans, sweep
from cloudfit_orchestrator.controller.ports import Context, Image
from cloudfit_orchestrator.controller.preflight import examine
from cloudfit_orchestrator.controller.recover import recover
from cloudfit_orchestrator.model.errors import PermanentError
from cloudfit_orchestrator.model.image import Role, manifest_digest, seal_manifest
from cloudfit_orchestrator.testing.cloud import FakeImages, FakeSites
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import manifest, quick, write_clouds
from tests.unit.controller.worlds import Bench, spec

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, openstack: {cloud: lisbon, flavor: small, network: replicas, agent: {}}}
  - {name: passau, openstack: {cloud: lisbon, flavor: small, network: others, agent: {}}}
  - {name: ulm, process: {}}
recovery: {keep_evidence: 1}
"""


class Seen(OpenStackCloud):
    """The driver, whose machines the fake agent of its host sees."""

    def __init__(self, host, **how):
        super().__init__(**how)
        self._host = host

    def create(self, spec):
        return self._show(super().create(spec), spec)

    def pause(self, machine):
        return self._show(super().pause(machine))

    def resume(self, machine):
        return self._show(super().resume(machine))

    def destroy(self, machine):
        super().destroy(machine)
        self._host.all.pop(machine.id, None)
        self._host.specs.pop(machine.id, None)

    def _show(self, machine, spec=None):
        self._host.all[machine.id] = machine
        self._host.specs[machine.id] = spec or self._host.specs[machine.id]
        return machine


class Sites(FakeSites):
    """Fakes, but for the OpenStack drivers."""

    def __init__(self, world, directory, clouds_yaml):
        super().__init__(world)
        self._directory, self._file, self._drivers = directory, clouds_yaml, {}

    def cloud(self, spec):
        if spec.openstack is None:
            return super().cloud(spec)
        if spec.name not in self._drivers:
            api = Api(spec.openstack.cloud, files=[self._file], repeat_for_s=2.0)
            how = {"home": self._directory, "place": spec.openstack, "api": api}
            self._drivers[spec.name] = Seen(self._fake(spec), **how)
        return self._drivers[spec.name]

    def close(self):
        for driver in self._drivers.values():
            driver.close()


class Images(FakeImages):
    """Signed manifests with files."""

    def __init__(self, directory: Path):
        super().__init__()
        self._directory = directory

    def verified(self, reference, driver, *, allow_adversary):
        if driver != "openstack":
            return super().verified(reference, driver, allow_adversary=allow_adversary)
        name = reference.partition("@")[0]
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        found = manifest(directory, name)
        if name == "recovery":
            found = type(found)(**{f: getattr(found, f) for f in found.__slots__} | {"role": Role.RECOVERY})
        envelope = seal_manifest(found, self._key)
        return Image(manifest_digest(envelope), envelope, found, directory)


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    fake = FakeOpenStack()
    fake.networks.append(fake.networks[0] | {"id": "n2", "name": "others"})
    fake.subnets.append(fake.subnets[0] | {"id": "s2", "network_id": "n2", "cidr": "127.78.0.0/24",
                                           "gateway_ip": "127.78.0.1"})  # fmt: skip
    with fake.serving():
        yield fake


@pytest.fixture
def bench(fake, tmp_path):
    with tempfile.TemporaryDirectory(prefix="cf") as short:  # a home's sockets have short paths
        yield from _bench(Path(short), fake, tmp_path)


def _bench(short, fake, tmp_path):
    bench = Bench(short / "home")
    bench.sites = Sites(bench.world, tmp_path, write_clouds(tmp_path, fake.clouds_yaml()))
    bench.images = Images(tmp_path)
    yield bench
    bench.sites.close()
    bench.close()


def doors(fake):
    """Who is let in, by the label of the security group."""
    return {
        rule["remote_ip_prefix"].partition("/")[0]
        for rule in fake.objects["security_group_rules"].values()
        if rule["direction"] == "ingress"
    }


def hosts(context: Context):
    return {m.host for m in context.journal.machines("ledger")}


def test_apply_recover_destroy(bench, fake):
    wanted = spec(SPEC)
    done = apply(bench.process(), wanted)
    assert len(done.members) == 3
    assert apply(bench.process(), wanted).changed is False
    context = bench.process()
    assert {s["name"] for s in fake.objects["servers"].values()} == {
        f"{context.journal.deployment}-ledger-{m.replica}-{m.incarnation}-replica-" + s["name"][-8:]
        for m in context.journal.machines("ledger") for s in fake.objects["servers"].values()
        if f"-{m.replica}-{m.incarnation}-" in s["name"]
    }  # fmt: skip
    assert hosts(context) <= doors(fake)
    assert orphans(context)[0].orphans == ()

    renewed = recover(bench.process(), "ledger", "r0")
    assert renewed.outcome == "done"
    context = bench.process()
    assert hosts(context) | {"127.0.0.1"} == doors(fake), "old members are not let in any more"
    assert len(fake.objects["servers"]) == 2
    assert len(fake.objects["snapshots"]) == 1
    assert len(fake.objects["volumes"]) == 3, "two in use, one below the evidence"
    assert [f.orphans for f in orphans(context)] == [()] * 3

    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())
    assert sweep(bench.process())[0].orphans == ()


def test_apply_recover_destroy_without_cinder(bench, fake):
    """The same steps; evidence is a server image, and the old machine is never paused."""
    fake.wrong.services = {"volumev3"}
    apply(bench.process(), spec(SPEC))
    renewed = recover(bench.process(), "ledger", "r0")
    assert renewed.outcome == "done"
    assert None not in (renewed.replica_outage_s, renewed.group_outage_s)
    kept = [i for i in fake.objects["images"].values() if i.get("cloudfit_kind") == "snapshot"]
    assert [(i["cloudfit_replica"], i["status"]) for i in kept] == [("r0", "active")]
    assert len(fake.objects["servers"]) == 2
    context = bench.process()
    assert [f.orphans for f in orphans(context)] == [()] * 3
    again = recover(bench.process(), "ledger", "r0")
    assert again.outcome == "done"
    now = [i["id"] for i in fake.objects["images"].values() if i.get("cloudfit_kind") == "snapshot"]
    assert len(now) == 1, "as many as keep_evidence says"
    assert now != [kept[0]["id"]]
    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())
    assert not [c for c in fake.calls if " volume:" in c or "pause" in c]


def test_a_failed_creation_is_gone_on_with_once_it_is_mended(bench, fake):
    fake.wrong.server_fault = "No valid host was found."
    with pytest.raises(PermanentError, match="No valid host was found"):
        apply(bench.process(), spec(SPEC))
    assert not {"servers", "volumes", "ports"} & {k for k, found in fake.objects.items() if found}
    fake.wrong.server_fault = ""
    assert apply(bench.process(), spec(SPEC)).changed
    addresses = {p["fixed_ips"][0]["ip_address"] for p in fake.objects["ports"].values()}
    assert addresses < hosts(bench.process())
    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())


def test_all_that_is_in_the_way_is_said_before_anything_is_made(bench, fake):
    fake.limits["totalInstancesUsed"] = 10
    fake.subnets[1]["cidr"] = "127.77.0.0/16"
    with pytest.raises(PermanentError) as caught:
        apply(bench.process(), spec(SPEC))
    for text in (
        "lisbon: quota of compute",
        "passau: quota of compute",
        "ledger: networks: lisbon and passau both have",
    ):
        assert text in str(caught.value)
    assert not any(fake.objects.values())
    assert bench.process().journal.group("ledger") is None
    assert {f.cloud for f in examine(bench.process(), spec(SPEC), {})} == {"lisbon", "passau", ""}


def test_orphans_of_a_home_are_swept(bench, fake):
    apply(bench.process(), spec(SPEC))
    context = bench.process()
    row = next(m for m in context.journal.machines("ledger") if m.cloud == "lisbon")
    context.journal.machine_gone(row)  # as if the journal were older than the clouds
    found = {o.kind.value for f in orphans(context) for o in f.orphans}
    assert found == {"machine"}
    sweep(context)
    assert all(not f.orphans for f in orphans(context))
    assert len(fake.objects["servers"]) == 1
