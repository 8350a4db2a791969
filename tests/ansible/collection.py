"""The collection as a user gets it: built, installed into a directory of its own, and the environment that finds it."""

import base64
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SOURCE = PROJECT / "ansible"
PROGRAMS = Path(sys.executable).parent
MISSING = "is not installed; run: make test-ansible, or pip install -e '.[ansible]'"


def program(name: str) -> str:
    """The path of one of Ansible's programs, beside this Python."""
    path = PROGRAMS / name
    assert path.exists(), f"{name} {MISSING}"
    return str(path)


def environment(work: Path) -> dict[str, str]:
    """For Ansible's programs: nothing of the user's settings, everything below `work`."""
    return {
        "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(work),
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_HOME": str(work / "ansible"),
        "ANSIBLE_COLLECTIONS_PATH": str(work / "collections"),
        "ANSIBLE_LOCALHOST_WARNING": "False",
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
    } | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def install(work: Path) -> None:
    """Build the collection and install it below `work`."""
    env = environment(work)
    galaxy = [program("ansible-galaxy"), "collection"]
    subprocess.run([*galaxy, "build", "--output-path", work, SOURCE], env=env, check=True, capture_output=True)
    (archive,) = work.glob("cloudfit-orchestrator-*.tar.gz")
    subprocess.run(
        [*galaxy, "install", "--offline", "-p", work / "collections", archive],
        env=env, check=True, capture_output=True, cwd=work,
    )  # fmt: skip


def build_wheel(work: Path) -> Path:
    """The project's wheel."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", work]
    subprocess.run([*pip, PROJECT], check=True)
    (wheel,) = work.glob("cloudfit_orchestrator-*.whl")
    return wheel


def fetch_wheels(into: Path, *requirements: str) -> None:
    """Wheels of what the agent imports, for a target that reaches no index: of Debian 12's Python."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version=3.11"]
    subprocess.run([*pip, "--dest", into, *requirements], check=True)


def raw_key(path: Path) -> bytes:
    """A public key as the agent and `cloudfit` keep them: raw, in base64."""
    return base64.b64decode(path.read_bytes(), validate=False)
