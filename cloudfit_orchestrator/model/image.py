"""Image manifests and launch certificates: what the SIL signs and what an agent measured."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.envelope import open_envelope, seal
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import sha256

MANIFEST_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://cloudfit.dev/image/v1"
LAUNCH_TYPE = "application/vnd.cloudfit.launch+json"


class Role(StrEnum):
    """What an image is for."""

    REPLICA = "replica"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class Part:
    """A measured part: a whole file, or the bytes [offset, offset + size) of one."""

    name: str  # kernel | initramfs | root | verity, and of an image that UEFI boots too esp | gpt
    file: str  # name inside the image's directory
    offset: int
    size: int
    sha256: str  # hex


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image, completely: any byte that can change what runs is under a digest here."""

    name: str
    role: Role
    adversary: bool  # a test variant that misbehaves on demand; launched only where the spec allows it
    command_line: str  # holds the verity root hash
    verity_root: str  # hex
    parts: tuple[Part, ...]
    packages: tuple[str, ...]  # "name=version", Debian and PyPI, sorted
    lineage: str  # images of one lineage share faults

    def part(self, name: str) -> Part:
        """The part of that name. Raises BadError if the manifest has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise BadError(f"image manifest of {self.name} has no part {name!r}")

    @property
    def disk(self) -> tuple[Part, ...]:
        """The parts that, one behind the other, are the disk that UEFI boots; empty if the image has none."""
        names = ("esp", "root", "verity", "gpt")
        found = tuple(p for name in names for p in self.parts if p.name == name)
        return found if len(found) == len(names) else ()

    @property
    def disk_bytes(self) -> int:
        """The size of the largest disk that is made of it, however it boots; 0 if it has none."""
        roots = max((p.offset + p.size for p in self.parts if p.name in ("root", "verity")), default=0)
        return max(roots, sum(p.size for p in self.disk))


def manifest_digest(envelope: bytes) -> str:
    """An image's name: `sha256:` and the hash of its signed manifest's envelope."""
    return "sha256:" + sha256(envelope).hex()


def seal_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """The signed in-toto statement around `manifest`."""
    doc = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": p.name, "digest": {"sha256": p.sha256}} for p in manifest.parts],
        "predicateType": PREDICATE_TYPE,
        "predicate": asdict(manifest),
    }
    return seal(MANIFEST_TYPE, json.dumps(doc, sort_keys=True, separators=(",", ":")).encode(), key)


def open_manifest(envelope: bytes, trusted: list[bytes]) -> Manifest:
    """Verify and decode. Raises BadError."""
    doc = open_envelope(envelope, MANIFEST_TYPE, trusted).json()
    try:
        if doc["predicateType"] != PREDICATE_TYPE:
            raise BadError(f"statement is about {doc['predicateType']!r}, not an image")
        p: dict[str, Any] = dict(doc["predicate"])
        p["role"] = Role(p["role"])
        p["parts"] = tuple(Part(**x) for x in p["parts"])
        p["packages"] = tuple(p["packages"])
        return Manifest(**p)
    except (KeyError, TypeError, ValueError) as error:
        raise BadError(f"image manifest is malformed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class LaunchCertificate:
    """Signed by an agent: this incarnation runs that image in that domain here. The basis of every epoch it gets."""

    group: str
    replica: str
    incarnation: int
    role: Role
    image: str  # manifest_digest of what was measured
    domain: str  # sha256:… of the canonical domain definition
    machine: str  # the driver's id of the VM (libvirt UUID, process id)
    agent: str  # key id of the agent
    isolated: bool  # False under the process driver
    channel_ca: str  # base64 DER
    measured_at: str  # RFC 3339, information only; empty if nothing was measured
    measured: bool = True  # False: nobody looked at what boots there, `image` is what was asked for


def seal_launch(certificate: LaunchCertificate, key: Ed25519PrivateKey) -> bytes:
    """The signed launch certificate."""
    return seal(LAUNCH_TYPE, json.dumps(asdict(certificate), sort_keys=True, separators=(",", ":")).encode(), key)


def open_launch(envelope: bytes, trusted: list[bytes]) -> LaunchCertificate:
    """Verify and decode. Raises BadError."""
    doc = open_envelope(envelope, LAUNCH_TYPE, trusted).json()
    try:
        doc["role"] = Role(doc["role"])
        return LaunchCertificate(**doc)
    except (KeyError, TypeError, ValueError) as error:
        raise BadError(f"launch certificate is malformed: {type(error).__name__}: {error}") from error
