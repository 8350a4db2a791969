"""The lab's processes: started once, found again, stopped with everything that they started themselves.

Every one carries the lab's directory and its service's name in its environment, and so do its children. That finds also
those who left their process group (privsep daemons, dnsmasq). Machines do not carry it, because libvirtd cleans their
environment: they are known by the lab's paths in their command line.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.openstack.lab.console import LabError, last_words, say, wait_until
from tests.openstack.lab.layout import Cloud, Lab

STOP_TIMEOUT_S = 30.0  # RabbitMQ writes its tables
KILL_TIMEOUT_S = 10.0
_LAB, _SERVICE = "CLOUDFIT_LAB", "CLOUDFIT_LAB_SERVICE"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MACHINES = ("qemu-system-", "swtpm", "dnsmasq")  # programs that a lab's path in the arguments makes one of ours
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Service:
    """A process that stays. It is started again when anything here, or the content of a file, has changed."""

    name: str
    command: Sequence[str | Path]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def fingerprint(self) -> str:
        """Changes with everything that the process has read at its start."""
        seen = hashlib.sha256(repr((list(map(str, self.command)), sorted(self.env.items()))).encode())
        for path in self.files:
            seen.update(path.read_bytes())
        return seen.hexdigest()


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started."""

    name: str
    pid: int
    ticks: str  # when, in clock ticks since boot: a pid alone may be another process's by now
    since: float  # when, Unix time
    fingerprint: str

    @property
    def alive(self) -> bool:
        """Whether that very process lives."""
        return start_ticks(self.pid) == self.ticks


def plain(
    lab: Lab,
    cloud: Cloud,
    name: str,
    *files: Path,
    program: str = "",
    env: Mapping[str, str] | None = None,
    plugin: str = "",
) -> Service:
    """A service of OpenStack's that is a program with configuration files; `plugin`: a module of ours that it loads."""
    full = f"{cloud.name}-{name}"
    options = [word for file in files for word in ("--config-file", str(file))]
    command = [program or name, *options, "--log-file", str(lab.log / f"{full}.log")]
    library = lab.home / "lib"
    path = {"PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1"} if plugin else {}
    return Service(full, command, env={**path, **(env or {})}, files=[*files, *([library / plugin] if plugin else [])])


def knowing_keys(lab: Lab, cloud: Cloud, name: str, *files: Path, program: str = "") -> Service:
    """As `plain`, for services that fetch secrets or certificates."""
    env = {"CLOUDFIT_LAB_KEYS": str(cloud.keys)}
    return plain(lab, cloud, name, *files, program=program, env=env, plugin="file_key_manager.py")


def environment(lab: Lab, service: str = "") -> dict[str, str]:
    """What the lab's programs see: nothing of the caller's Python or proxies."""
    return {
        "PATH": f"{lab.bin}:{_SYSTEM_PATH}",
        "HOME": str(lab.home),
        "LC_ALL": "C.UTF-8",
        "PYTHONWARNINGS": "ignore",
        _LAB: str(lab.home),
        _SERVICE: service,
    }


def start(lab: Lab, service: Service) -> None:
    """Have the service running as described; one that runs so already is left alone."""
    running = find(lab, service.name)
    if running and running.alive:
        if running.fingerprint == service.fingerprint():
            return
        say(f"{service.name} has changed: it is started again")
        stop(lab, [running])
    lab.log.mkdir(parents=True, exist_ok=True)
    with (lab.log / f"{service.name}.out").open("ab") as output:
        process = subprocess.Popen(
            list(map(str, service.command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(lab, service.name) | service.env,
            cwd=lab.home,
            start_new_session=True,
        )
    process.returncode = 0  # it outlives this process: nobody waits for it, and subprocess need not complain
    record = Running(service.name, process.pid, start_ticks(process.pid), time.time(), service.fingerprint())
    lab.run.mkdir(parents=True, exist_ok=True)
    (lab.run / f"{service.name}.json").write_text(
        json.dumps({name: getattr(record, name) for name in Running.__slots__}) + "\n"
    )


def find(lab: Lab, name: str) -> Running | None:
    """What was started under this name, alive or not."""
    try:
        return Running(**json.loads((lab.run / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None


def started(lab: Lab) -> list[Running]:
    """All that were started, in that order, alive or not."""
    found = [Running(**json.loads(path.read_text())) for path in lab.run.glob("*.json")]
    return sorted(found, key=lambda r: r.since)


def check_alive(lab: Lab, name: str) -> None:
    """Raise LabError if the service has died."""
    running = find(lab, name)
    if running is None or not running.alive:
        log = lab.log / f"{name}.out"
        raise LabError(f"{name} has died; see {log}{last_words(log)}")


def stop(lab: Lab, services: Sequence[Running]) -> None:
    """Stop them and what they started; at the end none is left."""
    names = {running.name for running in services}
    for number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        for running in services:
            if running.alive:
                os.killpg(running.pid, number)
        if _gone_within(lambda: not any(r.alive for r in services), timeout_s):
            break
    _end(lambda: [pid for pid, name in marked(lab).items() if name in names], lab)
    for running in services:
        (lab.run / f"{running.name}.json").unlink(missing_ok=True)


def stop_strays(lab: Lab) -> None:
    """End whatever else belongs to the lab: of services whose record is lost, machines without their libvirtd."""
    _end(lambda: [*marked(lab), *machines(lab)], lab)


def _end(pids: Callable[[], list[int]], lab: Lab) -> None:
    for number, timeout_s in ((signal.SIGTERM, KILL_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        for pid in pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if _gone_within(lambda: not pids(), timeout_s):
            return
    wait_until(lambda: not pids(), KILL_TIMEOUT_S, f"processes {pids()} end", lab.log)


def _gone_within(gone: Callable[[], bool], timeout_s: float) -> bool:
    try:
        wait_until(gone, timeout_s, "", Path())
    except LabError:
        return False
    return True


def marked(lab: Lab) -> dict[int, str]:
    """Pid -> service, of all live processes that carry this lab's mark; not the caller itself."""
    found = {}
    for pid in _pids():
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        env = dict(part.partition(b"=")[::2] for part in content.split(b"\0"))
        if env.get(_LAB.encode()) == os.fsencode(lab.home) and env.get(_SERVICE.encode()):
            found[pid] = env[_SERVICE.encode()].decode()
    return found


def machines(lab: Lab) -> dict[int, str]:
    """Pid -> program, of guests and their helpers that work on files of the lab."""
    found = {}
    for pid in _pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        program = Path(os.fsdecode(words[0])).name
        if program.startswith(_MACHINES) and any(os.fsencode(lab.home) + b"/" in word for word in words):
            found[pid] = program
    return found


def memory_mib(pids: Sequence[int]) -> float:
    """Proportional set size of the processes: what would be free without them, shared pages shared out."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / _KIB


def start_ticks(pid: int) -> str:
    """When the process started; empty if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _pids() -> Iterator[int]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            yield int(path.name)
