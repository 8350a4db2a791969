"""The peer to compare with: three members of Debian's etcd on loopback, with their data on the same disk.

TLS is off between members and towards clients, and callers talk to the leader: both are generous to etcd.
"""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cloudfit_orchestrator.bench.etcd_client import MAX_VALUE
from cloudfit_orchestrator.bench.group import unhurried
from cloudfit_orchestrator.bench.processes import LOOPBACK, Worker, free_ports
from cloudfit_orchestrator.model.errors import PermanentError, UnknownError

MEMBERS = 3
MAX_PAYLOAD = MAX_VALUE
START_S = 30.0  # an election takes one second
STOP_S = 10.0
CALLERS_PER_CONNECTION = 16
TERMS = "TLS off, callers talk to the leader over plain loopback TCP: both favour etcd"
INSTALL = "apt-get install --no-install-recommends etcd-server"
_POLL_S = 0.1


def binary() -> str:
    """Where etcd is. Raises PermanentError if it is not installed."""
    found = shutil.which("etcd")
    if found is None:
        raise PermanentError("etcd is not installed, and --against etcd measures it", next_command=INSTALL)
    return found


def version() -> str:
    """As etcd says it, e.g. 3.4.23."""
    done = subprocess.run([binary(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0].partition(":")[2].strip()


class Etcd:
    """A serving cluster; a context manager. `members` are (name, pid), `leader` the address that callers talk to."""

    def __init__(self, directory: Path) -> None:
        """`directory` exists and is on a disk. Raises PermanentError if etcd is not installed."""
        self._binary = binary()
        self._directory = directory
        self._root = Path()
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def _start(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="cfbench-etcd", dir=self._directory))
        ports = free_ports(2 * MEMBERS)
        peers = {f"e{i}": f"http://{LOOPBACK}:{ports[i]}" for i in range(MEMBERS)}
        clients = {f"e{i}": f"http://{LOOPBACK}:{ports[MEMBERS + i]}" for i in range(MEMBERS)}
        for name, peer in peers.items():
            command = [
                self._binary, "--name", name, "--data-dir", str(self._root / name), "--log-level", "warn",
                "--logger", "zap",
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--listen-client-urls", clients[name], "--advertise-client-urls", clients[name],
                "--initial-cluster", ",".join(f"{n}={url}" for n, url in peers.items()),
                "--initial-cluster-state", "new", "--initial-cluster-token", self._root.name,
            ]  # fmt: skip
            with (self._root / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self._processes.append((name, process))
        self.members = [(name, process.pid) for name, process in self._processes]
        self.leader = self._wait_for_leader(list(clients.values()))

    def _wait_for_leader(self, urls: list[str]) -> str:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            for name, process in self._processes:
                if process.poll() is not None:
                    said = (self._root / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
                    raise UnknownError(f"etcd member {name} ended with {process.returncode}: {said}")
            statuses = {url: _status(url) for url in urls}
            for url, status in statuses.items():
                leads = status is not None and status.get("leader", "0") == status["header"]["member_id"]
                if leads and None not in statuses.values():
                    return url.removeprefix("http://")
            time.sleep(_POLL_S)
        raise UnknownError(f"etcd has no leader {START_S:.0f} s after its start", next_command="run it again")

    def _tear_down(self) -> None:
        with unhurried():
            for _, process in self._processes:
                process.terminate()
            for _, process in self._processes:
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if self._root.name:
                shutil.rmtree(self._root)

    def generator(self, number: int, callers: int) -> Worker:
        """A load generator for `callers` callers, not waited for."""
        order = {
            "kind": "etcd",
            "address": self.leader,
            "connections": max(1, -(-callers // CALLERS_PER_CONNECTION)),
        }
        log = self._root / "generators.log"
        return Worker(f"etcd load generator {number}", "cloudfit_orchestrator.bench.generator", order, log=log)


def _status(url: str) -> dict[str, Any] | None:
    """Maintenance.Status by the JSON gateway; None if the member does not answer (yet)."""
    request = urllib.request.Request(f"{url}/v3/maintenance/status", data=b"{}")  # noqa: S310  our own loopback
    try:
        with urllib.request.urlopen(request, timeout=1) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
    except (OSError, urllib.error.URLError, ValueError):
        return None
    return found
