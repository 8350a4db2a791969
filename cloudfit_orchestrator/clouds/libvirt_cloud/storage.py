"""Where a host keeps the files of our machines: one flat directory a deployment, seen directly or through libvirt.

Names begin with the machine's key (`Ownership.key`): `KEY.owner.json` is written before any other file of the machine,
so whatever a death leaves behind can be told to be ours. Files come into being whole, by a rename or (remote) by an
upload that is deleted if it fails.

On this host the directory is used directly. On another it is a libvirt storage pool of type `dir`, and bytes travel
through libvirt streams: nothing but libvirt's own transport is needed there.
"""

import os
import stat
import tempfile
import uuid
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import libvirt

from cloudfit_orchestrator.clouds.libvirt_cloud.connection import NOT_FOUND, Connection, trying
from cloudfit_orchestrator.clouds.state_disk import MIB, MKFS, packed_state_disk, reporting, run_tool
from cloudfit_orchestrator.model.errors import PermanentError

MAX_SIDECAR_BYTES = 64 << 10
STREAM_CHUNK = 256 << 10  # libvirt's own limit of one stream packet
_IMAGE = "image-"  # names of image files that were brought to a host, by content


class Storage(ABC):
    """A deployment's directory on a host. Names are plain file names; removal of what is gone is no error."""

    root: Path  # on the host
    disk_format: str  # of fresh state disks

    def path(self, name: str) -> Path:
        """Where the file is, or would be, on the host."""
        return self.root / name

    @abstractmethod
    def names(self, prefix: str = "") -> set[str]:
        """Files that there are."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file's content; None if there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Make or replace a small file."""

    @abstractmethod
    def place(self, source: Path, sha256: str) -> Path:
        """A path on the host of the image file `source`: itself, or a copy named after its digest."""

    @abstractmethod
    def make_disk(self, name: str, size_mib: int) -> None:
        """A fresh ext4 disk in `disk_format`; nothing is done if the name exists."""

    @abstractmethod
    def make_overlay(self, name: str, backing: str, backing_format: str, size_bytes: int) -> None:
        """A fresh qcow2 file over `backing`, replacing one of the same name."""

    @abstractmethod
    def capacity(self, name: str) -> int:
        """A disk's size as its machine sees it, bytes."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the file."""

    @abstractmethod
    def release(self) -> None:
        """Nothing runs from here any more: take away what was brought to the host, if nothing else is here."""


