"""House rules that a machine can check. Each is short, and says how to keep it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
PACKAGE = HOME / "cloudfit_orchestrator"
MAX_MODULE_LINES = 500
# A module may be longer if it says here why it is one room and not two.
LONG_MODULES: dict[str, str] = {
    "cloudfit_orchestrator/testing/cloud.py": "a whole cloud in memory that refuses impossible states",
}
# Where one `except Exception` is right: the boundary of a process, a thread or a driver. Module -> why.
BROAD_EXCEPTS: dict[str, str] = {
    "cloudfit_orchestrator/guest/channel.py": "in a callback of the loop: raised in the task that awaits the stream",
    "cloudfit_orchestrator/guest/durable.py": "around what waits for the disk: an error there must stop the replica",
    "cloudfit_orchestrator/guest/machine.py": "the only process: the error goes to the console, init starts again",
    "cloudfit_orchestrator/guest/runtime.py": "around the core: an error there must stop the replica, and be said",
    "cloudfit_orchestrator/testing/simulator.py": "around a run: whatever the core raises is a finding of its seed",
    "cloudfit_orchestrator/wormhole/control.py": "around one order: a bad one must not end all guests' epochs",
    "cloudfit_orchestrator/wormhole/kss.py": "around a DER parser that raises many kinds for hostile keys",
}


def python_files(*roots: str) -> Iterator[Path]:
    for root in roots:
        yield from sorted((HOME / root).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(HOME))


def texts() -> Iterator[Path]:
    yield from (HOME / n for n in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", ".ci/run"))
    for root in ("cloudfit_orchestrator", "docs", "images", "tools", "tests"):
        for path in sorted((HOME / root).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def test_modules_are_small_rooms() -> None:
    long = {
        name_of(path): lines
        for path in python_files("cloudfit_orchestrator")
        if (lines := path.read_text().count("\n")) > MAX_MODULE_LINES
    }
    unexplained = {name: lines for name, lines in long.items() if name not in LONG_MODULES}
    assert not unexplained, f"over {MAX_MODULE_LINES} lines: split them, or say why in LONG_MODULES: {unexplained}"
    assert LONG_MODULES.keys() <= long.keys(), "LONG_MODULES names modules that are short by now"


def sleeps(node: ast.AST, lines: list[str], *, polling: bool = False) -> Iterator[int]:
    """Lines that sleep in place of a condition: not between two looks at one (in a loop), and not saying what for."""
    polling = polling or isinstance(node, ast.While | ast.For | ast.AsyncFor)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {"time.sleep", "sleep", "asyncio.sleep"}:
        explained = "#" in lines[node.lineno - 1] or lines[node.lineno - 2].lstrip().startswith("#")
        if not polling and not explained and ast.unparse(node.args[0]) != "0":
            yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from sleeps(child, lines, polling=polling)


def test_no_test_sleeps() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in python_files("tests")
        for line in sleeps(ast.parse(path.read_text()), path.read_text().splitlines())
    ]
    assert not found, f"wait for the condition, with a deadline, or say what the pause stands for: {found}"


def test_no_test_is_skipped() -> None:
    pattern = re.compile(r"pytest\.skip|mark\.skip|mark\.xfail|importorskip")
    found = [
        f"{name_of(path)}:{i}"
        for path in python_files("tests")
        if path != Path(__file__)
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"a test that cannot run here must fail and say what is missing: {found}"


def test_broad_excepts_are_at_boundaries() -> None:
    found: dict[str, list[int]] = {}
    for path in python_files("cloudfit_orchestrator"):
        for node in ast.walk(ast.parse(path.read_text())):
            broad = isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            )
            if broad and ast.unparse(node.body[-1]) != "raise":  # cleaning up and passing on hides nothing
                found.setdefault(name_of(path), []).append(node.lineno)
    unexplained = {name: lines for name, lines in found.items() if name not in BROAD_EXCEPTS}
    assert not unexplained, f"catch what can be raised, or say in BROAD_EXCEPTS which boundary it is: {unexplained}"


def test_every_module_says_what_it_is() -> None:
    silent = [
        name_of(path)
        for path in python_files("cloudfit_orchestrator")
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not silent, f"no module docstring: {silent}"


# Package indexes and mirrors are the machine's own business (pip's and apt's configuration); paths of the machine on
# which something was written mean nothing elsewhere. Spelled so that this file does not find itself.
NOT_OURS = {
    "a package index or mirror": re.compile(r"pypi[.]org|pythonhosted[.]org|deb[.]debian[.]org|/simple/?['\"\s]"),
    "a path of one developer's machine": re.compile(r"(?<![\w.])/(?:home/\w+|wor[k])/|[.][.]/shar[e]d/"),
    "unfinished work": re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X]|NotImplemented[E]rror)\b"),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_no_file_holds(what: str) -> None:
    found = []
    for path in texts():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name_of(path)}:{i}" for i, line in enumerate(lines, 1) if NOT_OURS[what].search(line)]
    assert not found, f"{what} in: {found}"


def test_debian_packages_each_have_a_name_and_are_listed_once() -> None:
    lines = (HOME / "tools/debian-packages.txt").read_text().splitlines()
    names = [name for line in lines if (name := line.split("#")[0].strip())]
    assert names
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in names)
