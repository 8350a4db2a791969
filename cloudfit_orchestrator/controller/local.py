"""The real world behind `ports`: drivers by name, agents of this host as detached processes, others through SSH."""

import ipaddress
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit

import paramiko

from cloudfit_orchestrator.clouds.base import Cloud
from cloudfit_orchestrator.clouds.registry import driver
from cloudfit_orchestrator.config_store.base import ConfigStore
from cloudfit_orchestrator.config_store.sqlite import SqliteConfigStore
from cloudfit_orchestrator.controller.agents import AgentClient, StreamlocalTransport
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.inside import InsideAgents
from cloudfit_orchestrator.controller.journal import Journal
from cloudfit_orchestrator.controller.ports import Agent, Context, Image, Progress
from cloudfit_orchestrator.controller.secrets import GuestSecrets
from cloudfit_orchestrator.launcher.sil import find_image, verify_image
from cloudfit_orchestrator.model.envelope import MAX_ENVELOPE_BYTES
from cloudfit_orchestrator.model.errors import BadError, PermanentError, TemporaryError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Role, manifest_digest
from cloudfit_orchestrator.model.record import ConfigRecord, Status, open_record
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.spec import CloudSpec, Trust

AGENT_START_S = 20.0  # Python with cryptography starts in under one second on an idle machine
AGENT_STOP_S = 10.0
NO_IMAGE = "sha256:" + "0" * 64  # what an agent measures of a process: nothing
_POLL_S = 0.05
_ROUTES = Path("/proc/net/route")


class LocalSites:
    """`ports.Sites` over the drivers' registry and real agents."""

    def __init__(self, home: Home, journal: Journal, store: ConfigStore, secrets: GuestSecrets | None) -> None:
        self._home = home
        self._journal = journal
        self._store = store
        self._secrets = secrets
        self._inside: dict[str, InsideAgents] = {}
        self._lock = RLock()
        self._clouds: dict[tuple[object, ...], Cloud] = {}
        self._agents: dict[str, AgentClient] = {}
        self._ssh: list[paramiko.SSHClient] = []

    def cloud(self, spec: CloudSpec) -> Cloud:
        """See `Sites`. Clouds on one hypervisor share a connection."""
        key = (spec.driver, spec.uri, spec.openstack)
        with self._lock:
            if key not in self._clouds:
                more: dict[str, Any] = {"uri": spec.uri} if spec.driver == "libvirt" else {}
                more |= {"place": spec.openstack} if spec.openstack else {}
                self._clouds[key] = driver(spec.driver)(home=self._home.root, **more)
            return self._clouds[key]

    def agent(self, spec: CloudSpec, *, start: bool) -> Agent:
        """See `Sites`. Agents inside guests are always there: whether one of them answers is another question."""
        with self._lock:
            if spec.trust is Trust.NONE:
                assert self._secrets is not None
                if spec.name not in self._inside:
                    self._inside[spec.name] = InsideAgents(
                        spec.name, self._journal.machines, self._secrets, self._newest_records
                    )
                return self._inside[spec.name]
            client = self._agents.get(spec.name)
            if client is None:
                client = self._dial(spec)
                self._agents[spec.name] = client
        if spec.local and not spec.agent_socket and start:
            start_agent(self._home, spec.name, client)
        check_key(spec, client.status())  # one that does not answer is unknown here and now, not at some later call
        return client

    def _newest_records(self, group: str) -> list[tuple[ConfigRecord, bytes]]:
        trusted = [public_bytes(self._home.controller_key())]
        found = [(open_record(e.envelope, trusted), e.envelope) for e in self._store.log(group)]
        active = [pair for pair in found if pair[0].status is Status.ACTIVE][-1:]
        c = active[0][0].c if active else 0
        prepared = [pair for pair in found if pair[0].status is Status.PREPARED and pair[0].c > c][-1:]
        return active + prepared

    def _dial(self, spec: CloudSpec) -> AgentClient:
        if spec.local:
            return AgentClient.unix(Path(spec.agent_socket or self._home.agent_dir(spec.name) / "agent.sock"))
        where = urlsplit(spec.uri)
        ssh = paramiko.SSHClient()
        ssh.load_system_host_keys()
        ssh.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            ssh.connect(where.hostname or "", where.port or 22, where.username, transport_factory=StreamlocalTransport)
        except (OSError, paramiko.SSHException) as error:
            raise TemporaryError(
                f"cloud {spec.name}: no SSH connection to {where.hostname}: {error}",
                next_command=f"ssh {where.hostname}, and accept its host key",
            ) from error
        self._ssh.append(ssh)
        return AgentClient.ssh(ssh, spec.agent_socket)

    def stop_agent(self, spec: CloudSpec) -> None:
        """See `Sites`."""
        if spec.trust is Trust.NONE:
            return
        with self._lock:
            client = self._agents.pop(spec.name, None)
        if client is not None:
            client.close()
        if spec.local and not spec.agent_socket:
            stop_agent(self._home, spec.name)

    def taken_networks(self, spec: CloudSpec) -> list[str]:
        """See `Sites`: routes of this host; of a remote one nothing is known, its driver refuses what is in use."""
        return routed_networks() if spec.local else []

    def close(self) -> None:
        """Let go of all connections; machines and agents go on."""
        for client in self._agents.values():
            client.close()
        for inside in self._inside.values():
            inside.close()
        for ssh in self._ssh:
            ssh.close()
        for cloud in self._clouds.values():
            cloud.close()