class LocalStorage(Storage):
    """The directory itself. `user`: uid and gid that QEMU runs as, or None for our own."""

    disk_format = "raw"

    def __init__(self, root: Path, user: tuple[int, int] | None) -> None:
        self.root = root
        self._user = user

    def _ensure(self) -> None:
        with reporting(f"make the directory {self.root}"):
            if not self.root.is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                self.root.chmod(0o711)  # QEMU opens by name, others list nothing
        if self._user is not None:
            self._check_reach(self.root, self._user[0])

    @staticmethod
    def _check_reach(path: Path, uid: int) -> None:
        """PermanentError naming the first directory that the hypervisor's user cannot pass."""
        for directory in [*reversed(path.resolve().parents), path.resolve()]:
            if not directory.is_dir():
                continue
            found = directory.stat()
            if not found.st_mode & (stat.S_IXUSR if found.st_uid == uid else stat.S_IXOTH):
                raise PermanentError(
                    f"the hypervisor's user (uid {uid}) cannot enter {directory} and so cannot read {path}",
                    next_command=f"chmod o+x {directory}, or choose another CLOUDFIT_HOME",
                )

    def names(self, prefix: str = "") -> set[str]:
        with reporting(f"list {self.root}"):
            return {p.name for p in self.root.iterdir() if p.name.startswith(prefix)} if self.root.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        try:
            with reporting(f"read {self.path(name)}"), self.path(name).open("rb") as file:
                return file.read(MAX_SIDECAR_BYTES)
        except PermanentError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    @contextmanager
    def _whole(self, name: str, mode: int) -> Iterator[Path]:
        """A temporary path that becomes `name` when the block ends well."""
        self._ensure()
        temporary = self.root / f".{uuid.uuid4().hex}.new"
        try:
            with reporting(f"write {self.path(name)}"):
                temporary.touch(mode=0o600)
                yield temporary
                if self._user is not None:
                    os.chown(temporary, *self._user)
                temporary.chmod(mode)
                temporary.replace(self.path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        with self._whole(name, 0o600) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def place(self, source: Path, sha256: str) -> Path:
        del sha256  # the SIL has measured the file itself, and nobody moves it
        path = source.resolve()
        if not path.is_file():
            raise PermanentError(f"image file {path} does not exist", next_command="cloudfit image list")
        if self._user is not None:
            self._check_reach(path.parent, self._user[0])
            found = path.stat()
            if not found.st_mode & (stat.S_IRUSR if found.st_uid == self._user[0] else stat.S_IROTH):
                raise PermanentError(
                    f"the hypervisor's user (uid {self._user[0]}) cannot read {path}", next_command=f"chmod o+r {path}"
                )
        return path

    def make_disk(self, name: str, size_mib: int) -> None:
        if self.path(name).exists():
            return
        with self._whole(name, 0o600) as temporary:
            os.truncate(temporary, size_mib * MIB)
            run_tool([*MKFS, str(temporary)], f"make the state disk {self.path(name)}")

    def make_overlay(self, name: str, backing: str, backing_format: str, size_bytes: int) -> None:
        with self._whole(name, 0o600) as temporary:
            temporary.unlink()
            run_tool(
                ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(self.path(backing)), "-F", backing_format,
                 str(temporary), str(size_bytes)],
                f"make the overlay {self.path(name)}",
            )  # fmt: skip

    def capacity(self, name: str) -> int:
        with reporting(f"read {self.path(name)}"), self.path(name).open("rb") as file:
            head = file.read(32)
            # A raw disk of ours begins with ext4's zero boot block. The magic is read only from qcow2 files by name.
            if name.endswith(".qcow2"):
                return int.from_bytes(head[24:32], "big")
            return file.seek(0, os.SEEK_END)

    def remove(self, name: str) -> None:
        with reporting(f"remove {self.path(name)}"):
            self.path(name).unlink(missing_ok=True)

    def release(self) -> None:
        pass  # images are used where they are stored


