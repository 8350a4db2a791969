"""The image store: `sha256-<hex>/` an image, `names/<name>` a link to the newest of that name, a cache by content.

What is not finished lies in `.tmp-*` in the same file system and becomes visible by one rename; the next build
removes what a killed one left.
"""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.launcher.measure import file_digest
from cloudfit_orchestrator.model.errors import BadInputError

MANIFEST_FILE = "manifest.json"
KERNEL_FILE = "vmlinuz"
INITRAMFS_FILE = "initramfs"
ROOT_FILE = "root.img"
BOOT_FILE = "boot.img"  # of an image that UEFI boots too: what stands on the disk before and behind the root
FILES = (MANIFEST_FILE, KERNEL_FILE, INITRAMFS_FILE, ROOT_FILE)  # of every image
STAGING = ".tmp-"
MAX_BLOBS = 256  # packages kept: some generations of the ~25 of a lineage
MAX_TREES = 6  # prepared bases and kernels kept: two lineages, with a predecessor


@dataclass(frozen=True, slots=True)
class Store:
    """A store at `path`, which need not exist yet."""

    path: Path

    @property
    def blobs(self) -> Path:
        """Fetched packages, by SHA-256."""
        return self.path / ".cache" / "blobs"

    @property
    def trees(self) -> Path:
        """Prepared trees, as `<key>-<sha256>.tar`."""
        return self.path / ".cache" / "trees"

    @contextlib.contextmanager
    def build(self, progress: Callable[[str], None]) -> Iterator[Path]:
        """Hold the store's lock and yield an empty staging directory, which is gone afterwards whatever happens."""
        for directory in (self.path, self.path / "names", self.blobs, self.trees):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another build in {self.path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in [*self.path.glob(STAGING + "*"), *self.trees.glob(STAGING + "*")]:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.path))
            try:
                yield staging
                _drop_oldest(self.blobs, MAX_BLOBS)
                _drop_oldest(self.trees, MAX_TREES)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def commit(self, staged: Path, name: str, digest: str) -> Path:
        """Make the finished image in `staged` visible as `digest` and under `name`. Returns its directory.

        An intact copy that is there already stays; a damaged one is replaced.
        """
        final = self.path / digest.replace(":", "-")
        staged.chmod(0o755)
        for file in sorted(staged.iterdir()):
            file.chmod(0o644)
            _sync(file)
        _sync(staged)
        if not _same(final, staged):
            if final.exists():  # damaged: what runs from it keeps its open files
                final.rename(staged.parent / "replaced")
            staged.rename(final)
        link = staged.parent / "link"
        link.symlink_to(Path("..", final.name))
        link.replace(self.path / "names" / name)
        _sync(self.path)
        return final

    def find(self, reference: str) -> Path:
        """The directory of `sha256:HEX`, `NAME@sha256:HEX` or `NAME` (the newest built). Raises BadInputError."""
        name, _, digest = reference.rpartition("@") if "@" in reference else (reference, "", "")
        if reference.startswith("sha256:"):
            digest = reference
        path = self.path / digest.replace(":", "-") if digest else self.path / "names" / name
        if "/" in reference or name in ("", ".", "..") or not path.is_dir():
            raise BadInputError(
                f"no image {reference!r} in {self.path}", next_command="cloudfit image list, or cloudfit image build"
            )
        return path.resolve()

    def directories(self) -> list[Path]:
        """All images, by digest."""
        return sorted(p for p in self.path.glob("sha256-*") if p.is_dir())

    def names(self) -> dict[str, str]:
        """Name -> the directory name it stands for."""
        return {p.name: p.readlink().name for p in sorted((self.path / "names").glob("*")) if p.is_symlink()}

    def restore(self, key: str, into: Path) -> bool:
        """Unpack the prepared tree `key` into the new directory `into`; False if there is none that is intact."""
        for archive in self.trees.glob(f"{key}-*.tar"):
            if file_digest(archive) == archive.stem.rpartition("-")[2]:
                with tarfile.open(archive) as tar:
                    tar.extraction_filter = staticmethod(lambda member, _: member)
                    tar.extractall(into)  # noqa: S202 - we made it, and its digest is in its name
                os.utime(archive)
                return True
            archive.unlink()
        return False

    def keep(self, key: str, tree: Path) -> None:
        """Keep the prepared `tree` for later builds."""
        with tempfile.NamedTemporaryFile(prefix=STAGING, dir=self.trees, delete=False) as file:
            try:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    tar.add(tree, arcname=".")
                file.flush()
                Path(file.name).replace(self.trees / f"{key}-{file_digest(Path(file.name))}.tar")
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def content_key(prefix: str, *parts: object) -> str:
    """A cache key from everything that determines the content."""
    text = json.dumps([str(p) for p in parts], separators=(",", ":"))
    return f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _same(one: Path, other: Path) -> bool:
    """True if both directories hold the same files: an image in use is not replaced without need."""
    if not one.is_dir() or {p.name for p in one.iterdir()} != {p.name for p in other.iterdir()}:
        return False
    return all(filecmp.cmp(one / p.name, p, shallow=False) for p in other.iterdir())


def _drop_oldest(directory: Path, limit: int) -> None:
    files = sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in files[limit:]:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