def check_key(spec: CloudSpec, status: dict[str, Any]) -> None:
    """Raise BadError if an agent's `status` names another key than the one that the spec says is enrolled."""
    if spec.agent_key and status.get("key") != spec.agent_key:
        raise BadError(
            f"cloud {spec.name}: the agent that answers has the key {status.get('key')!s:.64}, "
            f"and {spec.agent_key} is enrolled",
            next_command="find out who answers there; if its host was installed anew, enrol it, key and all",
        )


def routed_networks(table: Path = _ROUTES) -> list[str]:
    """CIDRs that this host has routes to, but the default route."""
    found = []
    for line in table.read_text().splitlines()[1:]:
        fields = line.split()
        address, mask = (socket.inet_ntoa(struct.pack("<L", int(fields[i], 16))) for i in (1, 7))
        if mask != "0.0.0.0":  # noqa: S104  a netmask
            found.append(str(ipaddress.IPv4Network(f"{address}/{mask}", strict=False)))
    return found


def agent_command(home: Home, name: str) -> list[str]:
    """How the agent of a local cloud is started."""
    place = home.agent_dir(name)
    return [
        sys.executable, "-m", "cloudfit_orchestrator.wormhole.main",
        "--name", name,
        "--socket", str(place / "agent.sock"),
        "--identity", str(place / "identity.key"),
        "--controller-key", str(home.public_file("controller")),
        "--image-key", str(home.public_file("image")),
        "--log", str(place / "agent.log"),
    ]  # fmt: skip


def start_agent(home: Home, name: str, client: AgentClient) -> None:
    """Start the agent unless it answers; it goes on without us. Raises PermanentError if it does not come up."""
    if _answers(client):
        return
    place = home.agent_dir(name)
    with home.lock(f"agent-{name}", wait=True):
        if _answers(client):
            return
        place.mkdir(exist_ok=True, mode=0o700)
        with (place / "agent.err").open("wb") as errors:
            process = subprocess.Popen(
                agent_command(home, name),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        (place / "agent.pid").write_text(f"{process.pid} {_started(process.pid)}\n")

        def failed() -> bool:
            return process.poll() is not None

        if not _until(lambda: _answers(client) or failed(), AGENT_START_S) or failed():
            said = (place / "agent.err").read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise PermanentError(
                f"agent of {name} does not answer {AGENT_START_S:.0f} s after its start; it said: {said[0]}",
                next_command=f"see {place / 'agent.log'}",
            )


def stop_agent(home: Home, name: str) -> None:
    """End the agent that this home started; one that is gone is no error."""
    place = home.agent_dir(name)
    pid_file = place / "agent.pid"
    try:
        pid, started = pid_file.read_text().split()
    except (OSError, ValueError):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _started(int(pid)) != started:  # gone, or the pid is another process's now
            break
        os.kill(int(pid), number)
        _until(lambda: _reap(int(pid)) or _started(int(pid)) != started, AGENT_STOP_S)
    pid_file.unlink(missing_ok=True)
    (place / "agent.sock").unlink(missing_ok=True)


def agent_pid(home: Home, name: str) -> int | None:
    """The process id of the agent that this home started, if it lives."""
    try:
        pid, started = (home.agent_dir(name) / "agent.pid").read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if _started(int(pid)) == started else None


def _reap(pid: int) -> bool:
    """Collect the process if it is a child of ours that has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def _started(pid: int) -> str:
    """When the process started, in clock ticks since boot; empty if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _answers(client: AgentClient) -> bool:
    try:
        client.status()
    except UnknownError:
        return False
    return True


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)  # the condition is another process's and cannot be waited for
    return True


class StoreImages:
    """`ports.Images` over the image store and the SIL; each image is verified once in a process."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = RLock()
        self._verified: dict[tuple[str, bool], Image] = {}

    def verified(self, reference: str, driver: str, *, allow_adversary: bool) -> Image:
        """See `Images`. A process has no image: what it runs is this installation, and nothing of it is measured."""
        if driver == "process":
            return _process_image(self._home, reference)
        with self._lock:
            key = (reference, allow_adversary)
            if key not in self._verified:
                directory = find_image(self._home.images, reference)
                trusted = [public_bytes(self._home.image_key())]
                manifest = verify_image(directory, trusted, allow_adversary=allow_adversary)
                with (directory / "manifest.json").open("rb") as file:
                    envelope = file.read(MAX_ENVELOPE_BYTES)
                self._verified[key] = Image(manifest_digest(envelope), envelope, manifest, directory)
            return self._verified[key]


def _process_image(home: Home, reference: str) -> Image:
    name = reference.partition("@")[0]
    role = Role.RECOVERY if name == "recovery" else Role.REPLICA
    manifest = Manifest(name, role, name == "adversary", "", "", (), (), "process")
    return Image(NO_IMAGE, b"", manifest, home.images)


def open_context(home: Home, report: Callable[[Progress], None]) -> Context:
    """A controller process on `home`."""
    key = home.controller_key()
    journal, store = Journal(home.journal), SqliteConfigStore(home.config, [public_bytes(key)])
    secrets = GuestSecrets(home.guest_secret(), journal.deployment)
    return Context(
        journal=journal,
        store=store,
        sites=LocalSites(home, journal, store, secrets),
        images=StoreImages(home),
        key=key,
        clients=(home.client().public,),
        report=report,
        secrets=secrets,
    )


def agents_of_home(home: Home) -> list[dict[str, Any]]:
    """What each local agent of this home says of itself; `running` False where none answers."""
    found = []
    for place in sorted(p for p in (home.root / "agents").iterdir() if p.is_dir()):
        with AgentClient.unix(place / "agent.sock") as client:
            try:
                status = client.status()
            except UnknownError as error:
                found.append({"cloud": place.name, "running": False, "reason": error.fact})
                continue
        found.append({"cloud": place.name, "running": True, "pid": agent_pid(home, place.name), **status})
    return found
