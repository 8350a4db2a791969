"""The process driver: a machine is a local process, its disk a directory. For benchmarks, services and fast tests.

It needs no root and isolates nothing: a process shares kernel, user and files with all others. What it keeps of a
machine with key K in `machines/DEPLOYMENT/`:
    K/owner.json     tags, fingerprint, and pid with start time once it runs; written before the process is started
    K/state/         what would be the state disk
    K/drive/         what would be on the config drive, if there is one
    K/console.log    its output
    K.sock           its channel, bound by the process itself, as QEMU would
    K.O.snapshot/    a snapshot: record.json and a copy of state/
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from cloudfit_orchestrator.clouds.base import (
    Cloud,
    CloudFacts,
    DiskSnapshot,
    Machine,
    MachineSpec,
    MachineState,
    NetworkSpec,
    Orphan,
    OrphanKind,
    Ownership,
    check_name,
)
from cloudfit_orchestrator.model.drive import USER_DATA
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError, TemporaryError
from cloudfit_orchestrator.model.image import Role

ISOLATES_NOTHING = (
    "WARNING: the process driver ISOLATES NOTHING. Replicas are processes of one user on one kernel: whoever takes "
    "over one has them all, and the wormhole with them. For benchmarks and tests only."
)
UNFINISHED = f".{'[0-9a-f]' * 32}.new"  # a file of ours; who wrote it died before it was in its place
MARK = "CLOUDFIT_MACHINE"  # environment variable of every process of ours: its machine's directory
PAIR = "cloudfit_orchestrator.guest.pair"  # replica and agent side by side, where there is a config drive
SIGNAL_TIMEOUT_S = 10.0  # a signal takes effect in milliseconds, unless the process waits for a broken disk
COPY_TIMEOUT_S = 300.0
MAX_SOCKET_PATH = 107
_POLL_S = 0.005
_ENV_END = 48  # in /proc/PID/stat, behind the name (proc(5): field 51)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    start: int  # clock ticks after boot: with the pid it is never reused
    state: str  # letter of /proc/PID/stat


def _process(pid: int) -> _Process | None:
    """The process, unless it is gone or only waits to be reaped. A dead child of ours is reaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else _Process(pid, int(fields[19]), fields[0])


def _marked(directory: Path) -> _Process | None:
    """The session leader that carries the machine's mark: one started by somebody who died before noting its pid."""
    wanted = f"{MARK}={directory}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in _environment(entry) and os.getsid(int(entry.name)) == int(entry.name):
                    return _process(int(entry.name))
            except OSError:  # gone, or not ours to read
                continue
    return None


def _environment(entry: Path) -> list[bytes]:
    """Of the process in /proc. One in the middle of execve, whose parent goes on already, has none yet: waited for."""
    deadline = time.monotonic() + SIGNAL_TIMEOUT_S
    while True:
        ends_at = (entry / "stat").read_text().rsplit(")", 1)[1].split()[_ENV_END]
        found = (entry / "environ").read_bytes()
        if found or int(ends_at) or time.monotonic() > deadline:
            return found.split(b"\0")
        (entry / "exe").readlink()  # OSError: a thread of the kernel, or a zombie, has none for ever
        time.sleep(_POLL_S)


def entry_module(spec: MachineSpec) -> str:
    """What the image would execute."""
    if spec.manifest.role is Role.RECOVERY:
        return "cloudfit_orchestrator.guest.exporter"
    return "cloudfit_orchestrator.testing.adversary" if spec.manifest.adversary else "cloudfit_orchestrator.guest"