class PoolStorage(Storage):
    """The directory as a storage pool of `connection`'s host. `user`: uid and gid that QEMU runs as there."""

    disk_format = "qcow2"  # an empty file system travels as a few hundred KB

    def __init__(self, connection: Connection, pool: str, root: Path, user: tuple[int, int] | None) -> None:
        self.root = root
        self._connection = connection
        self._name = pool
        self._user = user

    def _pool(self) -> Any:
        connection = self._connection.get()
        with trying(f"open the storage pool {self._name} ({self.root}) on {self._connection.uri}"):
            try:
                pool = connection.storagePoolLookupByName(self._name)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in NOT_FOUND:
                    raise
                pool = connection.storagePoolDefineXML(
                    f"<pool type='dir'><name>{self._name}</name><target><path>{self.root}</path>"
                    "<permissions><mode>0711</mode></permissions></target></pool>"
                )
                pool.build(0)
            if not pool.isActive():
                pool.create()
            return pool

    def _volume(self, name: str) -> Any | None:
        pool = self._pool()
        with trying(f"look up {self.path(name)} on {self._connection.uri}"):
            try:
                return pool.storageVolLookupByName(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in NOT_FOUND:
                    raise
            return None

    def _volume_xml(self, name: str, capacity: int, form: str, *, shared: bool = False) -> ET.Element:
        volume = ET.Element("volume")
        ET.SubElement(volume, "name").text = name
        ET.SubElement(volume, "capacity", unit="bytes").text = str(capacity)
        ET.SubElement(volume, "allocation", unit="bytes").text = "0"
        target = ET.SubElement(volume, "target")
        ET.SubElement(target, "format", type=form)
        permissions = ET.SubElement(target, "permissions")
        ET.SubElement(permissions, "mode").text = "0444" if shared else "0600"
        if self._user is not None and not shared:
            ET.SubElement(permissions, "owner").text = str(self._user[0])
            ET.SubElement(permissions, "group").text = str(self._user[1])
        return volume

    def names(self, prefix: str = "") -> set[str]:
        pool = self._pool()
        with trying(f"list the storage pool {self._name} on {self._connection.uri}"):
            pool.refresh(0)
            return {v.name() for v in pool.listAllVolumes(0) if v.name().startswith(prefix)}

    def read(self, name: str) -> bytes | None:
        volume = self._volume(name)
        if volume is None:
            return None
        connection = self._connection.get()
        with trying(f"read {self.path(name)} on {self._connection.uri}"):
            stream = connection.newStream(0)
            volume.download(stream, 0, MAX_SIDECAR_BYTES, 0)
            data = bytearray()
            stream.recvAll(lambda _s, chunk, _o: data.extend(chunk), None)
            stream.finish()
            return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        self.remove(name)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            self._upload(name, file, len(data), "raw", len(data))

    def _upload(self, name: str, file: BinaryIO, size: int, form: str, capacity: int, *, shared: bool = False) -> None:
        pool, connection = self._pool(), self._connection.get()
        with trying(f"upload {size} bytes to {self.path(name)} on {self._connection.uri}"):
            # A raw volume takes the bytes as they are, whatever format they are in.
            volume = pool.createXML(ET.tostring(self._volume_xml(name, size, "raw", shared=shared), "unicode"), 0)
            try:
                stream = connection.newStream(0)
                volume.upload(stream, 0, size, 0)
                stream.sendAll(lambda _s, count, _o: file.read(min(count, STREAM_CHUNK)), None)
                stream.finish()
            except BaseException:
                volume.delete(0)
                raise
            if form != "raw":
                pool.refresh(0)  # so that libvirt sees format and capacity
                del capacity

    def place(self, source: Path, sha256: str) -> Path:
        name = _IMAGE + sha256
        with reporting(f"read the image file {source}"), source.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            volume = self._volume(name)
            if volume is not None:
                with trying(f"look at {self.path(name)} on {self._connection.uri}"):
                    if volume.info()[1] == size:
                        return self.path(name)
                self.remove(name)  # an upload that died half-way
            self._upload(name, file, size, "raw", size, shared=True)
        return self.path(name)

    def make_disk(self, name: str, size_mib: int) -> None:
        if self._volume(name) is not None:
            return
        with packed_state_disk(size_mib) as packed, packed.open("rb") as file:
            self._upload(name, file, packed.stat().st_size, "qcow2", size_mib * MIB)

    def make_overlay(self, name: str, backing: str, backing_format: str, size_bytes: int) -> None:
        self.remove(name)
        volume = self._volume_xml(name, size_bytes, "qcow2")
        store = ET.SubElement(volume, "backingStore")
        ET.SubElement(store, "path").text = str(self.path(backing))
        ET.SubElement(store, "format", type=backing_format)
        pool = self._pool()
        with trying(f"make the overlay {self.path(name)} on {self._connection.uri}"):
            pool.createXML(ET.tostring(volume, "unicode"), 0)

    def capacity(self, name: str) -> int:
        pool = self._pool()
        with trying(f"look at {self.path(name)} on {self._connection.uri}"):
            pool.refresh(0)
            return int(pool.storageVolLookupByName(name).info()[1])

    def remove(self, name: str) -> None:
        volume = self._volume(name)
        if volume is not None:
            with trying(f"delete {self.path(name)} on {self._connection.uri}"):
                volume.delete(0)

    def release(self) -> None:
        if any(not name.startswith(_IMAGE) for name in self.names()):
            return
        pool = self._pool()
        with trying(f"remove the storage pool {self._name} of {self._connection.uri}"):
            for volume in pool.listAllVolumes(0):
                volume.delete(0)
            pool.destroy()
            pool.delete(0)
            pool.undefine()
