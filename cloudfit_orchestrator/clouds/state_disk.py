"""Fresh state disks: an empty ext4, the same wherever it is made."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudfit_orchestrator.model.errors import PermanentError
from cloudfit_orchestrator.model.one_disk import STATE_OFFSET_MIB, single_disk_mib

TOOL_TIMEOUT_S = 120.0  # mkfs.ext4 of a sparse terabyte takes seconds
MIB = 1 << 20
# Fixed, so that a disk is the same wherever it is made: no lazily made tables (the guest would write them later), a
# small journal (state is small and fsynced), no reserve for root, checksums on metadata.
MKFS = (
    "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-J", "size=4", "-L", "cloudfit-state",
    "-O", "metadata_csum,^resize_inode", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
)  # fmt: skip


@contextmanager
def reporting(tried: str) -> Iterator[None]:
    """Run file calls; an OSError leaves as PermanentError, with `tried` as what was tried."""
    try:
        yield
    except OSError as error:
        raise PermanentError(f"{tried}: {error.strerror or error}", next_command="df -h; ls -ld the path") from error


def run_tool(command: list[str], tried: str) -> None:
    """Run one of Debian's tools. PermanentError if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=TOOL_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise PermanentError(
            f"{tried}: {command[0]} is not installed", next_command="apt-get install e2fsprogs qemu-utils"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PermanentError(f"{tried}: {command[0]} took over {TOOL_TIMEOUT_S:.0f} s", next_command="df -h") from error
    if done.returncode != 0:
        raise PermanentError(
            f"{tried}: {command[0]} exited with {done.returncode}: {done.stderr.strip()[-300:]}", next_command="df -h"
        )


@contextmanager
def packed_state_disk(size_mib: int) -> Iterator[Path]:
    """A temporary qcow2 file with an empty ext4 of that size: a few hundred KB."""
    directory = Path(tempfile.mkdtemp(prefix="cloudfit-"))
    try:
        raw, packed = directory / "raw", directory / "qcow2"
        with reporting(f"make a state disk in {directory}"):
            raw.touch()
            os.truncate(raw, size_mib * MIB)
            run_tool([*MKFS, str(raw)], f"make a state disk of {size_mib} MiB")
            run_tool(["qemu-img", "convert", "-O", "qcow2", str(raw), str(packed)], "pack the state disk")
            yield packed
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def packed_single_disk(root: Path, size_mib: int) -> Iterator[Path]:
    """A temporary qcow2 file with the content of `root` and, from STATE_OFFSET_MIB on, an empty ext4 of that size."""
    directory = Path(tempfile.mkdtemp(prefix="cloudfit-"))
    try:
        raw, packed = directory / "raw", directory / "qcow2"
        with reporting(f"make a disk of root and state in {directory}"):
            shutil.copyfile(root, raw)
            os.truncate(raw, single_disk_mib(size_mib) * MIB)
            where = ["-E", f"offset={STATE_OFFSET_MIB * MIB}", str(raw), f"{size_mib * 1024}k"]
            run_tool([*MKFS, *where], f"make a state of {size_mib} MiB behind the root")
            run_tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(packed)], "pack the disk")
            yield packed
    finally:
        shutil.rmtree(directory, ignore_errors=True)
