"""Three replicas as real processes, a real agent, real records: the process driver without a controller."""

import asyncio
import base64
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.gateway.client import Client
from cloudfit_orchestrator.gateway.identity import self_signed
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.record import (
    NO_DIGEST,
    Algorithm,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.unit.guest.helpers import until

GROUP = "g"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """`async with Cluster(...) as cluster` starts it; `cluster.client()` is a client that every record admits."""

    def __init__(self, n: int = 3, f: int = 1, *, modules: dict[str, str] | None = None, **parameters) -> None:
        self.n, self.f = n, f
        self.modules = modules or {}
        self.parameters = Parameters(**parameters)
        self.home = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))
        self.controller = Ed25519PrivateKey.generate()
        self.agent = HostAgent(
            "a",
            Ed25519PrivateKey.generate(),
            controller_keys=[public_bytes(self.controller)],
            image_keys=[],
        )
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.client_key = Ed25519PrivateKey.generate()
        self.admitted = self_signed("alice", self.client_key)
        self.ports: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        try:
            for i in range(self.n):
                await self.launch(f"r{i}", i + 1)
            await self.reconfigure(1, None, {f"r{i}": i + 1 for i in range(self.n)})
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_error) -> None:
        await self.agent.stop()
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
        shutil.rmtree(self.home)

    def name(self, replica: str, incarnation: int) -> str:
        return f"{replica}-{incarnation}"

    async def start(self, replica: str, incarnation: int, *, role: str = "replica", state: str | None = None) -> int:
        """A process; again after it died: from its own state directory."""
        name = self.name(replica, incarnation)
        module = self.modules.get(replica, "cloudfit_orchestrator.guest")
        if role == "recovery":
            module = "cloudfit_orchestrator.guest.exporter"
        out = (self.home / f"{name}.log").open("ab")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, "--channel", str(self.home / f"{name}.ch"),
            "--state", str(self.home / (state or f"{name}.state")), stdout=out, stderr=out,
        )  # fmt: skip
        out.close()
        self.processes[name] = process
        await until((self.home / f"{name}.ch").exists, 20)
        return process.pid

    async def launch(
        self, replica: str, incarnation: int, *, role: Role = Role.REPLICA, state: str | None = None, **options
    ) -> None:
        """Start and admit a new incarnation."""
        pid = await self.start(replica, incarnation, role=role.value, state=state)
        port = self.ports[self.name(replica, incarnation)] = free_port()
        options = {
            "service": "kv",
            "controller_keys": [base64.b64encode(public_bytes(self.controller)).decode()],
            **options,
        }
        welcome = {"network": {"address": "127.0.0.1"}, "port": port, "options": options}
        socket_path = str(self.home / f"{self.name(replica, incarnation)}.ch")
        await self.agent.admit(
            Admission(
                Identity(GROUP, replica, incarnation),
                role,
                MachineRef("process", pid=pid, socket=socket_path),
                b"",
                allow_adversary=True,
                lease_s=3600,
                welcome=welcome,
            )
        )

    def peer(self, replica: str, incarnation: int) -> dict:
        guest = self.agent.table.get(Identity(GROUP, replica, incarnation))
        port = self.ports[self.name(replica, incarnation)]
        return {
            "peer_id": f"{replica}#{incarnation}",
            "address": f"127.0.0.1:{port}",
            "channel_ca": base64.b64encode(guest.ca.certificate).decode(),
        }

    async def reconfigure(self, c: int, base: int | None, members: dict[str, int]) -> None:
        """PREPARED, confirmations, ACTIVE."""
        made = []
        for replica, incarnation in members.items():
            identity = Identity(GROUP, replica, incarnation)
            epoch = self.agent.table.prepare(identity, c)
            guest = self.agent.table.get(identity)
            address = f"127.0.0.1:{self.ports[self.name(replica, incarnation)]}"
            made.append(
                Member(
                    replica, incarnation, "local", address, epoch.usig_key, epoch.kss_key, guest.ca.certificate, "", ""
                )
            )
        record = ConfigRecord(
            GROUP, c, base, tuple(made), (self.admitted,), "kv", self.f, 0, Algorithm.EBAWA, self.parameters, NO_DIGEST
        )
        prepared = seal_record(record, self.controller)
        self.agent.install(GROUP, prepared)
        votes: dict[tuple[int, bytes], dict[str, bytes]] = {}

        def enough():
            for replica, body in self.topic("confirm"):
                if body["c"] == c:
                    key = (body["h"], base64.b64decode(body["digest"]))
                    votes.setdefault(key, {})[replica] = base64.b64decode(body["signature"])
            return [key for key, given in votes.items() if len(given) >= record.confirmations_needed]

        await until(enough, 30)
        h, digest = enough()[0]
        confirmations = [Confirmation(r, s) for r, s in votes[h, digest].items()]
        active = record.activated(
            prepared=record_hash(prepared),
            previous=record_hash(prepared),
            h=h,
            digest=digest,
            confirmations=confirmations,
        )
        self.envelope = seal_record(active, self.controller)
        self.agent.install(GROUP, self.envelope)
        self.record = active

    def topic(self, topic: str) -> list[tuple[str, dict]]:
        """(replica, body) of all reports of a topic."""
        rings = self.agent.reports._rings
        return [(who.replica, r.body) for who, ring in list(rings.items()) for r in ring.items if r.topic == topic]

    def client(self, **options) -> Client:
        async def newer() -> bytes:
            return self.envelope

        return Client(
            self.envelope,
            [public_bytes(self.controller)],
            admitted=self.admitted,
            key=self.client_key,
            newer=newer,
            **options,
        )

    async def kill(self, replica: str, incarnation: int) -> None:
        process = self.processes[self.name(replica, incarnation)]
        process.send_signal(signal.SIGKILL)
        await process.wait()

    def log(self, replica: str, incarnation: int) -> str:
        return (self.home / f"{self.name(replica, incarnation)}.log").read_text()
