"""What the kernel says of this machine and of single processes, and the workers that a measurement starts."""

import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cloudfit_orchestrator.model.errors import BadInputError, UnknownError

LOOPBACK = "127.0.0.1"
STOP_S = 5.0  # a worker has nothing to save: it ends at once, or hangs
MAX_ANSWER = 16 << 20  # bytes of one line of a worker; a histogram takes kilobytes
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def cpu_s(pid: int) -> float:
    """User and system time that all threads of the process have used so far, in seconds, exact to nanoseconds.

    Raises UnknownError if there is no such process.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): the process's CPUCLOCK_SCHED
    except OSError as error:
        raise UnknownError(f"process {pid} has ended", next_command="read what it said last") from error


def busy_s() -> float:
    """CPU time that all of this machine's processes together, and its hypervisor's others (steal), have used so far."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory in MB (10^6 bytes). Raises UnknownError if there is no such process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError as error:
        raise UnknownError(f"process {pid} has ended", next_command="read what it said last") from error
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`, e.g. ext4: of mounts over mounts, the last one."""
    here, best, kind = directory.resolve(), -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():  # proc_pid_mountinfo(5)
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))  # blanks stand there as octal escapes
        if here.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def real_disk(directory: Path) -> str:
    """The file system's type. Raises BadInputError if it keeps its files in memory: an fsync costs nothing there."""
    kind = file_system(directory)
    if kind in IN_MEMORY:
        raise BadInputError(
            f"{directory} is on {kind}, which is no disk: an fsync there costs nothing",
            next_command="name a directory on a disk by --directory",
        )
    return kind


def machine_facts(directory: Path) -> dict[str, Any]:
    """What results depend on and cannot be told from parameters."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6,
        "kernel": platform.release(),
        "file_system": file_system(directory),
        "free_disk_mb": shutil.disk_usage(directory).free // 10**6,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on just now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Worker:
    """A process of this package that takes one JSON object a line and answers with one a line; a context manager.

    It ends when its standard input does, so none outlives who started it.
    """

    def __init__(self, name: str, module: str, first: dict[str, Any], *, log: Path | None = None) -> None:
        """Start `python -m module` and give it `first`. `log`: where its standard error goes; None: to ours."""
        self.name = name
        self._log = log
        with nullcontext() if log is None else log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for who orders the tear-down
            )
        self.pid = self._process.pid
        self._buffer = b""
        self._asking = threading.Lock()
        self.tell(first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def tell(self, order: dict[str, Any]) -> None:
        """Give it one object. Raises UnknownError if it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def ask(self, order: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Give it one object, and return its answer to that one: threads that ask at once wait for each other.

        Raises UnknownError as `tell` and `answer` do.
        """
        with self._asking:
            self.tell(order)
            return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Its next object. Raises UnknownError if it ends or says nothing in time."""
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise UnknownError(f"{self.name} says nothing after {timeout_s:.0f} s")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data or len(self._buffer) > MAX_ANSWER:
                raise self._ended()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> UnknownError:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log else []
        return UnknownError(f"{self.name} has ended; it said: {lines[-1][:300] if lines else 'nothing'}")
