"""A machine without Cinder on real clouds: state behind the root, a server image of it while it runs, and a machine
that reads the image with a root of its own in its initramfs. Cinder is there and is hidden from the driver.
"""

import hashlib
from dataclasses import replace

import pytest
import yaml

from cloudfit_orchestrator.clouds.base import MachineState
from cloudfit_orchestrator.model.errors import BadError, RefusedError
from cloudfit_orchestrator.model.image import Part, Role
from cloudfit_orchestrator.model.one_disk import STATE_ARGUMENT, STATE_OFFSET_MIB
from cloudfit_orchestrator.wormhole.nova import measure_attached
from tests.openstack.machines import driving, greetings, owner, spec_for
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

GREETING = "DRIVER-GUEST"
# Leaves one more mark in the state at each start, and says where its root came from.
GUEST = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/ttyS0
for m in $(cat /modules.order); do insmod /modules/$m; done
at() {{ dd if=/dev/vda bs=1 skip=$(({STATE_OFFSET_MIB} * 1048576 + $1)) count=$2 2>/dev/null; }}
old=$(at 104857600 64 | tr -dc x)
printf "x$old" | dd of=/dev/vda bs=1048576 seek=$(({STATE_OFFSET_MIB} + 100)) conv=notrunc,fsync 2>/dev/null
echo "{GREETING} starts=${{#old}} label=$(at 1144 14) root=$([ -f /root.img ] && wc -c < /root.img || echo disk)"
while true; do sleep 1000; done
"""


@pytest.fixture(scope="session")
def images():
    """(directory, manifest) of a replica and of a recovery image, which differ in their command lines only."""
    directory = tiny_image(GUEST)
    made = tiny_manifest(directory)
    data = (directory / "root.img").read_bytes()
    middle = len(data) // 2
    root, verity = (
        Part(name, "root.img", begin, len(some), hashlib.sha256(some).hexdigest())
        for name, begin, some in (("root", 0, data[:middle]), ("verity", middle, data[middle:]))
    )
    parts = (*(p for p in made.parts if p.name != "root"), root, verity)
    replica = replace(made, parts=parts, command_line=f"{made.command_line} {STATE_ARGUMENT}")
    recovery = replace(replica, name="tiny-recovery", role=Role.RECOVERY, command_line=f"{replica.command_line} reader")
    return (directory, replica), (directory, recovery)


def test_a_machine_and_its_recovery(lab, tmp_path, images, deployment):
    image, recovery = images
    hidden = yaml.safe_load(lab["clouds_yaml"].read_text())
    hidden["clouds"][lab["name"]]["has_block_storage"] = False
    (tmp_path / "clouds.yaml").write_text(yaml.safe_dump(hidden))
    uri = lab["libvirt_uri"]
    with driving(lab, tmp_path, tmp_path / "clouds.yaml", volume_type="") as cloud:
        spec = spec_for(cloud, lab, image, owner(deployment, 1, "op1"))
        old = cloud.create(spec)
        assert greetings(lab, old) == ["starts=0 label=cloudfit-state root=disk"]
        before = measure_attached(uri, old.id, image[1])
        assert not cloud.must_pause(old)
        taken = cloud.snapshot(old, "rec1")
        assert cloud.snapshot(old, "rec1") == taken
        assert cloud.find(old.owner).state is MachineState.RUNNING
        after = measure_attached(uri, old.id, image[1])
        assert (after.channel, after.domain) == (before.channel, before.domain), "it went on as it was"

        who = owner(deployment, 2, "rec1", "r9")
        reader = cloud.create(
            spec_for(cloud, lab, recovery, replace(who, role=Role.RECOVERY), disk=False, attach=taken)
        )
        size = (image[0] / "root.img").stat().st_size
        assert greetings(lab, reader) == [f"starts=1 label=cloudfit-state root={size}"]
        assert measure_attached(uri, reader.id, recovery[1]).nova
        with pytest.raises(BadError, match="command line"):
            measure_attached(uri, reader.id, image[1])
        with pytest.raises(RefusedError, match="stands on the snapshot"):
            cloud.delete_snapshot(taken)
        cloud.destroy(reader)
        again = cloud.create(
            spec_for(
                cloud,
                lab,
                recovery,
                replace(owner(deployment, 3, "rec1"), role=Role.RECOVERY),
                disk=False,
                attach=taken,
            )
        )
        assert greetings(lab, again)[0].startswith("starts=1 "), "what the first reader wrote went with it"
        cloud.destroy(again)
        assert cloud.start(cloud.stop(old)).state is MachineState.RUNNING
        assert greetings(lab, old, 1)[-1].startswith("starts=1 "), "its state outlives a stop"
        cloud.destroy(old)
        assert cloud.snapshots(deployment) == [taken], "the evidence outlives its machine"
        cloud.sweep(deployment, cloud.orphans(deployment, [], networks=["replicas"]))
        assert cloud.snapshots(deployment) == []
        cloud.delete_network(deployment, "replicas")
