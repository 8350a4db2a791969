"""The secure image launcher's judgement: an image is launched only if every byte that can change what runs is signed.

1. The directory holds exactly the files of an image, with or without those that UEFI needs.
2. The manifest is signed by a trusted key, and its digest is the directory's name.
3. What the manifest says of itself is coherent.
4. Each file has its signed size, each part its signed digest.
5. The command line names the verity root, and the root hashes to it, through the stored tree.

Nothing of a file is used before its step has passed. Trusted: the given keys and this host. Not checked here: what the
hypervisor really boots; the agent measures that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.launcher import verity
from cloudfit_orchestrator.launcher.measure import range_digest
from cloudfit_orchestrator.launcher.store import (
    BOOT_FILE,
    FILES,
    INITRAMFS_FILE,
    KERNEL_FILE,
    MANIFEST_FILE,
    ROOT_FILE,
    Store,
)
from cloudfit_orchestrator.model.envelope import MAX_ENVELOPE_BYTES
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import Manifest, manifest_digest, open_manifest

_PART_FILES = {"kernel": KERNEL_FILE, "initramfs": INITRAMFS_FILE, "root": ROOT_FILE, "verity": ROOT_FILE}
_UEFI_FILES = {"esp": BOOT_FILE, "gpt": BOOT_FILE}
_NEXT = "cloudfit image build, or copy the image again from where it was built"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a store. `manifest` is None, and `problem` says why, if its manifest does not verify."""

    digest: str
    directory: Path
    names: tuple[str, ...]
    manifest: Manifest | None
    problem: str


def verify_image(directory: Path, trusted_keys: Sequence[bytes], *, allow_adversary: bool = False) -> Manifest:
    """Verify the image in `directory` against raw Ed25519 public keys and return its manifest.

    Raises BadError naming the part (manifest, kernel, initramfs, root, verity, esp, gpt) that is wrong, RefusedError
    for an adversary image where none is allowed, BadInputError if there is no such directory.
    """
    try:
        manifest = _verified_manifest(directory, trusted_keys)
        if manifest.adversary and not allow_adversary:
            raise RefusedError(
                f"image {manifest.name} in {directory} is an adversary: it misbehaves on demand",
                next_command="set allow_adversary: true in a specification for tests, or name another image",
            )
        _check_sizes(directory, manifest)
        _check_digests(directory, manifest)
        verity.check_tree(directory / ROOT_FILE, verity.parse_command_line(manifest.command_line))
    except BadError as error:
        raise BadError(f"image {directory} is refused: {error.fact}", next_command=_NEXT) from error
    return manifest


def list_images(store: Path, trusted_keys: Sequence[bytes]) -> list[StoredImage]:
    """The images in `store`, by digest. Manifests are verified, the other parts are not: see `verify_image`."""
    names: dict[str, list[str]] = {}
    for name, directory in Store(store).names().items():
        names.setdefault(directory, []).append(name)
    images = []
    for path in Store(store).directories():
        manifest, problem = None, ""
        try:
            manifest = _verified_manifest(path, trusted_keys)
        except BadError as error:
            problem = error.fact
        digest = path.name.replace("-", ":", 1)
        images.append(StoredImage(digest, path, tuple(names.get(path.name, ())), manifest, problem))
    return images


def find_image(store: Path, reference: str) -> Path:
    """The directory of `NAME` (the newest built), `NAME@sha256:HEX` or `sha256:HEX`. Raises BadInputError.

    What lies there is not verified yet: see `verify_image`.
    """
    return Store(store).find(reference)


def _verified_manifest(directory: Path, trusted_keys: Sequence[bytes]) -> Manifest:
    """Steps 1 to 3."""
    if not directory.is_dir():
        raise BadInputError(f"no image directory {directory}", next_command="cloudfit image list")
    found = {path.name for path in directory.iterdir()}
    files = (*FILES, *({BOOT_FILE} & found))
    for name in files:
        if name not in found:
            raise BadError(f"{_parts_of(name)}: the file {name} is missing")
        if not (directory / name).is_file() or (directory / name).is_symlink():
            raise BadError(f"{_parts_of(name)}: {name} is not a regular file")
    if extra := sorted(found - set(files)):
        raise BadError(f"the file {extra[0]!r} is no part of an image")
    with (directory / MANIFEST_FILE).open("rb") as file:
        envelope = file.read(MAX_ENVELOPE_BYTES + 1)
    try:
        manifest = open_manifest(envelope, list(trusted_keys))
    except BadError as error:
        raise BadError(f"manifest: {error.fact}") from error
    digest = manifest_digest(envelope)
    if directory.resolve().name.startswith("sha256-") and directory.resolve().name != digest.replace(":", "-"):
        raise BadError(f"manifest: its digest is {digest}, the directory names another")
    _check_coherence(manifest, uefi=BOOT_FILE in found)
    return manifest


def _check_coherence(manifest: Manifest, *, uefi: bool) -> None:
    """What is signed must also make sense: a careless signer must not get an image past the other steps."""
    expected = _PART_FILES | (_UEFI_FILES if uefi else {})
    if [(p.name, p.file) for p in manifest.parts] != list(expected.items()):
        raise BadError(f"manifest: its parts are not exactly {', '.join(expected)}")
    for part in manifest.parts:
        before = {"verity": "root", "gpt": "esp"}.get(part.name)
        if part.size <= 0 or part.offset != (manifest.part(before).size if before else 0):
            raise BadError(f"manifest: {part.name} has offset {part.offset} and size {part.size}")
    try:
        tree = verity.parse_command_line(manifest.command_line)
    except BadError as error:
        raise BadError(f"manifest: {error.fact}") from error
    if tree.root != manifest.verity_root:
        raise BadError("manifest: its command line names another verity root")
    if tree.blocks * verity.BLOCK != manifest.part("root").size or tree.start != tree.blocks + 1:
        raise BadError("manifest: the verity parameters of its command line do not fit the root's size")


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    for name in dict.fromkeys(p.file for p in manifest.parts):
        parts = [p for p in manifest.parts if p.file == name]
        signed = max(p.offset + p.size for p in parts)
        size = (directory / name).stat().st_size
        if size != signed:
            short = [p.name for p in parts if p.offset + p.size > size] or [parts[-1].name]
            raise BadError(f"{' and '.join(short)}: {name} has {size} bytes, signed are {signed}")


def _check_digests(directory: Path, manifest: Manifest) -> None:
    for part in manifest.parts:
        found = range_digest(directory / part.file, part.offset, part.size)
        if found != part.sha256:
            raise BadError(f"{part.name}: {part.file} has SHA-256 {found}, signed is {part.sha256}")


def _parts_of(file: str) -> str:
    return " and ".join(part for part, name in (_PART_FILES | _UEFI_FILES).items() if name == file) or "manifest"
