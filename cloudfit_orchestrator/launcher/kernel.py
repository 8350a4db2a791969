"""Kernel and initramfs: Debian's kernel as it is, and an archive of exactly what is needed to reach the root."""

import gzip
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cloudfit_orchestrator.launcher.recipe import RECIPES, InitramfsRecipe, KernelRecipe
from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.launcher.verity import TIMESTAMP
from cloudfit_orchestrator.model.errors import PermanentError

INIT_SCRIPT = RECIPES / "initramfs-init.sh"
_APPLETS = ("cat", "dd", "insmod", "losetup", "mount", "poweroff", "printf", "sh", "switch_root", "umount")
_LIBRARY_DIRECTORIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")


@dataclass
class Archive:
    """A cpio archive in the kernel's `newc` format. The same entries give the same bytes: owner 0, fixed time."""

    _entries: dict[str, tuple[int, bytes, tuple[int, int]]] = field(default_factory=dict)

    def directory(self, name: str) -> None:
        """A directory, with those above it."""
        if "/" in name:
            self.directory(name.rpartition("/")[0])
        self._entries.setdefault(name, (stat.S_IFDIR | 0o755, b"", (0, 0)))

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self._add(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def _add(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if "/" in name:
            self.directory(name.rpartition("/")[0])
        self._entries[name] = (mode, content, device)

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes."""
        inode = 0
        for inode, name in enumerate(sorted(self._entries), start=1):
            yield from _record(name, inode, *self._entries[name])
        yield from _record("TRAILER!!!", 0, 0, b"", (0, 0))


def _record(name: str, inode: int, mode: int, content: bytes, device: tuple[int, int]) -> Iterator[bytes]:
    raw = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    time = TIMESTAMP if mode else 0
    fields = (inode, mode, 0, 0, links, time, len(content), 0, 0, *device, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + raw
    yield head + bytes(-len(head) % 4)
    yield content + bytes(-len(content) % 4)


def kernel_version(tree: Path) -> str:
    """The version of the one kernel in the extracted package at `tree`."""
    versions = [p.name.removeprefix("vmlinuz-") for p in (tree / "boot").glob("vmlinuz-*")]
    if len(versions) != 1:
        raise PermanentError(f"the kernel package holds {len(versions)} kernels, expected one")
    return versions[0]


def load_order(tree: Path, version: str, modules: Iterable[str]) -> list[Path]:
    """The files of `modules` and all that they need, each after its dependencies; what is built in is left out."""
    run("depmod", "-b", tree, version)
    order: dict[Path, None] = {}
    for module in modules:
        text = run("modprobe", "-C", "/dev/null", "-d", tree, "-S", version, "--show-depends", module)
        for line in text.splitlines():
            action, _, path = line.strip().partition(" ")
            if action == "insmod":
                order[Path(path.split()[0])] = None
            elif action != "builtin":
                raise PermanentError(f"modprobe --show-depends {module} printed {line!r}")
    return list(order)


def make_initramfs(kernel_tree: Path, tools_tree: Path, kernel: KernelRecipe, recipe: InitramfsRecipe) -> Archive:
    """The initramfs from extracted packages. Raises PermanentError naming what a package does not hold."""
    archive = Archive()
    for name in ("dev", "proc", "sys", "root", "run"):
        archive.directory(name)
    archive.device("dev/console", 5, 1)  # the kernel opens it before the init script mounts /dev
    archive.file("init", INIT_SCRIPT.read_bytes(), executable=True)
    for program in recipe.programs:
        archive.file(program, find(tools_tree, program), executable=True)
    for applet in _APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    for library in recipe.libraries:
        name = library if "/" in library else f"lib/x86_64-linux-gnu/{library}"
        archive.file(name, find(tools_tree, library), executable=True)
    names = []
    for module in load_order(kernel_tree, kernel_version(kernel_tree), kernel.modules):
        names.append(module.name)
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{n}\n" for n in names).encode())
    return archive


def write_compressed(archive: Archive, path: Path) -> None:
    """Write `archive` with gzip, without name and time."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for chunk in archive.chunks():
            file.write(chunk)


def copy_kernel(tree: Path, path: Path) -> None:
    """Copy the kernel out of the extracted package at `tree`."""
    shutil.copyfile(tree / "boot" / f"vmlinuz-{kernel_version(tree)}", path)


def find(tree: Path, name: str) -> bytes:
    """The content of `name` below `tree`; absolute links in packages point into the tree, not at the host.

    Raises PermanentError if there is none.
    """
    candidates = [tree / name] if "/" in name else [tree / d / name for d in _LIBRARY_DIRECTORIES]
    for path in candidates:
        target = path
        while target.is_symlink():
            link = target.readlink()
            target = tree / link.relative_to("/") if link.is_absolute() else target.parent / link
        if target.is_file():
            return target.read_bytes()
    raise PermanentError(f"no package of the recipe holds {name}", next_command="correct [initramfs] or [uefi] in it")
