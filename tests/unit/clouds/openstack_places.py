"""A driver before a cloud in memory."""

from contextlib import contextmanager

import yaml

from cloudfit_orchestrator.clouds import openstack_api, openstack_volumes
from cloudfit_orchestrator.clouds.base import MachineSpec, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.model.image import Manifest, Part, Role
from cloudfit_orchestrator.model.one_disk import STATE_ARGUMENT
from cloudfit_orchestrator.model.signing import sha256
from cloudfit_orchestrator.model.spec import OpenStackPlace
from cloudfit_orchestrator.testing.openstack_fake import GATEWAY, FakeOpenStack

PLACE = OpenStackPlace(cloud="lisbon", flavor="small", network="replicas", volume_type="replicas")


def quick(monkeypatch):
    """Pauses of a cloud that answers within microseconds."""
    monkeypatch.setattr(openstack_api, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(openstack_api, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(openstack_volumes, "SETTLE_S", 0.05)


def write_clouds(directory, document):
    path = directory / "clouds.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@contextmanager
def driving(directory, fake=None, place=PLACE, url="", read_timeout_s=5.0, repeat_for_s=2.0, **changes):
    fake = fake or FakeOpenStack()
    path = write_clouds(directory, fake.clouds_yaml(url, **changes))
    api = Api(place.cloud, place.region, files=[path], read_timeout_s=read_timeout_s, repeat_for_s=repeat_for_s)
    with OpenStackCloud(home=directory, place=place, api=api) as cloud:
        yield cloud


def owner(replica="r1", incarnation=1, operation="op1", role=Role.REPLICA, group="ledger", deployment="dep"):
    return Ownership(deployment, group, replica, incarnation, role, operation)


def manifest(directory, name="replica", role=Role.REPLICA):
    parts = []
    for kind, file in (("kernel", "vmlinuz"), ("initramfs", "initramfs"), ("root", "root.img")):
        content = f"{name} {kind}".encode() * 100
        (directory / file).write_bytes(content)
        parts.append(Part(kind, file, 0, len(content), sha256(content).hex()))
    line = f"console=ttyS0 quiet {STATE_ARGUMENT}"
    return Manifest(name, role, False, line, "ff", tuple(parts), (), "debian")  # noqa: FBT003


def machine_spec(directory, cloud=None, who=None, *, disk=True, **changes):
    who = who or owner()
    address = "127.77.0.200"
    if cloud is not None:
        address = cloud.reserve_address(who.deployment, who.group, who.replica, who.role, who.operation)
    return MachineSpec(
        owner=who,
        image_dir=directory,
        manifest=changes.pop("manifest", None) or manifest(directory),
        memory_mib=changes.pop("memory_mib", 384),
        cpus=1,
        network=NetworkSpec("dep-lisbon", address, 24, GATEWAY),
        state_disk=StateDisk(256) if disk else None,
        **changes,
    )
