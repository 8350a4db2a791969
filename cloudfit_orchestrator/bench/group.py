"""A group of its own for a measurement: real processes, TCP, TLS and agent, in a temporary home on a real disk.

Replicas are local processes of the process driver that run `bench.replica`. Everything is gone when the block ends,
also by Ctrl-C.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cloudfit_orchestrator.bench.generator import group_order
from cloudfit_orchestrator.bench.processes import Worker
from cloudfit_orchestrator.clouds.base import Cloud, Machine, MachineSpec
from cloudfit_orchestrator.clouds.process import ProcessCloud
from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import LocalSites, StoreImages, agent_pid, open_context
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.model.errors import BadInputError, UnknownError
from cloudfit_orchestrator.model.record import WITH_WORMHOLE, Algorithm
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec

NAME = "bench"
CLOUD = "host"
FIGURES_S = 10.0  # a replica says its figures between two batches
CONNECT_S = 30.0
_POLL_S = 0.002

Launching = Callable[[str, str], None]  # (replica, its address), before its process is started


class _Replicas(ProcessCloud):
    """The process driver, with a hook before each start."""

    def __init__(self, *, home: Path, arguments: list[str], launching: Callable[[str], None]) -> None:
        super().__init__(home=home, command=[sys.executable, "-m", "cloudfit_orchestrator.bench.replica", *arguments])
        self._launching = launching

    def create(self, spec: MachineSpec) -> Machine:
        self._launching(spec.owner.replica)
        return super().create(spec)


class _Sites(LocalSites):
    """One cloud, ours."""

    def __init__(self, home: Home, context: Context, replicas: Cloud) -> None:
        super().__init__(home, context.journal, context.store, context.secrets)
        self._replicas = replicas

    def cloud(self, spec: CloudSpec) -> Cloud:
        assert spec.name == CLOUD
        return self._replicas


def spec_of(n: int, algorithm: str) -> GroupSpec:
    """N replicas that tolerate as many faults as n allows. Raises BadInputError."""
    if n < 1:
        raise BadInputError(f"a group of {n} replicas is none", next_command="use -n 3")
    return GroupSpec(
        group=NAME,
        service="kv",
        f=(n - 1) // (2 if algorithm in WITH_WORMHOLE else 3),
        k=0,
        algorithm=Algorithm(algorithm),
        clouds=(CloudSpec(CLOUD, "process"),),
        placement=tuple((f"r{i}", CLOUD) for i in range(n)),
        image="replica",
    )


@dataclass(frozen=True, slots=True)
class Options:
    """What a group is to be. `routes`: see `bench.replica`; clients get theirs in `Group.target`."""

    n: int
    algorithm: str
    clients: int
    routes: dict[str, dict[str, str]] | None = None


class Group:
    """A serving group; a context manager. `replicas` are (name, pid), `agent` is the agent's pid."""

    def __init__(
        self,
        options: Options,
        directory: Path,
        report: Callable[[Progress], None],
        launching: Launching | None = None,
    ) -> None:
        """`directory` exists and is on a disk; the home is made below it. `launching` hears of each replica."""
        self._options = options
        self.spec = spec_of(options.n, options.algorithm)
        self._report = report
        self._launching = launching
        self._directory = directory
        self._root = Path()
        self._read: dict[str, int] = {}

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
        self._root = Path(tempfile.mkdtemp(prefix="cfbench", dir=self._directory))
        try:
            self.home = Home(self._root)
        except BadInputError as error:
            raise BadInputError(error.fact, next_command="name a shorter one by --directory") from error
        arguments: list[str] = []
        if self._options.routes is not None:
            routes = self._root / "routes.json"
            routes.write_text(json.dumps(self._options.routes))
            arguments = ["--routes", str(routes)]
        self._context = open_context(self.home, self._report)
        self._cloud = _Replicas(home=self.home.root, arguments=arguments, launching=self._launch)
        self._context.sites = _Sites(self.home, self._context, self._cloud)
        self._context.images = StoreImages(self.home)
        self._context.clients = tuple(self.home.client(f"load{i}").public for i in range(self._options.clients))
        apply(self._context, self.spec)
        machines = self._cloud.machines(self._context.journal.deployment)
        self.replicas = [(m.owner.replica, int(str(m.reference["pid"]))) for m in machines]
        self._consoles = {m.owner.replica: m.console for m in machines}
        found = agent_pid(self.home, CLOUD)
        assert found is not None
        self.agent = found

    def _launch(self, replica: str) -> None:
        (row,) = [m for m in self._context.journal.machines(NAME) if m.replica == replica]
        if self._launching is not None:
            self._launching(replica, row.address)

    def _tear_down(self) -> None:
        with unhurried():
            context: Context | None = getattr(self, "_context", None)
            if context is not None:
                for _, pid in getattr(self, "replicas", ()):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                context.cancelled.clear()
                destroy(context, NAME)
                assert isinstance(context.sites, LocalSites)
                context.sites.close()
                context.journal.close()
            if self._root.name:
                shutil.rmtree(self._root)

    def target(self, client: int, near: str, routes: dict[str, str]) -> dict[str, Any]:
        """Order for a load generator: as the client of that number, which asks the replica `near` first."""
        envelope = self._context.store.active(NAME)
        assert envelope is not None
        return group_order(self.home, f"load{client}", envelope, self._context.trusted, near=near, routes=routes)

    def generator(self, client: int, near: str, routes: dict[str, str] | None = None) -> Worker:
        """A load generator, not waited for."""
        return Worker(
            f"load generator {client}",
            "cloudfit_orchestrator.bench.generator",
            self.target(client, near, routes or {}),
            log=self._root / "generators.log",
        )

    def figures(self) -> dict[str, dict[str, Any]]:
        """What each replica that runs counted since its start: see `replica.figures`. UnknownError if one is silent."""
        return self._ask(signal.SIGUSR1, "figures")

    def begin_profiles(self) -> None:
        """Of all replicas' event loops."""
        for _, pid in self.replicas:
            os.kill(pid, signal.SIGUSR2)

    def end_profiles(self) -> dict[str, list[dict[str, Any]]]:
        """By replica, as `profiles.top` gives them. UnknownError if one is silent."""
        return {replica: said["top"] for replica, said in self._ask(signal.SIGUSR2, "profile").items()}

    def _ask(self, number: signal.Signals, event: str) -> dict[str, dict[str, Any]]:
        """Signal all replicas and wait for the event that each logs then."""
        said: dict[str, dict[str, Any]] = {}
        for replica, pid in self.replicas:
            self._read[replica] = self._consoles[replica].stat().st_size
            try:
                os.kill(pid, number)
            except ProcessLookupError as error:
                raise UnknownError(f"replica {replica} has ended", next_command=self._last_words(replica)) from error
        deadline_s = time.monotonic() + FIGURES_S
        while len(said) < len(self.replicas):
            for replica, _ in self.replicas:
                found = None if replica in said else self._said(replica, event)
                if found is not None:
                    said[replica] = found
            if time.monotonic() > deadline_s:
                silent = [replica for replica, _ in self.replicas if replica not in said]
                raise UnknownError(f"{', '.join(silent)} log no {event} after {FIGURES_S:.0f} s")
            time.sleep(_POLL_S)
        return said

    def _said(self, replica: str, event: str) -> dict[str, Any] | None:
        with self._consoles[replica].open("rb") as console:
            console.seek(self._read[replica])
            wanted = f'"event": "{event}"'.encode()
            for line in console.read().splitlines(keepends=True):
                if line.endswith(b"\n") and wanted in line:
                    found: dict[str, Any] = json.loads(line)
                    return found
        return None

    def _last_words(self, replica: str) -> str:
        lines = self._consoles[replica].read_text(errors="replace").strip().splitlines()
        return f"it said: {lines[-1][:300] if lines else 'nothing'}"


@contextmanager
def unhurried() -> Iterator[None]:
    """Further Ctrl-C is ignored meanwhile: what is torn down by halves stays for ever."""
    try:
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
