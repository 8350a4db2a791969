"""Building an image: resolve, fetch, lay out, prune, hash, sign. The same inputs give the same digest."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.launcher import boot_disk, kernel, root, uki, verity
from cloudfit_orchestrator.launcher.measure import range_digest
from cloudfit_orchestrator.launcher.packages import Apt, Package, extract_deb, fetch_wheels
from cloudfit_orchestrator.launcher.recipe import Recipe, load_recipe
from cloudfit_orchestrator.launcher.store import (
    BOOT_FILE,
    INITRAMFS_FILE,
    KERNEL_FILE,
    MANIFEST_FILE,
    ROOT_FILE,
    Store,
    content_key,
)
from cloudfit_orchestrator.launcher.tools import is_disk_full
from cloudfit_orchestrator.model.errors import PermanentError
from cloudfit_orchestrator.model.image import Manifest, Part, manifest_digest, seal_manifest

NEEDED_MIB = 600  # free space that a first build uses at most: packages, trees, the image
_BUILDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """A signed image in the store: `digest` is `sha256:` and the hash of its manifest's envelope."""

    digest: str
    directory: Path


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Everything fetched that an image is made of."""

    debs: list[Package]
    wheels: list[Package]
    kernel: Package
    initramfs: list[Package]
    stub: Package | None


def build_image(recipe: Path | str, store: Path, key: Ed25519PrivateKey, progress: Callable[[str], None]) -> BuiltImage:
    """Build `recipe` (a shipped name, a TOML file or its directory) into `store`, signed by `key`.

    `progress` gets short lines for people. Needs no privilege. An error or an interrupt leaves the store's images as
    they were. Raises BadInputError (recipe), PermanentError (tool missing or failed, no package lists, disk full).
    """
    plan = load_recipe(recipe)
    store = store.resolve()  # tools run in directories of their own
    try:
        with Store(store).build(progress) as work:
            return _build(plan, Store(store), work, key, progress)
    except (OSError, PermanentError) as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(store).free >> 20
        raise PermanentError(
            f"disk full while building image {plan.name}: {store} has {free} MiB free, a build needs {NEEDED_MIB} MiB; "
            "the images in the store are unchanged",
            next_command=f"df -h {store}",
        ) from error


def _build(
    recipe: Recipe, store: Store, work: Path, key: Ed25519PrivateKey, progress: Callable[[str], None]
) -> BuiltImage:
    inputs = _fetch(recipe, store, work, progress)
    image = work / "image"
    image.mkdir()
    _boot_files(recipe, inputs, store, work=work, image=image, progress=progress)
    tree = _root_tree(recipe, inputs, store, work, progress)
    progress("writing the root with its hash tree")
    tree_hash = verity.make_root(tree, image / ROOT_FILE)
    command_line = f"{recipe.base.kernel.command_line} {tree_hash.argument()}"
    before = 0
    if recipe.base.uefi is not None and inputs.stub is not None:
        progress("making the disk's frame for UEFI")
        extract_deb(inputs.stub, store.blobs, work / "stub")
        before = _boot_disk(kernel.find(work / "stub", recipe.base.uefi.stub), command_line, image)
    manifest = _manifest(recipe, inputs, image, tree_hash, command_line, before)
    envelope = seal_manifest(manifest, key)
    (image / MANIFEST_FILE).write_bytes(envelope)
    digest = manifest_digest(envelope)
    directory = store.commit(image, recipe.name, digest)
    progress(f"image {recipe.name}: {digest}, root {manifest.part('root').size / 1e6:.1f} MB")
    return BuiltImage(digest, directory)


def _fetch(recipe: Recipe, store: Store, work: Path, progress: Callable[[str], None]) -> _Inputs:
    base = recipe.base
    progress(f"resolving packages of Debian {base.release}")
    scratch = work / "apt"
    scratch.mkdir()
    apt = Apt(base.release, scratch)
    kernel_name = apt.depends_on(base.kernel.package)
    stub = [base.uefi.package] if base.uefi is not None else []
    resolved = {p.name: p for p in apt.resolve([*base.packages, *base.initramfs.packages, kernel_name, *stub])}
    apt.fetch(resolved.values(), store.blobs, progress)
    wheels = fetch_wheels(
        base.wheels,
        python=base.python,
        platforms=base.wheel_platforms,
        cache=store.blobs,
        work=scratch,
        progress=progress,
    )
    return _Inputs(
        debs=[resolved[n] for n in sorted(base.packages)],
        wheels=wheels,
        kernel=resolved[kernel_name],
        initramfs=[resolved[n] for n in sorted(base.initramfs.packages)],
        stub=resolved[stub[0]] if stub else None,
    )


def _boot_files(
    recipe: Recipe, inputs: _Inputs, store: Store, *, work: Path, image: Path, progress: Callable[[str], None]
) -> None:
    """Kernel and initramfs, from the cache if all that determines them is the same."""
    base = recipe.base
    script = hashlib.sha256(kernel.INIT_SCRIPT.read_bytes()).hexdigest()
    made = content_key(
        "boot", inputs.kernel.sha256, *(p.sha256 for p in inputs.initramfs), base.kernel, base.initramfs, script,
        _source("kernel.py"), verity.TIMESTAMP,
    )  # fmt: skip
    boot = work / "boot"
    if not store.restore(made, boot):
        progress(f"making the initramfs for {inputs.kernel}")
        kernel_tree, tools_tree = work / "kernel", work / "tools"
        extract_deb(inputs.kernel, store.blobs, kernel_tree)
        for package in inputs.initramfs:
            extract_deb(package, store.blobs, tools_tree)
        boot.mkdir()
        kernel.copy_kernel(kernel_tree, boot / KERNEL_FILE)
        archive = kernel.make_initramfs(kernel_tree, tools_tree, base.kernel, base.initramfs)
        kernel.write_compressed(archive, boot / INITRAMFS_FILE)
        store.keep(made, boot)
    for name in (KERNEL_FILE, INITRAMFS_FILE):
        (boot / name).rename(image / name)


def _root_tree(recipe: Recipe, inputs: _Inputs, store: Store, work: Path, progress: Callable[[str], None]) -> Path:
    base = recipe.base
    made = content_key(
        "base", *(p.sha256 for p in [*inputs.debs, *inputs.wheels]), base.python, base.prune, base.must_import,
        _source("root.py"), _source("packages.py"), verity.TIMESTAMP,
    )  # fmt: skip
    tree = work / "root"
    if not store.restore(made, tree):
        progress("laying out, pruning and precompiling the base")
        tree.mkdir()
        root.make_base(base, inputs.debs, inputs.wheels, store.blobs, tree)
        store.keep(made, tree)
    progress(f"adding {', '.join([*recipe.rooms, *recipe.files])}")
    root.add_own_code(recipe, tree)
    return tree


def _boot_disk(stub: bytes, command_line: str, image: Path) -> int:
    """Write what stands on a disk before and behind the root; the bytes before it."""
    initramfs, kernel_bytes = ((image / name).read_bytes() for name in (INITRAMFS_FILE, KERNEL_FILE))
    program = uki.make_uki(stub, command_line, initramfs, kernel_bytes)
    before, behind = boot_disk.frame(program, (image / ROOT_FILE).stat().st_size)
    (image / BOOT_FILE).write_bytes(before + behind)
    return len(before)


def _manifest(
    recipe: Recipe, inputs: _Inputs, image: Path, tree: verity.Verity, command_line: str, before: int
) -> Manifest:
    split = tree.blocks * verity.BLOCK
    ranges = [
        ("kernel", KERNEL_FILE, 0, (image / KERNEL_FILE).stat().st_size),
        ("initramfs", INITRAMFS_FILE, 0, (image / INITRAMFS_FILE).stat().st_size),
        ("root", ROOT_FILE, 0, split),
        ("verity", ROOT_FILE, split, (image / ROOT_FILE).stat().st_size - split),
    ]
    packages = {*inputs.debs, *inputs.wheels, *inputs.initramfs, inputs.kernel}
    if inputs.stub is not None:
        ranges.append(("esp", BOOT_FILE, 0, before))
        ranges.append(("gpt", BOOT_FILE, before, (image / BOOT_FILE).stat().st_size - before))
        packages.add(inputs.stub)
    return Manifest(
        name=recipe.name,
        role=recipe.role,
        adversary=recipe.adversary,
        command_line=command_line,
        verity_root=tree.root,
        parts=tuple(
            Part(name, file, offset, size, range_digest(image / file, offset, size))
            for name, file, offset, size in ranges
        ),
        packages=tuple(sorted(map(str, packages))),
        lineage=recipe.base.lineage,
    )


def _source(name: str) -> str:
    """The digest of a module of the builder: a change to it makes what was cached stale."""
    return hashlib.sha256((_BUILDER / name).read_bytes()).hexdigest()
