"""Our images in Glance: uploaded once a cloud, deployment and content, compared with the manifest, collected by tags.

A machine's image is three of Glance's: kernel and initramfs, and the root (erofs and hash tree in one raw disk) that
names both and carries the kernel's command line. Where a cloud boots by UEFI only it is one, a disk of the same root.
Another kind is an empty ext4 from which Cinder makes state disks, because a guest of ours has no tool to make a file
system. Where there is no Cinder, the root's image holds that ext4 behind the root instead (`single`), and a recovery
machine's initramfs carries its root (`carrier`): model/one_disk.py.
"""

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.clouds import image_signature
from cloudfit_orchestrator.clouds.base import MachineSpec
from cloudfit_orchestrator.clouds.openstack_api import Api, BusyError, UnclearError
from cloudfit_orchestrator.clouds.openstack_tags import KIND, PREFIX, deployment_tag, fresh_id
from cloudfit_orchestrator.clouds.openstack_volumes import gib
from cloudfit_orchestrator.clouds.state_disk import packed_single_disk, packed_state_disk, reporting
from cloudfit_orchestrator.model.errors import BadError, PermanentError, RefusedError, TemporaryError
from cloudfit_orchestrator.model.image import Manifest
from cloudfit_orchestrator.model.one_disk import carried, check_image, single_disk_mib
from cloudfit_orchestrator.model.spec import OpenStackPlace

UPLOAD_TIMEOUT_S = 900.0  # of one image of some 30 MB: a slow uplink of 1 Mbit/s takes four minutes
STALE_UPLOAD_S = 300.0  # an upload that others began and that shows no end: theirs died
MAX_UPLOADS = 3  # of one image whose bytes arrive spoilt
MAX_COMMAND_LINE = 255  # Nova keeps image properties as system metadata of that length, cut without a word
STATE, SINGLE, CARRIER = "state", "single", "carrier"
DIGEST, OF_IMAGE = PREFIX + "digest", PREFIX + "image"
CONTENT = PREFIX + "content"  # SHA-512 of the file, of an image that is not made alike twice
# What Nova must give each machine. Without the guest agent's port there is no virtio-serial controller, and the
# wormhole's channel could not be attached to the running machine; a time-out of 0 makes `stop` cut the power.
HARDWARE = {
    "hw_qemu_guest_agent": "yes",
    "hw_disk_bus": "virtio",
    "hw_vif_model": "virtio",
    "hw_rng_model": "virtio",
    "os_shutdown_timeout": "0",
}
# OVMF comes with Nova's q35; its variables and the boot order are Nova's own.
UEFI_HARDWARE = {"hw_firmware_type": "uefi", "hw_machine_type": "q35"}
# For a config drive, which Nova makes a CD-ROM: on a bus that the image's kernel has a driver for.
DRIVE_HARDWARE = {"hw_cdrom_bus": "scsi", "hw_scsi_model": "virtio-scsi"}
_FORMATS = {
    "kernel": "aki", "initramfs": "ari", "root": "raw", "disk": "raw", STATE: "qcow2", SINGLE: "qcow2", CARRIER: "ari",
}  # fmt: skip
_BOOTED = ("root", "disk", SINGLE, CARRIER)  # of these the newest of each image stays, with what it names
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    kind: str  # key of _FORMATS
    digest: str  # of the content, hex; of a state disk its size
    of_image: str  # the manifest's name
    path: Path | None  # None: made when it is needed
    parts: tuple[tuple[int, int, str], ...] = ()  # (offset, size, SHA-256) that the manifest says
    properties: Mapping[str, str] = field(default_factory=dict)
    min_disk: int = 0  # GiB


def check_bootable(manifest: Manifest, boot: str) -> None:
    """Raises PermanentError if the image cannot boot so: by UEFI without a disk, or Nova would cut the command line."""
    if boot == "uefi" and not manifest.disk:
        raise PermanentError(
            f"image {manifest.name} has no disk that UEFI boots",
            next_command=f"cloudfit image build {manifest.name}, with [uefi] in its base recipe",
        )
    if boot == "kernel" and len(manifest.command_line) > MAX_COMMAND_LINE:
        raise PermanentError(
            f"image {manifest.name}: a command line of {len(manifest.command_line)} characters, Nova keeps "
            f"{MAX_COMMAND_LINE}",
            next_command="shorten command_line in the image's recipe, or boot: uefi in the spec",
        )


