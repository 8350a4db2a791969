"""Preflight: everything that would fail, at once, and nothing is made unless a probe is asked for."""

import time

import pytest

from cloudfit_orchestrator.clouds.base import Demand
from cloudfit_orchestrator.clouds.openstack_preflight import Preflight
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import PLACE, driving, quick

DEMAND = Demand(machines=2, memory_mib=384, cpus=1, state_mib=256, root_bytes=30_000_000, command_line="console=ttyS0")


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


def place(**changes):
    return type(PLACE)(**{field: getattr(PLACE, field) for field in PLACE.__slots__} | changes)


def faults(found):
    return {(f.name, f.finding) for f in found if f.verdict == "fail"}


def test_a_good_cloud(tmp_path, fake):
    with driving(tmp_path, fake) as cloud:
        found = cloud.preflight(DEMAND)
        assert faults(found) == set()
        assert {f.name for f in found} >= {"credentials", "service volume", "flavor", "network", "quota of compute"}
        assert not [call for call in fake.calls if not call.startswith("GET")], "a look changes nothing"
        assert faults(cloud.preflight(DEMAND, probe=True)) == set()
    assert not any(fake.objects.values()), "a probe leaves nothing"


def test_everything_is_said_at_once(tmp_path, fake):
    fake.max_microversion = "2.60"
    fake.networks[0]["port_security_enabled"] = False
    fake.limits["totalInstancesUsed"] = 9
    fake.volume_limits["maxTotalVolumes"] = 1
    fake.flavors[0] |= {"ram": 128, "vcpus": 1, "swap": 64}
    with driving(tmp_path, fake, place(volume_type="golden", availability_zone="moon")) as cloud:
        found = cloud.preflight(Demand(2, 384, 1, 256, 2 << 30, "x" * 300))
    said = "\n".join(f"{name}: {text}" for name, text in faults(found))
    for text in (
        "compute version: 2.60, 2.64 is needed",
        "flavor: 128 MiB of memory, the spec wants 384",
        "flavor: an ephemeral or swap disk",
        "flavor: a disk of 1 GiB, the machine wants 2",
        "zone: no zone 'moon' that is up; there are nova",
        "network: port security is off",
        "boot: the kernel's command line has 300 characters",
        "volume type: no volume type 'golden'; there are replicas",
        "quota of compute: instances: 9 of 10 used, 2 needed",
        "quota of volumes: volumes: 0 of 1 used, 2 needed",
    ):
        assert text in said
    assert all(f.fix for f in found if f.verdict == "fail")


def test_room_for_a_recovery_is_only_warned_of(tmp_path, fake):
    fake.limits["totalInstancesUsed"] = 8
    with driving(tmp_path, fake) as cloud:
        found = cloud.preflight(DEMAND)
    warned = [f.finding for f in found if f.verdict == "warn" and f.name == "quota of compute"]
    assert warned == ["instances: 8 of 10 used, 2 needed, and 2 more during a recovery"]


@pytest.mark.parametrize(("seconds", "verdict"), [(0, "ok"), (60, "warn"), (3600, "fail")])
def test_clocks_that_differ(tmp_path, fake, seconds, verdict):
    with driving(tmp_path, fake) as cloud:
        look = Preflight(
            cloud.api, PLACE, cloud.network, cloud.servers, cloud.images, clock=lambda: time.time() - seconds
        )
        (found,) = (f for f in look.run(DEMAND) if f.name == "clock")
    assert found.verdict == verdict


def test_no_cinder_and_no_role(tmp_path, fake):
    fake.wrong.services = {"volumev3"}
    fake.roles = ["reader"]
    with driving(tmp_path, fake, place(state="volume")) as cloud:
        found = cloud.preflight(DEMAND)
    assert ("service volume", "not in the catalogue of this region") in faults(found)
    assert next(f for f in found if f.name == "credentials").verdict == "warn"


def test_a_wrong_password_is_the_only_finding(tmp_path, fake):
    with driving(tmp_path, fake, password="wrong") as cloud:
        (found,) = cloud.preflight(DEMAND)
    assert (found.name, found.verdict) == ("credentials", "fail")


def test_a_call_that_policy_forbids(tmp_path, fake):
    fake.wrong.deny = {"POST compute:/os-server-groups": (403, "Policy doesn't allow it to be performed.")}
    with driving(tmp_path, fake) as cloud:
        assert faults(cloud.preflight(DEMAND)) == set()
        (fault,) = faults(cloud.preflight(DEMAND, probe=True))
    assert "Policy doesn't allow it" in fault[1]
    assert not any(fake.objects.values())
