"""Recipes: what goes into an image, as TOML. A recipe names its base, which several variants share."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.image import Role

RECIPES = Path(__file__).resolve().parents[2] / "images"
_T = TypeVar("_T")
_KINDS = {list: "a list of strings", str: "a string", bool: "true or false", dict: "a table"}


@dataclass(frozen=True, slots=True)
class KernelRecipe:
    """The kernel and the modules that the initramfs loads, in order."""

    package: str
    modules: tuple[str, ...]
    command_line: str  # the verity parameters are added by the build


@dataclass(frozen=True, slots=True)
class InitramfsRecipe:
    """What the initramfs holds beside modules: programs (paths in their packages) and libraries."""

    packages: tuple[str, ...]
    programs: tuple[str, ...]
    libraries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UefiRecipe:
    """What makes a disk that UEFI boots: systemd's EFI stub, by its package and its path in it."""

    package: str
    stub: str


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """What the images of one lineage have in common: packages, wheels, kernel, initramfs."""

    lineage: str
    release: str
    python: str
    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    wheel_platforms: tuple[str, ...]
    must_import: tuple[str, ...]
    prune: tuple[str, ...]
    kernel: KernelRecipe
    initramfs: InitramfsRecipe
    uefi: UefiRecipe | None  # None: the images boot directly only


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image."""

    name: str
    base: BaseRecipe
    role: Role
    adversary: bool
    entry: str
    state_disk: str  # required | optional
    rooms: tuple[str, ...]  # packages under cloudfit_orchestrator
    files: tuple[str, ...]  # single files under cloudfit_orchestrator
    overlay: Path | None  # a directory whose content is laid over the root


def load_recipe(recipe: Path | str) -> Recipe:
    """Read a recipe: a name among those shipped, a TOML file, or a directory that holds `recipe.toml`.

    Raises BadInputError naming the file and what is wrong in it.
    """
    path = Path(recipe)
    if isinstance(recipe, str) and "/" not in recipe and not path.suffix:
        path = RECIPES / recipe
    if path.is_dir():
        path /= "recipe.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.parent.name for p in RECIPES.glob("*/recipe.toml"))) or "none"
        raise BadInputError(f"no image recipe {path}", next_command=f"name a recipe.toml, or one of: {shipped}")
    doc = _read(path)
    doc.setdefault("files", [])
    overlay = doc.pop("overlay", None)
    base = doc.pop("base", None)
    if not isinstance(base, str) or not (overlay is None or isinstance(overlay, str)):
        raise BadInputError(f"{path}: `base` must be the path of the base recipe, `overlay` that of a directory")
    role = doc.get("role")
    if role not in list(Role):
        raise BadInputError(f"{path}: `role` is {role!r}, expected one of {', '.join(Role)}")
    if doc.get("state_disk") not in ("required", "optional"):
        raise BadInputError(f"{path}: `state_disk` is {doc.get('state_disk')!r}, expected required or optional")
    doc["role"] = Role(role)
    return _make(
        Recipe,
        doc,
        path,
        base=_load_base((path.parent / base).resolve()),
        overlay=(path.parent / overlay).resolve() if overlay else None,
    )


def _load_base(path: Path) -> BaseRecipe:
    doc = _read(path)
    uefi = doc.pop("uefi", None)
    parts = {name: doc.pop(name, None) for name in ("kernel", "initramfs")}
    for name, part in (parts | ({} if uefi is None else {"uefi": uefi})).items():
        if not isinstance(part, dict):
            raise BadInputError(f"{path}: no table [{name}]")
    return _make(
        BaseRecipe,
        doc,
        path,
        kernel=_make(KernelRecipe, dict(parts["kernel"] or {}), path),
        initramfs=_make(InitramfsRecipe, dict(parts["initramfs"] or {}), path),
        uefi=None if uefi is None else _make(UefiRecipe, dict(uefi), path),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"{path}: {error}") from error


def _make(cls: type[_T], doc: dict[str, Any], path: Path, **given: Any) -> _T:
    """Build the dataclass from TOML, refusing unknown, missing and mistyped keys."""
    known = {f.name: f for f in fields(cast("Any", cls)) if f.name not in given}
    wrong = sorted(set(known).symmetric_difference(doc))
    for name in wrong:
        raise BadInputError(f"{path}: {'unknown' if name in doc else 'missing'} key `{name}`")
    for name, value in doc.items():
        kind = list if str(known[name].type).startswith("tuple") else bool if known[name].type is bool else str
        items = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(v, str) for v in items):
            raise BadInputError(f"{path}: `{name}` must be {_KINDS[kind]}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in doc.items()}, **given)
