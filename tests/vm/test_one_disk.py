"""An image on a machine with one disk: state behind the root; and a root in the initramfs, on another's disk."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cloudfit_orchestrator.clouds.state_disk import packed_single_disk
from cloudfit_orchestrator.launcher.sil import verify_image
from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.model.one_disk import carried
from tests.vm.test_images import BOOT_TIMEOUT_S, TRUSTED, command_line, images, read  # noqa: F401  a fixture

pytestmark = [pytest.mark.vm, pytest.mark.timeout(500)]

DONE = "probe: boots"  # all that is asked of the probe; it goes on to look for a network, of which there is none


def boot(image: Path, disk: Path, initramfs: Path, console: Path) -> str:
    """Until the probe has said how often it saw this state, or the machine ends; the console."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-cpu", "max", "-m", "256", "-nodefaults",
        "-display", "none", "-no-reboot", "-serial", f"file:{console}",
        "-kernel", image / "vmlinuz", "-initrd", initramfs, "-append", command_line(image),
        "-drive", f"file={disk},format=qcow2,if=virtio",
    ]  # fmt: skip
    console.touch()
    with subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL) as machine:
        try:
            deadline = time.monotonic() + BOOT_TIMEOUT_S
            while time.monotonic() < deadline and machine.poll() is None and DONE not in read(console):
                time.sleep(0.05)  # a file offers nothing to wait on
        finally:
            machine.kill()
    return read(console)


def test_a_state_behind_the_root_is_read_by_a_machine_that_brings_its_own_root(images, tmp_path):  # noqa: F811
    disk, own = tmp_path / "disk", images.probe / "initramfs"
    with packed_single_disk(images.probe / "root.img", 32) as packed:
        shutil.copyfile(packed, disk)
    run("qemu-img", "resize", disk, "1G")  # as Nova does to the flavor's size
    text = boot(images.probe, disk, own, tmp_path / "first")
    assert "probe: state mounted\nprobe: boots 1\n" in text, text

    run("qemu-io", "-f", "qcow2", "-c", "write -P 0xaa 0 4M", disk)  # the root is gone
    text = boot(images.probe, disk, own, tmp_path / "spoilt")
    assert "probe" not in text, text

    layout, carrier = carried(verify_image(images.probe, TRUSTED)), tmp_path / "carrier"
    root = (images.probe / "root.img").read_bytes()
    carrier.write_bytes(layout.head + root + layout.tail + own.read_bytes())
    text = boot(images.probe, disk, carrier, tmp_path / "second")
    assert "probe: state mounted\nprobe: boots 2\n" in text, text
