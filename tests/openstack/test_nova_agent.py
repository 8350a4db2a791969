"""The wormhole agent on a real Nova compute host (make openstack-lab): its channel in a server that Nova made."""

import asyncio
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.channel import PORT_NAME, hello
from cloudfit_orchestrator.model.image import Role, seal_manifest
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.openstack.machines import driving, listing, owner, spec_for
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

BOOT_TIMEOUT_S = 300.0  # a hard reboot and a boot without KVM on a busy host
HELLO = "".join(f"\\{byte:03o}" for byte in hello(7))
# Greets once a second on the wormhole's port, whenever it comes and whoever is at its other end.
GUEST = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules.order); do insmod /modules/$m; done
while true; do
  for p in /sys/class/virtio-ports/*; do
    [ "$(cat $p/name 2>/dev/null)" = "{PORT_NAME}" ] && printf '{HELLO}' >/dev/${{p##*/}}
  done
  sleep 1
done
"""


async def until(what):
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while not (found := what()):  # noqa: ASYNC110  the agent's figures; there is nothing to await
            await asyncio.sleep(0.2)
    return found


def test_a_server_is_admitted_and_after_a_hard_reboot_attached_again(lab, tmp_path, deployment):
    directory = tiny_image(GUEST)
    manifest = tiny_manifest(directory)
    verity = replace(manifest.part("root"), name="verity")  # the tiny guest has none, and reads no disk
    image = directory, replace(manifest, parts=(*manifest.parts, verity))
    with driving(lab, tmp_path) as cloud, listing(lab, lab["name"]) as c:
        machine = cloud.create(spec_for(cloud, lab, image, owner(deployment, 1, "op1"), disk=False))
        try:
            asyncio.run(_serve(c, machine, image[1]))
        finally:
            cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")


async def _serve(c, machine, manifest):
    key = Ed25519PrivateKey.generate()
    agent = HostAgent("lab", Ed25519PrivateKey.generate(), controller_keys=[], image_keys=[public_bytes(key)])
    reference = MachineRef("libvirt", uri=machine.reference["uri"], uuid=machine.id)
    who = Identity("ledger", "r0", 1)
    order = Admission(who, Role.REPLICA, reference, seal_manifest(manifest, key), False, 1000.0, {"port": 7000})  # noqa: FBT003

    def status():
        return agent.status()["guests"][0]

    try:
        launch = await agent.admit(order)
        assert await agent.admit(order) == launch
        await until(lambda: status()["greeted"])
        assert status()["machine"] == machine.id
        await asyncio.to_thread(c.compute.reboot_server, machine.id, "HARD")
        await until(lambda: not status()["connected"])
        await until(lambda: status()["greeted"])
        assert status()["lost"] == ""
    finally:
        await agent.stop()
