"""The wormhole agent on a real Nova compute host (make openstack-lab): its channel in a server that Nova made."""

import asyncio
import contextlib
from dataclasses import replace

import libvirt
import openstack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.channel import PORT_NAME, hello
from cloudfit_orchestrator.model.image import Role, seal_manifest
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.openstack.lab.hosts import compute, spare_host
from tests.openstack.lab.layout import DEFAULT_CLOUDS, Lab
from tests.openstack.lab.processes import find, start, stop
from tests.openstack.lab.settings import compute_name
from tests.openstack.machines import HOME, driving, listing, owner, spec_for
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

BOOT_TIMEOUT_S = 300.0  # a hard reboot and a boot without KVM on a busy host
GONE_S = 20.0  # without a domain; a hard reboot has none for some seconds
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


@pytest.fixture
def image():
    directory = tiny_image(GUEST)
    manifest = tiny_manifest(directory)
    verity = replace(manifest.part("root"), name="verity")  # the tiny guest has none, and reads no disk
    return directory, replace(manifest, parts=(*manifest.parts, verity))


@contextlib.contextmanager
def server(lab, tmp_path, deployment, image, *, network=True):
    """A server of Nova's and a connection of who owns it."""
    with driving(lab, tmp_path) as cloud, listing(lab, lab["name"]) as c:
        spec = spec_for(cloud, lab, image, owner(deployment, 1, "op1"), disk=False)
        machine = cloud.create(spec if network else replace(spec, network=None))
        try:
            yield c, machine
        finally:
            cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")


@contextlib.asynccontextmanager
async def admitted(machine, manifest):
    """What the agent says of its guest, which has greeted it."""
    key = Ed25519PrivateKey.generate()
    agent = HostAgent(
        "lab", Ed25519PrivateKey.generate(), controller_keys=[], image_keys=[public_bytes(key)], gone_s=GONE_S
    )
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
        yield status
    finally:
        await agent.stop()


def test_a_server_is_admitted_and_after_a_hard_reboot_attached_again(lab, tmp_path, deployment, image):
    async def serve(c, machine):
        async with admitted(machine, image[1]) as status:
            await asyncio.to_thread(c.compute.reboot_server, machine.id, "HARD")
            await until(lambda: not status()["connected"])
            await until(lambda: status()["greeted"])
            assert status()["lost"] == ""

    with server(lab, tmp_path, deployment, image) as (c, machine):
        asyncio.run(serve(c, machine))


def test_a_server_that_is_resized_where_it_is_is_attached_again(lab, tmp_path, deployment, image):
    async def serve(c, machine):
        async with admitted(machine, image[1]) as status:
            larger = lab["flavors"]["cloudfit.small"]["id"]
            await asyncio.to_thread(c.compute.resize_server, machine.id, larger)
            await until(lambda: not status()["connected"])
            await until(lambda: status()["greeted"])
            await shows(c, machine, status="VERIFY_RESIZE")
            await asyncio.to_thread(c.compute.confirm_server_resize, machine.id)
            await shows(c, machine, status="ACTIVE")
            assert status()["connected"]
            assert status()["lost"] == ""

    with server(lab, tmp_path, deployment, image) as (c, machine):
        asyncio.run(serve(c, machine))


@pytest.mark.parametrize("lab", DEFAULT_CLOUDS[:1], indirect=True)
def test_a_server_that_leaves_its_host_is_lost_to_its_agent(lab, tmp_path, deployment, image):
    """By live migration at once; by cold migration once that is confirmed, which is when Nova clears away on the host;
    by evacuation once the host is back, and Nova clears away there what it has elsewhere.
    """
    where = Lab(HOME)
    cloud = where.cloud(lab["name"])
    nova = f"{cloud.name}-{compute_name(cloud.host)}"

    async def migrate(admin, machine, host):
        async with admitted(machine, image[1]) as status:
            await asyncio.to_thread(admin.compute.live_migrate_server, machine.id, host.name, block_migration="auto")
            await shows(admin, machine, status="ACTIVE", compute_host=host.name)
            await until(lambda: status()["lost"])
            assert status()["lost"] == "it was migrated to another host"
            assert not status()["connected"]

    async def move_stopped(admin, machine, host):
        async with admitted(machine, image[1]) as status:
            await asyncio.to_thread(admin.compute.migrate_server, machine.id, host=host.name)
            await shows(admin, machine, status="VERIFY_RESIZE", compute_host=host.name)
            assert status()["lost"] == ""  # its domain is here, too, and starts if the move is reverted
            assert not status()["connected"]
            await asyncio.to_thread(admin.compute.confirm_server_resize, machine.id)
            await until(lambda: status()["lost"])
            assert status()["lost"] == no_domain(machine)
            await shows(admin, machine, status="ACTIVE", compute_host=host.name)

    async def evacuate(admin, machine, host):
        (service,) = admin.compute.services(host=cloud.host.name, binary="nova-compute")
        async with admitted(machine, image[1]) as status:
            await asyncio.to_thread(stop, where, [find(where, nova)])
            cut_power(machine)
            try:
                admin.compute.update_service_forced_down(service, forced=True)
                await asyncio.to_thread(admin.compute.evacuate_server, machine.id)
                await shows(admin, machine, status="ACTIVE", compute_host=host.name)
                assert status()["lost"] == ""  # its domain is here, too, and might be started
                assert not status()["connected"]
            finally:
                await asyncio.to_thread(start, where, compute(where, cloud.host))
                await until(lambda: not refused(admin.compute.update_service_forced_down, service, forced=False))
            await until(lambda: status()["lost"])
            assert status()["lost"] == no_domain(machine)

    with spare_host(where, cloud) as host, listing(lab, lab["accounts"]["admin"]) as admin:
        (spare,) = admin.compute.services(host=host.name, binary="nova-compute")
        for move in (migrate, move_stopped, evacuate):
            admin.compute.disable_service(spare)  # so that the server begins on the usual host
            with server(lab, tmp_path, deployment, image, network=False) as (_, machine):
                admin.compute.enable_service(spare)
                asyncio.run(move(admin, machine, host))


def no_domain(machine):
    return f"there has been no domain {machine.id} for {GONE_S:g} s"


def refused(call, *arguments, **how):
    """A host counts as down until it has cleared away what was evacuated from it."""
    try:
        call(*arguments, **how)
    except openstack.exceptions.BadRequestException:
        return True
    return False


def cut_power(machine):
    connection = libvirt.open(machine.reference["uri"])
    connection.lookupByUUIDString(machine.id).destroy()
    connection.close()


async def shows(c, machine, **wanted):
    def so():
        found = c.compute.get_server(machine.id)
        return all(getattr(found, name) == value for name, value in wanted.items())

    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while not await asyncio.to_thread(so):  # noqa: ASYNC110  Nova tells nobody
            await asyncio.sleep(1.0)
