"""Small but complete images, made with the real tools: a root of some files, random bytes for a kernel."""

import dataclasses
import random
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.launcher import boot_disk, verity
from cloudfit_orchestrator.launcher.measure import range_digest
from cloudfit_orchestrator.model.image import Manifest, Part, Role, manifest_digest, seal_manifest
from cloudfit_orchestrator.model.signing import public_bytes

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
TRUSTED = [public_bytes(KEY)]


def make_tree(directory: Path, size: int = 1 << 20) -> Path:
    """A tree whose image has more than one level of hashes: over 128 blocks that do not compress."""
    (directory / "usr").mkdir(parents=True)
    (directory / "usr/data").write_bytes(random.Random(1).randbytes(size))
    (directory / "usr/text").write_text("text\n")
    return directory


def make_image(work: Path, *, adversary: bool = False, **changed: object) -> Path:
    """A signed image in a directory named by its digest; `changed` replaces fields of the manifest before signing."""
    image = work / "image"
    image.mkdir(parents=True)
    tree = verity.make_root(make_tree(work / "tree"), image / "root.img")
    (image / "vmlinuz").write_bytes(random.Random(2).randbytes(9000))
    (image / "initramfs").write_bytes(random.Random(3).randbytes(5000))
    split = tree.blocks * verity.BLOCK
    before, behind = boot_disk.frame(b"program", (image / "root.img").stat().st_size)
    (image / "boot.img").write_bytes(before + behind)
    sizes = {p.name: p.stat().st_size for p in image.iterdir()}
    parts = tuple(
        Part(name, file, offset, size, range_digest(image / file, offset, size))
        for name, file, offset, size in (
            ("kernel", "vmlinuz", 0, sizes["vmlinuz"]),
            ("initramfs", "initramfs", 0, sizes["initramfs"]),
            ("root", "root.img", 0, split),
            ("verity", "root.img", split, sizes["root.img"] - split),
            ("esp", "boot.img", 0, len(before)),
            ("gpt", "boot.img", len(before), len(behind)),
        )
    )
    manifest = Manifest(
        name="small",
        role=Role.REPLICA,
        adversary=adversary,
        command_line=f"console=ttyS0 {tree.argument()}",
        verity_root=tree.root,
        parts=parts,
        packages=("none=1",),
        lineage="test",
    )
    return sign(image, dataclasses.replace(manifest, **changed))  # type: ignore[arg-type]


def sign(image: Path, manifest: Manifest) -> Path:
    """Sign `manifest` into the directory `image` and rename it after its digest."""
    envelope = seal_manifest(manifest, KEY)
    (image / "manifest.json").write_bytes(envelope)
    return image.rename(image.parent / manifest_digest(envelope).replace(":", "-"))


def flip(path: Path, offset: int) -> None:
    """Change one bit of the byte at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