class Images:
    """The images of one deployment in one project."""

    def __init__(self, api: Api, place: OpenStackPlace, keys: Path) -> None:
        """`keys`: the directory of the key that `place` names."""
        self._api = api
        self._place = place
        self._keys = keys
        self._lock = threading.Lock()  # uploads of one process one after the other: each finds what the one before made
        self._good: set[tuple[str, str]] = set()  # (id, digest) whose bytes were compared in this process

    def of_deployment(self, deployment: str) -> list[dict[str, Any]]:
        """All of ours, whatever their state."""
        found = self._listed(f"list the images of {deployment}", tag=deployment_tag(deployment))
        return [i for i in found if i.get(PREFIX + "deployment") == deployment and i.get(KIND) in _FORMATS]

    def _listed(self, tried: str, **query: str) -> list[dict[str, Any]]:
        """The project's images, with those that are hidden: ours may have been made so by another spec."""
        owner = self._api.project()
        return [
            image for hidden in ("false", "true")
            for image in self._api.list(
                "image", "/images", "images", tried, owner=owner, limit="100", os_hidden=hidden, **query
            )
        ]  # fmt: skip

    def ensure_boot(self, spec: MachineSpec) -> str:
        """Id of the image that a server of `spec` names. BadError if bytes differ from the manifest."""
        what = ("image", *self._content(spec))
        with self._lock:
            return self._api.remembered(what, lambda: self._look(spec))

    @staticmethod
    def _content(spec: MachineSpec) -> tuple[str, str, str]:
        manifest = spec.manifest
        return (
            spec.owner.deployment,
            manifest.name,
            repr((sorted(p.sha256 for p in manifest.parts), manifest.command_line, spec.drive is not None)),
        )

    def _look(self, spec: MachineSpec) -> str:
        manifest, deployment = spec.manifest, spec.owner.deployment
        check_bootable(manifest, self._place.boot)
        if self._place.boot == "uefi":
            parts = [(spec.image_dir / p.file, p.offset, p.size) for p in manifest.disk]
            with _joined(parts) as path:
                return self._ensure(deployment, self._wanted(spec, "disk", _hardware(spec) | UEFI_HARDWARE, path))
        return self._ensure(deployment, self._root(spec))

    def _root(self, spec: MachineSpec) -> _Wanted:
        """The root image, with kernel and initramfs uploaded."""
        deployment = spec.owner.deployment
        ids = {kind: self._ensure(deployment, self._wanted(spec, kind)) for kind in ("kernel", "initramfs")}
        boot = boot_properties(spec.manifest, ids["kernel"], ids["initramfs"])
        return self._wanted(spec, "root", boot | _hardware(spec))

    def _wanted(
        self, spec: MachineSpec, kind: str, properties: Mapping[str, str] | None = None, path: Path | None = None
    ) -> _Wanted:
        """`kind`: kernel | initramfs | root, the last with all parts that lie in its file; or disk, made at `path`."""
        manifest = spec.manifest
        if kind == "disk":
            ends = [sum(p.size for p in manifest.disk[:i]) for i in range(len(manifest.disk))]
            parts = tuple((at, p.size, p.sha256) for at, p in zip(ends, manifest.disk, strict=True))
        else:
            file = manifest.part(kind).file
            path = spec.image_dir / file
            parts = tuple((p.offset, p.size, p.sha256) for p in manifest.parts if p.file == file)
        properties = {**(properties or {}), **self._signed()}
        content = repr((kind, sorted(parts), sorted(properties.items())))
        digest = hashlib.sha256(content.encode()).hexdigest()
        name = f"{spec.owner.deployment}-{manifest.name}-{kind}-{digest[:16]}"
        return _Wanted(name, kind, digest, manifest.name, path, parts, properties)

    def _signed(self) -> dict[str, str]:
        return image_signature.properties(self._place.certificate) if self._place.certificate else {}

    def check_key(self) -> None:
        """Raises PermanentError if images are to be signed and cannot be."""
        if self._place.certificate:
            image_signature.load_key(self._keys / self._place.signing_key)

    def ensure_single(self, spec: MachineSpec, state_mib: int) -> str:
        """Id of the image of root and empty state in one disk, and what it names. Errors as of `ensure_boot`."""
        check_image(spec.manifest)
        what = ("image", *self._content(spec), SINGLE, str(state_mib))
        with self._lock:
            return self._api.remembered(what, lambda: self._look_single(spec, state_mib))

    def _look_single(self, spec: MachineSpec, state_mib: int) -> str:
        manifest, deployment = spec.manifest, spec.owner.deployment
        check_bootable(manifest, "kernel")
        root = self._root(spec)
        digest = hashlib.sha256(f"{root.digest} {state_mib}".encode()).hexdigest()
        name = f"{deployment}-{manifest.name}-{SINGLE}-{digest[:16]}"
        size_gib = gib(single_disk_mib(state_mib))
        wanted = _Wanted(name, SINGLE, digest, manifest.name, None, (), root.properties, min_disk=size_gib)
        found = self._find(deployment, wanted)
        if found is not None and found.get("status") == "active" and self._as_made(found, wanted):
            return str(found["id"])
        assert root.path is not None
        self._check(root, root.path)
        with packed_single_disk(root.path, state_mib) as path:
            return self._ensure(deployment, wanted, path)

    def ensure_carrier(self, spec: MachineSpec) -> tuple[str, str]:
        """Ids of kernel and of an initramfs that carries the root. Errors as of `ensure_boot`."""
        manifest, deployment = spec.manifest, spec.owner.deployment
        check_image(manifest)
        with self._lock:
            kernel = self._ensure(deployment, self._wanted(spec, "kernel"))
            layout, base = carried(manifest), self._wanted(spec, "root")
            assert base.path is not None
            initramfs = manifest.part("initramfs")
            files: tuple[bytes | tuple[Path, int, int], ...] = (
                layout.head,
                (base.path, 0, layout.root_size),
                layout.tail,
                (spec.image_dir / initramfs.file, 0, initramfs.size),
            )
            parts = (
                *((offset + layout.root_offset, size, said) for offset, size, said in base.parts),
                (layout.initramfs_offset, initramfs.size, initramfs.sha256),
            )
            digest = hashlib.sha256(repr((CARRIER, parts)).encode()).hexdigest()
            name = f"{deployment}-{manifest.name}-{CARRIER}-{digest[:16]}"
            wanted = _Wanted(name, CARRIER, digest, manifest.name, None, parts, {"kernel_id": kernel, **self._signed()})
            with _joined(files) as path:
                return kernel, self._ensure(deployment, wanted, path)

    def ensure_state(self, deployment: str, size_gib: int) -> str:
        """Id of the image of an empty state disk."""
        name = f"{deployment}-{STATE}-{size_gib}g"
        wanted = _Wanted(name, STATE, f"ext4-{size_gib}", STATE, None, properties=self._signed())
        with self._lock:
            found = self._find(deployment, wanted)
            if found is not None and found.get("status") == "active":
                self._settle(found, wanted)
                return str(found["id"])
            with packed_state_disk(size_gib << 10) as path:
                return self._ensure(deployment, wanted, path)

    def collect(self, deployment: str, used: Collection[str]) -> list[str]:
        """Delete images of ours that no machine uses (`used`: ids) and that were replaced by a newer one. Their ids."""
        mine = sorted(self.of_deployment(deployment), key=lambda i: str(i.get("created_at")))
        newest = {str(i[OF_IMAGE]): i for i in mine if i[KIND] in _BOOTED}
        keep = {*used, *(str(i["id"]) for i in newest.values())}
        keep |= {str(i.get(k)) for i in mine if i["id"] in keep for k in ("kernel_id", "ramdisk_id")}
        old = [i for i in mine if i[KIND] != STATE and i["id"] not in keep and i.get("status") == "active"]
        if old:
            self._api.forget()
        for image in old:
            self._delete(image, f"delete the old image {image['id']}")
        return [str(image["id"]) for image in old]

    def remove_all(self, deployment: str) -> None:
        """Delete all images of the deployment."""
        self._api.forget()
        for image in self.of_deployment(deployment):
            self._remove(image)

    def _remove(self, image: Mapping[str, Any]) -> None:
        tried = f"delete the image {image['name']} ({image['id']})"

        def gone() -> bool | None:  # 409 while Cinder or Nova reads it
            return True if not self._delete(image, tried) else None

        self._api.until(tried, gone, STALE_UPLOAD_S)

    def _delete(self, image: Mapping[str, Any], tried: str) -> bool:
        """Ask for the end of one of ours, protected or not; False if it is gone already."""
        if image.get("protected") and not self._set(image, {"protected": False}, tried):
            return False
        return self._api.delete("image", f"/images/{image['id']}", tried)

    def _set(self, image: Mapping[str, Any], values: Mapping[str, bool], tried: str) -> bool:
        """Set its attributes; False if it is gone."""
        changes = [{"op": "replace", "path": f"/{name}", "value": value} for name, value in values.items()]
        return self._api.patch(f"/images/{image['id']}", changes, tried) is not None

    def _settle(self, found: Mapping[str, Any], wanted: _Wanted) -> None:
        """Hidden and protected as the spec says now."""
        said = {"os_hidden": self._place.hidden, "protected": self._place.protected}
        other = {name: value for name, value in said.items() if bool(found.get(name)) != value}
        if other:
            self._set(found, other, f"set {', '.join(other)} of the image {wanted.name}")

    def _ensure(self, deployment: str, wanted: _Wanted, path: Path | None = None) -> str:
        path = path or wanted.path
        assert path is not None
        tried = f"upload the image {wanted.name}"
        fresh, uploads = fresh_id(), 0

        def step() -> str | None:
            nonlocal fresh, uploads
            found = self._find(deployment, wanted) or self._get(fresh, tried)
            if found is None:
                self._create(deployment, wanted, fresh, path)
                found = self._get(fresh, tried)
            if found is None:
                return None
            identity, status = str(found["id"]), found.get("status")
            if status == "active":
                if self._same(found, wanted, path):
                    self._settle(found, wanted)
                    return identity
                uploads += 1
                self._remove(found)
                fresh = fresh_id()  # Glance gives no id twice, not even one of what is deleted
                if uploads >= MAX_UPLOADS:
                    raise BadError(
                        f"image {wanted.name} in {self._api.name} has other bytes than the manifest says, after "
                        f"{uploads} uploads",
                        next_command="cloudfit image verify, then the same command again",
                    )
            elif status == "queued":
                self._check(wanted, path)
                self._api.upload(f"/images/{identity}/file", lambda: path.open("rb"), tried)
            elif status != "saving" or self._stale(found, tried):
                self._remove(found)  # killed, or an upload that died
                fresh = fresh_id()
            return None

        return self._api.until(tried, step, UPLOAD_TIMEOUT_S)

    def _get(self, identity: str, tried: str) -> dict[str, Any] | None:
        found = self._api.get("image", f"/images/{identity}", tried)
        if found is not None and (found.get("id") != identity or "status" not in found):
            raise UnclearError(f"{tried}: {self._api.name} answers with no image")
        return found

    def _stale(self, found: Mapping[str, Any], tried: str) -> bool:
        """Wait for somebody else's upload; True if it shows no end."""

        def ended() -> bool | None:
            now = self._get(str(found["id"]), tried)
            return True if now is None or now.get("status") != "saving" else None

        try:
            self._api.until(tried, ended, STALE_UPLOAD_S)
        except TemporaryError:
            return True
        return False

    def _create(self, deployment: str, wanted: _Wanted, identity: str, path: Path) -> None:
        form = _FORMATS[wanted.kind]
        made = {CONTENT: self._check(wanted, path)} if wanted.kind == SINGLE else {}
        if self._place.certificate:  # of what the manifest says: the bytes are compared with it before they are sent
            key = image_signature.load_key(self._keys / self._place.signing_key)
            with reporting(f"sign the image {wanted.name}"):
                made["img_signature"] = image_signature.sign(path, key)
        body = {
            "id": identity,
            "name": wanted.name,
            "disk_format": form,
            "container_format": form if form in ("aki", "ari") else "bare",
            "visibility": "private",
            "tags": [deployment_tag(deployment)],
            PREFIX + "deployment": deployment,
            KIND: wanted.kind,
            DIGEST: wanted.digest,
            OF_IMAGE: wanted.of_image,
            "min_disk": wanted.min_disk,
            **wanted.properties,
            **made,
        }
        with contextlib.suppress(BusyError):  # the id exists: an earlier request was carried out after all
            self._api.make("image", "/images", body, f"create the image {wanted.name}")

    def _find(self, deployment: str, wanted: _Wanted) -> dict[str, Any] | None:
        """Ours with that content: the oldest active one, or the oldest. RefusedError if a stranger wears its name."""
        found = self._listed(f"look up the image {wanted.name}", name=wanted.name)
        for image in found:
            if image.get(PREFIX + "deployment") != deployment or image.get(KIND) != wanted.kind:
                raise RefusedError(
                    f"image {wanted.name} ({image['id']}) in {self._api.name} wears the name of one of ours, but not "
                    "its tags: not touched",
                    next_command=f"openstack --os-cloud {self._api.cloud} image show {image['id']}; rename it",
                )
        ours = [i for i in found if i.get(DIGEST) == wanted.digest and self._fits(i, wanted)]
        ours.sort(key=lambda i: (i.get("status") != "active", str(i.get("created_at")), str(i["id"])))
        return ours[0] if ours else None

    @staticmethod
    def _fits(image: Mapping[str, Any], wanted: _Wanted) -> bool:
        return all(image.get(name) == value for name, value in wanted.properties.items())

    def _same(self, found: Mapping[str, Any], wanted: _Wanted, path: Path) -> bool:
        """Whether Glance holds what the manifest says: by Glance's own hash of what it received."""
        key = (str(found["id"]), wanted.digest)
        if key in self._good:
            return True
        if wanted.kind == STATE:
            same = bool(found.get("os_hash_value"))  # a file system made elsewhere differs in times; it holds nothing
        elif wanted.kind == SINGLE:
            same = self._as_made(found, wanted)
        else:
            algorithm = str(found.get("os_hash_algo") or "")
            if algorithm not in hashlib.algorithms_available:
                raise PermanentError(
                    f"image {wanted.name}: Glance of {self._api.name} hashes by {algorithm or 'nothing'}: it cannot be "
                    "compared with the manifest",
                    next_command="set hashing_algorithm = sha512 in glance-api.conf, then repeat",
                )
            same = found.get("os_hash_value") == self._check(wanted, path, algorithm)
        if same:
            self._good.add(key)
        return same

    def _as_made(self, found: Mapping[str, Any], wanted: _Wanted) -> bool:
        """Whether Glance holds what its maker gave it. PermanentError if it cannot say."""
        if found.get("os_hash_algo") != "sha512":
            raise PermanentError(
                f"image {wanted.name}: Glance of {self._api.name} hashes by {found.get('os_hash_algo') or 'nothing'}: "
                "it cannot be compared with the file",
                next_command="set hashing_algorithm = sha512 in glance-api.conf, then repeat",
            )
        return found.get("os_hash_value") == found.get(CONTENT)

    @staticmethod
    def _check(wanted: _Wanted, path: Path, algorithm: str = "sha512") -> str:
        """The whole file's hash; BadError if a part of it is not what the manifest says, in the same pass."""
        whole = hashlib.new(algorithm)
        parts = [(offset, offset + size, hashlib.sha256(), said) for offset, size, said in wanted.parts]
        position = 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    whole.update(chunk)
                    for begin, end, digest, _ in parts:
                        digest.update(chunk[max(0, begin - position) : max(0, end - position)])
                    position += len(chunk)
        except OSError as error:
            raise PermanentError(
                f"image file {path}: {error.strerror}", next_command="cloudfit image list; cloudfit image build"
            ) from error
        wrong = [said for _, _, digest, said in parts if digest.hexdigest() != said]
        if wrong or (parts and max(end for _, end, _, _ in parts) != position):
            raise BadError(
                f"image file {path} is not what its manifest says", next_command="cloudfit image verify, or build it"
            )
        return whole.hexdigest()


def boot_properties(manifest: Manifest, kernel: str, initramfs: str) -> dict[str, str]:
    """What an image says of how Nova boots it."""
    return {"kernel_id": kernel, "ramdisk_id": initramfs, "os_command_line": manifest.command_line}


def _hardware(spec: MachineSpec) -> dict[str, str]:
    return HARDWARE if spec.drive is None else HARDWARE | DRIVE_HARDWARE


@contextlib.contextmanager
def _joined(parts: Sequence[bytes | tuple[Path, int, int]]) -> Iterator[Path]:
    """A temporary file of bytes and of parts of files (path, offset, size), one behind the other."""
    with reporting("join an image's files"), tempfile.NamedTemporaryFile("wb", prefix="cloudfit-") as joined:
        for part in parts:
            if isinstance(part, bytes):
                joined.write(part)
                continue
            path, offset, left = part
            with path.open("rb") as file:
                file.seek(offset)
                while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                    joined.write(chunk)
                    left -= len(chunk)
        joined.flush()
        yield Path(joined.name)
