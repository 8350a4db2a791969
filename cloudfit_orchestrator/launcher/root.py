"""The root's tree: packages and wheels laid out, pruned, precompiled and checked, then our own code on top."""

import fnmatch
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from cloudfit_orchestrator.launcher.packages import Package, extract_deb, extract_wheel
from cloudfit_orchestrator.launcher.recipe import BaseRecipe, Recipe
from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.launcher.verity import TIMESTAMP
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError

SITE = "usr/lib/python3/dist-packages"
OWN = "cloudfit_orchestrator"
SOURCE = Path(__file__).resolve().parents[1]  # our own package, as it is installed here
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_MERGED = ("bin", "sbin", "lib", "lib64")
_MOUNT_POINTS = ("dev", "proc", "run", "state", "sys", "tmp")
_INIT = """\
#!/usr/bin/python3 -I
from cloudfit_orchestrator.guest.init import main

main()
"""
# Names that no root may hold, wherever they lie: ways to a shell, to another user, to more software, into the machine.
FORBIDDEN = (
    "*sh", "busybox*", "apt", "apt-*", "dpkg*", "perl*", "ssh*", "systemd*", "login", "su", "sudo", "mount", "getty",
    "agetty", "nc", "curl", "wget", "telnet", "gdb*", "pip*",
)  # fmt: skip


def make_base(recipe: BaseRecipe, debs: Iterable[Package], wheels: Iterable[Package], blobs: Path, tree: Path) -> None:
    """Fill the empty directory `tree` with what the images of a lineage share. `blobs`: fetched packages."""
    for package in debs:
        extract_deb(package, blobs, tree)
    _merge_usr(tree)
    for package in wheels:
        extract_wheel(package, blobs, tree / SITE)
    _prune(tree, recipe.prune)
    python = tree / f"usr/bin/python{recipe.python}"
    if not python.is_file():
        raise PermanentError(f"the packages of {recipe.lineage} hold no usr/bin/{python.name}")
    (tree / "usr/bin/python3").unlink(missing_ok=True)
    (tree / "usr/bin/python3").symlink_to(python.name)
    for name in _MOUNT_POINTS:
        (tree / name).mkdir()
    etc = tree / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "passwd").write_text("root:x:0:0:root:/:/nonexistent\n")
    (etc / "group").write_text("root:x:0:\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    compile_python(tree, recipe.python, [f"usr/lib/python{recipe.python}", SITE])
    normalise(tree)
    run_python(tree, recipe.python, "import " + ", ".join(recipe.must_import))


def add_own_code(recipe: Recipe, tree: Path) -> None:
    """Lay our rooms, the init, the entry's name and the recipe's overlay over the base in `tree`."""
    own = tree / SITE / OWN
    own.mkdir()
    shutil.copyfile(SOURCE / "__init__.py", own / "__init__.py")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for room in recipe.rooms:
        if not (SOURCE / room).is_dir():
            raise BadInputError(f"recipe {recipe.name} names the room {room!r}, which {OWN} has not")
        shutil.copytree(SOURCE / room, own / room, ignore=ignore)
    for name in recipe.files:
        if not (SOURCE / name).is_file():
            raise BadInputError(f"recipe {recipe.name} names the file {name!r}, which {OWN} has not")
        (own / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(SOURCE / name, own / name)
    if recipe.overlay is not None:
        shutil.copytree(recipe.overlay, tree, dirs_exist_ok=True, symlinks=True, ignore=ignore)
    init = tree / "usr/lib/cloudfit/init"
    init.parent.mkdir()
    init.write_text(_INIT)
    init.chmod(0o755)
    settings = tree / "etc/cloudfit"
    settings.mkdir()
    (settings / "entry").write_text(recipe.entry + "\n")
    (settings / "state").write_text(recipe.state_disk + "\n")
    compile_python(tree, recipe.base.python, [SITE])
    normalise(tree)
    run_python(tree, recipe.base.python, _CHECK_ENTRY, recipe.entry)
    check_contents(tree)


_CHECK_ENTRY = """\
import importlib, importlib.util, sys
module = importlib.import_module(sys.argv[1])
if hasattr(module, "__path__") and importlib.util.find_spec(sys.argv[1] + ".__main__") is None:
    sys.exit(f"entry {sys.argv[1]} is a package without __main__")
import cloudfit_orchestrator.guest.init
"""


def check_contents(tree: Path) -> None:
    """Raise PermanentError if `tree` holds a program that an intruder would be glad of, or a set-id bit."""
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree)
        mode = path.lstat().st_mode
        if mode & (stat.S_ISUID | stat.S_ISGID):
            raise PermanentError(f"/{name} in the root is set-id", next_command="prune it in the recipe")
        program = (stat.S_ISREG(mode) and mode & 0o111) or stat.S_ISLNK(mode)
        if program and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in FORBIDDEN):
            raise PermanentError(f"/{name} has no place in a root", next_command="prune it in the recipe")
        if name.parts[:2] == ("usr", "bin") and len(name.parts) == 3 and not path.name.startswith("python3"):
            raise PermanentError(f"/{name}: a root has no program but Python", next_command="prune it in the recipe")


def compile_python(tree: Path, python: str, directories: Iterable[str]) -> None:
    """Precompile, with the image's own interpreter: no stat of sources at start, and the same bytes every time.

    One process, sorted order and a fixed hash seed, because marshalled code depends on all three.
    """
    arguments = ["-q", "-f", "--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", "/"]
    _interpret(tree, python, "-m", "compileall", *arguments, *(str(tree / d) for d in directories))


def run_python(tree: Path, python: str, program: str, *arguments: str) -> None:
    """Run `program` with the interpreter, libraries and modules of `tree` alone. Raises PermanentError."""
    _interpret(tree, python, "-c", program, *arguments)


def _interpret(tree: Path, python: str, *arguments: str) -> None:
    libraries = tree / _LIBRARIES
    environment = {"PYTHONHOME": str(tree / "usr"), "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONPATH": ""}
    binary = tree / f"usr/bin/python{python}"
    loader = str(libraries / "ld-linux-x86-64.so.2")
    run(loader, "--library-path", libraries, binary, "-B", *arguments, cwd=tree, env=environment)


def _merge_usr(tree: Path) -> None:
    """Make /bin, /lib and their like links into /usr, as on any Debian of today."""
    for name in _MERGED:
        old, new = tree / name, tree / "usr" / name
        new.mkdir(parents=True, exist_ok=True)
        if old.is_dir():
            shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(old)
        old.symlink_to(f"usr/{name}")


def _prune(tree: Path, patterns: Iterable[str]) -> None:
    globs = list(patterns)
    for directory, names, files in os.walk(tree, topdown=False):
        for name in files + names:
            path = Path(directory, name)
            relative = str(path.relative_to(tree))
            if any(fnmatch.fnmatchcase(relative, g) for g in globs):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def normalise(tree: Path) -> None:
    """Set modes to 0755 or 0644 and all times to one, whatever the packages and the builder's umask say.

    Set-id bits go with that. mkfs.erofs by itself only lowers later times to the given one.
    """
    for path in [*tree.rglob("*"), tree]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        os.utime(path, (TIMESTAMP, TIMESTAMP), follow_symlinks=False)
