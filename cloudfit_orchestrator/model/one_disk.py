"""Machines with a single disk, where a cloud attaches no second one: where the state lies, and how a root gets there.

A replica's disk holds root and hash tree, and from STATE_OFFSET_MIB on its state. A recovery machine starts on a copy
of another machine's whole disk, so its own root comes in its initramfs: an archive with the one file `root.img` stands
before the image's own, which the kernel unpacks both. The same signed image serves both ways: every byte of the
archive follows from the manifest.
"""

from dataclasses import dataclass

from cloudfit_orchestrator.model.errors import PermanentError
from cloudfit_orchestrator.model.image import Manifest

STATE_OFFSET_MIB = 256  # of the state: roots have some 30 MB, and a place that all images share needs no search
STATE_ARGUMENT = f"cloudfit.state={STATE_OFFSET_MIB}"  # the word of the command line by which an initramfs knows it
_ALIGN = 512  # the kernel skips zeros between archives
_FILE, _END = b"root.img\0", b"TRAILER!!!\0"
_READ_ONLY_FILE = 0o100400


@dataclass(frozen=True, slots=True)
class Carried:
    """An initramfs that carries the root: `head`, the file of root and hash tree, `tail`, the image's own initramfs."""

    head: bytes
    tail: bytes
    root_size: int
    initramfs_size: int

    @property
    def root_offset(self) -> int:
        """Of the root's file."""
        return len(self.head)

    @property
    def initramfs_offset(self) -> int:
        """Of the image's own initramfs."""
        return len(self.head) + self.root_size + len(self.tail)

    @property
    def size(self) -> int:
        """Of the whole."""
        return self.initramfs_offset + self.initramfs_size


def root_size(manifest: Manifest) -> int:
    """Bytes of root and hash tree."""
    return max(p.offset + p.size for p in manifest.parts if p.file == manifest.part("root").file)


def single_disk_mib(state_mib: int) -> int:
    """Of a disk that holds root and state."""
    return STATE_OFFSET_MIB + state_mib


def carried(manifest: Manifest) -> Carried:
    """How an initramfs looks that carries the root of this image. Raises BadError if it lacks a part."""
    size = root_size(manifest)
    head = _record(_FILE, _READ_ONLY_FILE, size)
    end = bytes(-size % 4) + _record(_END, 0, 0)
    tail = end + bytes(-(len(head) + size + len(end)) % _ALIGN)
    return Carried(head, tail, size, manifest.part("initramfs").size)


def check_image(manifest: Manifest) -> None:
    """Raises PermanentError if the image cannot run on a single disk, as a replica or as a recovery machine."""
    if STATE_ARGUMENT not in manifest.command_line.split():
        raise PermanentError(
            f"image {manifest.name} knows no state behind its root ({STATE_ARGUMENT} is not in its command line), and "
            "this cloud gives no second disk",
            next_command=f"cloudfit image build {manifest.name}",
        )
    if root_size(manifest) > STATE_OFFSET_MIB << 20:
        raise PermanentError(
            f"image {manifest.name} has a root of {root_size(manifest) >> 20} MiB, the state begins at "
            f"{STATE_OFFSET_MIB} MiB",
            next_command="build a smaller image, or use a cloud with Cinder",
        )


def _record(name: bytes, mode: int, size: int) -> bytes:
    """A header of cpio's `newc`: all of it is fixed but name, mode and size."""
    fields = (1 if mode else 0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name
    return head + bytes(-len(head) % 4)
