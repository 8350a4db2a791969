"""Debian packages and Python wheels, by content: fetched once, kept under their SHA-256, extracted, never installed.

Which sources and keys to trust is the machine's own apt configuration; only what apt knows to come from Debian's
release of the recipe is considered, so that no third-party repository reaches an image.
"""

import email
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.launcher.measure import file_digest
from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})$")


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """A resolved artefact: a .deb or a wheel."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}={self.version}"


class Apt:
    """apt restricted to Debian's `release`, on the machine's package lists, with a state of its own in `work`."""

    def __init__(self, release: str, work: Path) -> None:
        """`work` is an empty directory. Raises PermanentError if the machine has no lists of that release."""
        targets = run(
            "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CODENAME)",
            "Created-By: Packages", "Origin: Debian",
        )  # fmt: skip
        sources = [line.split() for line in targets.splitlines()]
        lines = {
            f"deb {uri} {suite} {component}\n"
            for uri, suite, component, codename in (s for s in sources if len(s) == 4)
            if codename.partition("-")[0] == release
        }
        if not lines:
            raise PermanentError(
                f"apt knows no packages of Debian {release} on this machine", next_command="apt-get update"
            )
        (work / "sources.list").write_text("".join(sorted(lines)))
        (work / "status").touch()
        (work / "partial").mkdir()
        self._work = work
        self._options = [
            f"-oDir::Etc::sourcelist={work / 'sources.list'}",
            "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferences=/dev/null",
            "-oDir::Etc::preferencesparts=/dev/null",
            f"-oDir::State::status={work / 'status'}",
            f"-oDir::Cache::pkgcache={work / 'pkgcache.bin'}",
            f"-oDir::Cache::srcpkgcache={work / 'srcpkgcache.bin'}",
            "-oAPT::Architecture=amd64",
            "-oAPT::Sandbox::User=",
        ]

    def resolve(self, names: Iterable[str]) -> list[Package]:
        """The newest version of each package of `names`, sorted by name."""
        wanted = sorted(set(names))
        found = {p.name: p for p, _ in self._show(wanted)}
        missing = [n for n in wanted if n not in found]
        if missing:
            raise PermanentError(f"apt has no package {', '.join(missing)}", next_command="apt-get update")
        return [found[n] for n in wanted]

    def depends_on(self, name: str) -> str:
        """The first dependency of the metapackage `name`."""
        for _, depends in self._show([name]):
            return depends.split()[0]
        raise PermanentError(f"apt has no package {name}", next_command="apt-get update")

    def _show(self, names: Sequence[str]) -> list[tuple[Package, str]]:
        text = run("apt-cache", *self._options, "show", "--no-all-versions", *names)
        stanzas = [email.message_from_string(stanza) for stanza in text.split("\n\n") if stanza.strip()]
        return [(Package(s["Package"], s["Version"], s["SHA256"]), s.get("Depends", "")) for s in stanzas]

    def fetch(self, packages: Iterable[Package], cache: Path, progress: Callable[[str], None]) -> None:
        """Have the .deb of every package in `cache` as `<sha256>.deb`; apt checks origin and hash of each download."""
        missing = [p for p in packages if not _cached(cache, p, ".deb")]
        if not missing:
            return
        progress(f"downloading {len(missing)} Debian packages")
        target = self._work / "download"
        target.mkdir(exist_ok=True)
        run("apt-get", *self._options, "-q", "download", *(f"{p.name}={p.version}" for p in missing), cwd=target)
        _adopt(target, cache, missing, ".deb")


def fetch_wheels(
    requirements: Iterable[str],
    *,
    python: str,
    platforms: Iterable[str],
    cache: Path,
    work: Path,
    progress: Callable[[str], None],
) -> list[Package]:
    """Have every pinned wheel in `cache` as `<sha256>.whl`. pip refuses what does not match its hash."""
    wheels = []
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match is None:
            raise BadInputError(f"wheel {requirement!r} is not of the form NAME==VERSION --hash=sha256:HEX")
        wheels.append(Package(**match.groupdict()))
    missing = [w for w in wheels if not _cached(cache, w, ".whl")]
    if missing:
        progress(f"downloading {len(missing)} Python wheels")
        target = work / "wheels"
        pinned = work / "requirements.txt"
        pinned.write_text("".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in missing))
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "--only-binary=:all:",
            "--implementation=cp", f"--python-version={python}", f"--abi=cp{python.replace('.', '')}", "--abi=abi3",
            *(f"--platform={p}" for p in platforms), "-d", target, "-r", pinned,
        )  # fmt: skip
        _adopt(target, cache, missing, ".whl")
    return sorted(wheels)


def extract_deb(package: Package, cache: Path, into: Path) -> None:
    """Lay the files of a fetched .deb into the directory `into`, as the calling user."""
    run("dpkg-deb", "--extract", cache / f"{package.sha256}.deb", into)


def extract_wheel(package: Package, cache: Path, into: Path) -> None:
    """Lay the files of a fetched wheel into the directory `into` (a site directory)."""
    with zipfile.ZipFile(cache / f"{package.sha256}.whl") as archive:
        archive.extractall(into)  # zipfile drops absolute paths and `..`; the content is pinned


def _cached(cache: Path, package: Package, suffix: str) -> bool:
    path = cache / (package.sha256 + suffix)
    return path.is_file() and file_digest(path) == package.sha256


def _adopt(downloads: Path, cache: Path, wanted: Iterable[Package], suffix: str) -> None:
    """Move what was downloaded into the cache under its digest; each wanted package must be among it."""
    got = {file_digest(path): path for path in downloads.glob("*" + suffix)}
    for package in wanted:
        if package.sha256 not in got:
            raise PermanentError(f"the download of {package} has not the hash {package.sha256}")
        got[package.sha256].replace(cache / (package.sha256 + suffix))
