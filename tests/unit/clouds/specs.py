"""Machine specifications for driver tests."""

from pathlib import Path

from cloudfit_orchestrator.clouds.base import MachineSpec, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.model.image import Manifest, Part, Role

DISK = StateDisk(16)
NETWORK = NetworkSpec("lisbon", "10.77.1.10", 24, "10.77.1.1")


def owner(deployment="dep", replica="r1", incarnation=1, operation="op-1"):
    return Ownership(deployment, "ledger", replica, incarnation, Role.REPLICA, operation)


def manifest(directory: Path) -> Manifest:
    files = {"kernel": "vmlinuz", "initramfs": "initramfs", "root": "root.img"}
    for file in files.values():
        (directory / file).write_bytes(file.encode())
    parts = tuple(Part(name, file, 0, len(file), "00" * 32) for name, file in files.items())
    return Manifest(
        name="test",
        role=Role.REPLICA,
        adversary=False,
        command_line="console=ttyS0 a=<&'\"> b",
        verity_root="ff",
        parts=parts,
        packages=(),
        lineage="debian",
    )


def spec(directory: Path, who=None, *, network=NETWORK, disk=DISK, **changes) -> MachineSpec:
    return MachineSpec(
        owner=who or owner(),
        image_dir=directory,
        manifest=manifest(directory),
        memory_mib=changes.pop("memory_mib", 128),
        cpus=1,
        network=network,
        state_disk=disk,
        **changes,
    )
