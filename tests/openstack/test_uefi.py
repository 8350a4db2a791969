"""Servers that boot by UEFI on a real Nova (make openstack-lab): measured before their only start is served."""

import asyncio
import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.launcher import boot_disk, uki
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.image import Part, Role, seal_manifest
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.openstack.machines import driving, greetings, listing, owner, spec_for
from tests.openstack.test_nova_agent import GUEST, until
from tests.vm.tiny_guest import extract_package, tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

WROTE = "WROTE-OVER-ITS-DISK"
BY_UEFI = {"boot": "uefi", "hidden": True, "protected": True, "flavor": "cloudfit.small"}  # firmware needs some memory


def uefi_image(init, directory):
    """The tiny image as a disk that UEFI boots, with systemd's stub as Debian has it; its directory and manifest."""
    tiny = tiny_image(init)
    plain = tiny_manifest(tiny)
    extract_package("systemd-boot-efi", directory, directory / "stub")
    stub = (directory / "stub/usr/lib/systemd/boot/efi/linuxx64.efi.stub").read_bytes()
    kernel, initramfs, root = ((tiny / name).read_bytes() for name in ("vmlinuz", "initramfs", "root.img"))
    before, behind = boot_disk.frame(uki.make_uki(stub, plain.command_line, initramfs, kernel), len(root))
    half = len(root) // 2
    content = {
        "kernel": ("vmlinuz", 0, kernel),
        "initramfs": ("initramfs", 0, initramfs),
        "root": ("root.img", 0, root[:half]),
        "verity": ("root.img", half, root[half:]),  # the tiny guest has none, and reads no disk
        "esp": ("boot.img", 0, before),
        "gpt": ("boot.img", len(before), behind),
    }
    (directory / "boot.img").write_bytes(before + behind)
    for file in ("vmlinuz", "initramfs", "root.img"):
        (directory / file).write_bytes((tiny / file).read_bytes())
    parts = tuple(
        Part(name, file, offset, len(data), hashlib.sha256(data).hexdigest())
        for name, (file, offset, data) in content.items()
    )
    return directory, replace(plain, parts=parts)


@contextlib.asynccontextmanager
async def admitting(machine, manifest):
    """An agent, and the order to admit `machine` to it."""
    key = Ed25519PrivateKey.generate()
    agent = HostAgent("lab", Ed25519PrivateKey.generate(), controller_keys=[], image_keys=[public_bytes(key)])
    reference = MachineRef("libvirt", uri=machine.reference["uri"], uuid=machine.id)
    who, envelope = Identity("ledger", "r0", 1), seal_manifest(manifest, key)
    try:
        yield agent, Admission(who, Role.REPLICA, reference, envelope, False, 1000.0, {"port": 7000})  # noqa: FBT003
    finally:
        await agent.stop()


@contextlib.contextmanager
def domain_of(machine):
    connection = libvirt.open(machine.reference["uri"])
    try:
        yield connection.lookupByUUIDString(machine.id)
    finally:
        connection.close()


def test_a_server_is_admitted_and_served_for_its_first_start_only(lab, tmp_path, deployment):
    image = uefi_image(GUEST, tmp_path)
    with driving(lab, tmp_path, **BY_UEFI) as cloud, listing(lab, lab["name"]) as c:
        machine = cloud.create(spec_for(cloud, lab, image, owner(deployment, 1, "op1"), disk=False))
        try:
            assert {i.is_protected for i in c.image.images(is_hidden=True)} == {True}
            asyncio.run(_serve_once(c, machine, image[1]))
        finally:
            cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")


async def _serve_once(c, machine, manifest):
    async with admitting(machine, manifest) as (agent, order):

        def status():
            return agent.status()["guests"][0]

        def off():
            with domain_of(machine) as domain:
                return not domain.isActive()

        await agent.admit(order)
        await until(lambda: status()["greeted"])
        with domain_of(machine) as domain:
            domain.reset()  # as a guest's own reboot: firmware would read the disk anew
        await until(off)
        assert status()["lost"] == "", "it may be looked at, but not served"
        await until(lambda: c.compute.get_server(machine.id).status == "SHUTOFF")
        await asyncio.to_thread(c.compute.start_server, machine.id)
        await until(lambda: status()["lost"])
        assert "was started again" in status()["lost"]


def test_a_disk_that_was_written_over_is_not_admitted(lab, tmp_path, deployment):
    spoil = f"dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync && echo {WROTE} here >/dev/ttyS0\nwhile true"
    image = uefi_image(GUEST.replace("while true", spoil, 1), tmp_path)
    with driving(lab, tmp_path, **BY_UEFI) as cloud:
        machine = cloud.create(spec_for(cloud, lab, image, owner(deployment, 1, "op1"), disk=False))

        async def refused():
            async with admitting(machine, image[1]) as (agent, order):
                with pytest.raises(BadError, match="esp: the guest wrote over its disk at 0"):
                    await agent.admit(order)
                assert agent.status()["guests"] == []

        try:
            greetings(lab, machine, word=WROTE)
            asyncio.run(refused())
            assert Path(lab["instances"], machine.id, "disk").exists()
        finally:
            cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")