class ProcessCloud(Cloud):
    """Machines as processes below `home`. `command`: instead of `python -m MODULE`; it gets --channel and --state."""

    driver: ClassVar[str] = "process"
    isolated: ClassVar[bool] = False

    def __init__(self, *, home: Path, command: Sequence[str] | None = None) -> None:
        self._home = home.absolute()
        self._command = command
        self._lock = threading.RLock()  # starting a process takes milliseconds: one at a time will do

    def facts(self) -> CloudFacts:
        return CloudFacts(
            driver=self.driver,
            uri="process:///",
            version=f"Python {sys.version.split()[0]}",
            accelerator="none",
            reason="replicas run as processes",
            isolated=False,
            warning=ISOLATES_NOTHING,
        )

    # Networks: the loopback device serves all; a file says what was promised

    def _network(self, deployment: str, name: str) -> Path:
        return self._root(deployment) / f"{check_name('network', name)}.network"

    def ensure_network(self, deployment: str, network: NetworkSpec) -> None:
        path, wanted = self._network(deployment, network.name), f"{network.gateway}/{network.prefix}"
        with self._io(f"note the network {network.name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text() != wanted:
                raise RefusedError(f"network {network.name} exists as {path.read_text()}, asked for {wanted}")
            self._write(path, wanted)

    def delete_network(self, deployment: str, name: str) -> None:
        with self._io(f"forget the network {name}"):
            self._network(deployment, name).unlink(missing_ok=True)

    # Machines

    def _root(self, deployment: str) -> Path:
        return self._home / "machines" / check_name("deployment", deployment)

    def _directory(self, owner: Ownership) -> Path:
        return self._root(owner.deployment) / owner.key

    def _channel(self, owner: Ownership) -> Path:
        path = self._root(owner.deployment) / f"{owner.key}.sock"
        if len(str(path).encode()) > MAX_SOCKET_PATH:
            raise PermanentError(
                f"channel socket {path}: over {MAX_SOCKET_PATH} bytes", next_command="use a shorter home"
            )
        return path

    @contextlib.contextmanager
    def _io(self, tried: str) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except OSError as error:
                raise PermanentError(f"{tried}: {error}", next_command=f"df -h {self._home}") from error

    def _write(self, path: Path, text: str) -> None:
        fresh = path.with_name(f".{uuid.uuid4().hex}.new")
        fresh.write_text(text)
        fresh.replace(path)

    def _record(self, path: Path) -> dict[str, Any] | None:
        """An ownership file's content; None if it is absent, cut off, or its tag set is incomplete."""
        try:
            record = json.loads(path.read_text())
            Ownership.from_tags(record["tags"])
        except (OSError, ValueError, KeyError, TypeError, BadInputError):
            return None
        return dict(record)

    def _running(self, record: dict[str, Any], directory: Path) -> _Process | None:
        if "pid" in record:
            found = _process(record["pid"])
            if found is not None and found.start == record["start"]:
                return found
        return _marked(directory)

    def _look(self, owner: Ownership) -> tuple[dict[str, Any], _Process | None] | None:
        directory = self._directory(owner)
        record = self._record(directory / "owner.json")
        if record is None:
            if directory.exists() and any(not path.match(UNFINISHED) for path in directory.iterdir()):
                raise RefusedError(f"directory {directory} does not carry the tags of {owner.name}: not touched")
            return None
        if Ownership.from_tags(record["tags"]).identity != owner.identity:
            raise RefusedError(f"directory {directory} carries the tags of another machine than {owner.name}")
        return record, self._running(record, directory)

    def _machine(self, record: dict[str, Any], process: _Process | None) -> Machine:
        owner = Ownership.from_tags(record["tags"])
        directory, channel = self._directory(owner), self._channel(owner)
        state = MachineState.STOPPED
        if process is not None:
            state = MachineState.PAUSED if process.state in "Tt" else MachineState.RUNNING
        return Machine(
            id=f"{process.pid}.{process.start}" if process is not None else owner.key,
            owner=owner,
            state=state,
            channel=channel,
            console=directory / "console.log",
            state_disk=directory / "state",
            reference={"driver": "process", "pid": process.pid if process is not None else 0, "socket": str(channel)},
        )

    def _require(self, owner: Ownership) -> tuple[dict[str, Any], _Process | None]:
        found = self._look(owner)
        if found is None:
            raise PermanentError(
                f"machine {owner.name} does not exist in {self._home}", next_command="cloudfit group show"
            )
        return found

    def create(self, spec: MachineSpec) -> Machine:
        owner, directory = spec.owner, self._directory(spec.owner)
        with self._io(f"create the machine {owner.name}"):
            found = self._look(owner)
            if found is None:
                directory.mkdir(parents=True, exist_ok=True)
                for cut_off in directory.glob(UNFINISHED):
                    cut_off.unlink()
                module = [sys.executable, "-m", entry_module(spec)]
                if spec.drive is not None:
                    file = self._write_drive(directory, spec.drive)
                    module = [sys.executable, "-m", PAIR, entry_module(spec), "--drive", str(file)]
                record = {
                    "tags": owner.tags(),
                    "fingerprint": spec.fingerprint,
                    "command": list(self._command or module),
                    "attach": spec.attach.id if spec.attach is not None else None,
                }
                self._write(directory / "owner.json", json.dumps(record))
            else:
                record = found[0]
                if record["fingerprint"] != spec.fingerprint:
                    raise RefusedError(
                        f"machine {owner.name} exists with another specification", next_command="destroy it"
                    )
            if not (directory / "state").exists():
                self._copy(spec.attach.path if spec.attach is not None else None, directory / "state")
            return self._start(owner)

    def _write_drive(self, directory: Path, data: bytes) -> Path:
        path = directory / "drive" / USER_DATA
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.write_bytes(data)
        return path

    def _start(self, owner: Ownership) -> Machine:
        record, process = self._require(owner)
        directory, channel = self._directory(owner), self._channel(owner)
        if process is None:
            channel.unlink(missing_ok=True)  # of the process before; bind would find it in its way
            command = [*record["command"], "--channel", str(channel), "--state", str(directory / "state")]
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            pid = os.posix_spawn(
                command[0],
                command,
                {**os.environ, MARK: str(directory)},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(directory / "console.log"), flags, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
            )
            process = _process(pid)
            if process is not None:
                record = {**record, "pid": pid, "start": process.start}
                self._write(directory / "owner.json", json.dumps(record))
        return self._machine(record, process)

    def find(self, owner: Ownership) -> Machine | None:
        with self._io(f"look up the machine {owner.name}"):
            found = self._look(owner)
            return None if found is None else self._machine(*found)

    def machines(self, deployment: str) -> Sequence[Machine]:
        with self._io(f"list the machines of {deployment}"):
            found = []
            for path in self._root(deployment).glob("*/owner.json"):
                record = self._record(path)
                if record is not None and Ownership.from_tags(record["tags"]).key == path.parent.name:
                    found.append(self._machine(record, self._running(record, path.parent)))
            return sorted(found, key=lambda m: m.owner.name)

    def start(self, machine: Machine) -> Machine:
        with self._io(f"start the machine {machine.owner.name}"):
            return self._start(machine.owner)

    def pause(self, machine: Machine) -> Machine:
        return self._signal(machine.owner, signal.SIGSTOP, MachineState.PAUSED)

    def resume(self, machine: Machine) -> Machine:
        return self._signal(machine.owner, signal.SIGCONT, MachineState.RUNNING)

    def _signal(self, owner: Ownership, number: signal.Signals, wanted: MachineState) -> Machine:
        """Send it to the whole process group and wait until the machine is in the state `wanted`."""
        with self._io(f"send {number.name} to {owner.name}"):
            deadline = time.monotonic() + SIGNAL_TIMEOUT_S
            sent = False
            while True:
                record, process = self._require(owner)
                machine = self._machine(record, process)
                if machine.state is wanted:
                    return machine
                if process is None:
                    raise PermanentError(f"machine {owner.name} does not run", next_command="start it")
                if not sent:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    sent = True
                if time.monotonic() > deadline:
                    raise TemporaryError(
                        f"{number.name} to {owner.name}: still {machine.state} after {SIGNAL_TIMEOUT_S} s"
                    )
                time.sleep(_POLL_S)

    def stop(self, machine: Machine) -> Machine:
        return self._signal(machine.owner, signal.SIGKILL, MachineState.STOPPED)

    def destroy(self, machine: Machine) -> None:
        self._destroy(machine.owner)

    def _destroy(self, owner: Ownership) -> None:
        with self._io(f"destroy the machine {owner.name}"):
            directory = self._directory(owner)
            if self._look(owner) is not None:
                self._signal(owner, signal.SIGKILL, MachineState.STOPPED)
                for path in directory.iterdir():
                    if path.name != "owner.json":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._channel(owner).unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=not directory.exists())

    # Disks

    def _copy(self, source: Path | None, target: Path) -> None:
        """A whole copy of the directory, sharing blocks where the file system can; an empty one without `source`."""
        fresh = target.with_name(f".{uuid.uuid4().hex}.new")
        if source is None:
            fresh.mkdir()
        else:
            done = subprocess.run(
                ["cp", "-a", "--reflink=auto", str(source), str(fresh)],
                capture_output=True, text=True, check=False, timeout=COPY_TIMEOUT_S,
            )  # fmt: skip
            if done.returncode != 0:
                shutil.rmtree(fresh, ignore_errors=True)
                raise PermanentError(f"copy {source} to {target}: {done.stderr.strip()[-300:]}", next_command="df -h")
        fresh.replace(target)

    def _taken(self, owner: Ownership, operation: str) -> Path:
        short = hashlib.sha256(operation.encode()).hexdigest()[:8]
        return self._root(owner.deployment) / f"{owner.key}.{short}.snapshot"

    def _snapshot(self, directory: Path) -> DiskSnapshot | None:
        record = self._record(directory / "record.json")
        if record is None:
            return None
        owner = Ownership.from_tags(record["tags"])
        name = directory.name.removesuffix(".snapshot")
        return DiskSnapshot(name, owner, record["operation"], directory / "state", "directory", record["taken_at"])

    def snapshot(self, machine: Machine, operation: str) -> DiskSnapshot:
        owner, target = machine.owner, self._taken(machine.owner, operation)
        with self._io(f"snapshot the state of {owner.name}"):
            record, process = self._require(owner)
            taken = self._snapshot(target)
            if taken is not None:
                return taken
            if self._machine(record, process).state is MachineState.RUNNING:
                raise PermanentError(f"machine {owner.name} is running: its state changes", next_command="pause it")
            target.mkdir(exist_ok=True)
            shutil.rmtree(target / "state", ignore_errors=True)  # a copy without a record is half of one
            self._copy(self._directory(owner) / "state", target / "state")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            note = {"tags": owner.tags(), "operation": operation, "taken_at": now}
            self._write(target / "record.json", json.dumps(note))
            taken = self._snapshot(target)
            assert taken is not None
            return taken

    def snapshots(self, deployment: str) -> Sequence[DiskSnapshot]:
        with self._io(f"list the snapshots of {deployment}"):
            found = (self._snapshot(p) for p in self._root(deployment).glob("*.snapshot"))
            return sorted((s for s in found if s is not None), key=lambda s: (s.owner.name, s.taken_at, s.id))

    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        target = self._taken(snapshot.owner, snapshot.operation)
        with self._io(f"delete the snapshot {snapshot.id}"):
            if not target.exists():
                return
            found = self._snapshot(target)
            if found is None or found.owner.identity != snapshot.owner.identity:
                raise RefusedError(f"snapshot directory {target} does not carry the tags of {snapshot.owner.name}")
            shutil.rmtree(target / "state")
            shutil.rmtree(target)

    def attach(self, machine: Machine, snapshot: DiskSnapshot) -> Machine:
        owner, state = machine.owner, self._directory(machine.owner) / "state"
        with self._io(f"attach the snapshot {snapshot.id} to {owner.name}"):
            record, process = self._require(owner)
            if record.get("attach") == snapshot.id:
                return self._machine(record, process)
            if process is None:
                raise PermanentError(f"machine {owner.name} does not run", next_command="start it")
            if record.get("attach") is not None or any(state.iterdir()):
                raise RefusedError(f"machine {owner.name} has a state already: {state}")
            if self._snapshot(self._taken(snapshot.owner, snapshot.operation)) is None:
                raise PermanentError(f"snapshot {snapshot.id} does not exist")
            self._copy(snapshot.path, state)  # takes the empty directory's place at once
            record = {**record, "attach": snapshot.id}
            self._write(self._directory(owner) / "owner.json", json.dumps(record))
            return self._machine(record, process)

    # Orphans

    def orphans(
        self,
        deployment: str,
        known: Collection[Ownership],
        *,
        evidence: Collection[Ownership] = (),
        networks: Collection[str] = (),
    ) -> Sequence[Orphan]:
        expected, kept = {o.identity for o in known}, {o.identity for o in evidence}
        found = [
            Orphan(OrphanKind.MACHINE, m.id, m.owner.name, m.owner)
            for m in self.machines(deployment)
            if m.owner.identity not in expected
        ]
        found += [
            Orphan(OrphanKind.SNAPSHOT, s.id, s.owner.name, s.owner)
            for s in self.snapshots(deployment)
            if s.owner.identity not in kept
        ]
        promised = sorted(p.stem for p in self._root(deployment).glob("*.network"))
        found += [Orphan(OrphanKind.NETWORK, n, n, None) for n in promised if n not in networks]
        return found

    def sweep(self, deployment: str, orphans: Sequence[Orphan]) -> None:
        for orphan in orphans:
            if orphan.kind is OrphanKind.NETWORK:
                self.delete_network(deployment, orphan.name)
            elif orphan.owner is None or orphan.owner.deployment != deployment:
                raise RefusedError(f"{orphan.kind} {orphan.name} does not carry the tags of {deployment}: not touched")
            elif orphan.kind is OrphanKind.SNAPSHOT:
                for snapshot in self.snapshots(deployment):
                    if snapshot.id == orphan.id:
                        self.delete_snapshot(snapshot)
            else:
                self._destroy(orphan.owner)

    def close(self) -> None:
        """Nothing is held; machines go on."""
