"""The agent inside a guest, where nobody has a hold on its host (`trust: none`): `python -m …wormhole.inside`.

It serves one guest, the one that it runs in, and is trusted exactly as much: whoever takes the guest over has its keys.
So it is none of what the rest of this room is, a wormhole; it only speaks as one, to the replica beside it and to the
controller, and everything that counts on a counter is refused.

1. Who it is, its seed, and whose orders it takes stand on the config drive. It admits itself: nothing is measured.
2. Keys come from the drive's seed and a secret beside the replica's log (`memory`). After a restart they are the same,
   and so is what was prepared, installed and commanded.
3. Orders come by TLS 1.3 from whoever holds the key of the one certificate on the drive.
"""

import argparse
import asyncio
import base64
import contextlib
import logging
import resource
import signal
import socket
import ssl
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.model.clock import Clock
from cloudfit_orchestrator.model.drive import MAX_DRIVE_BYTES, Drive, control_certificate, derived_key
from cloudfit_orchestrator.model.envelope import key_id
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, RefusedError
from cloudfit_orchestrator.model.image import LaunchCertificate, Role, manifest_digest, seal_launch
from cloudfit_orchestrator.model.record import Algorithm, open_record
from cloudfit_orchestrator.wormhole.agent import Admission, Agent
from cloudfit_orchestrator.wormhole.control import MAX_LINE_BYTES, Control
from cloudfit_orchestrator.wormhole.epoch import Epoch
from cloudfit_orchestrator.wormhole.guests import MAX_COMMANDS, Guest
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.kss import ChannelCA, Lease
from cloudfit_orchestrator.wormhole.memory import Memory
from cloudfit_orchestrator.wormhole.tls import Credentials

MEMORY = "agent.json"
MAX_HANDSHAKES = 8  # under way at once: there is one controller; beyond it the address that has most gives one up
HANDSHAKE_TIMEOUT_S = 30.0  # more than the controller waits for
COUNTED = frozenset({Algorithm.EBAWA, Algorithm.MINBFT})  # 2f+1 are enough for them because counters do not lie
_IP_FREEBIND = 15  # ip(7): the address is the interface's only once the replica has read its WELCOME

_log = logging.getLogger(__name__)


class InsideAgent(Agent):
    """See the module."""

    def __init__(self, drive: Drive, state: Path, *, clock: Clock | None = None) -> None:
        """`state`: the directory of the replica's log. A recovery machine's is another one's disk: not looked at.

        Raises OSError if it cannot be used.
        """
        self.identity = Identity(drive.group, drive.replica, drive.incarnation)
        super().__init__(
            str(self.identity),
            derived_key(drive.seed, "identity"),
            controller_keys=list(drive.controller_keys),
            clock=clock,
        )
        self._drive = drive
        self._path = state / MEMORY
        self._memory = Memory.load(self._path) if drive.role is Role.REPLICA else Memory(secret=b"")

    def start(self, channel: str) -> None:
        """Admit the guest around us, as it was before a restart, and serve it behind the unix socket `channel`."""
        drive, secret = self._drive, self._drive.seed + self._memory.secret
        ca = ChannelCA(str(self.identity), derived_key(secret, "channel-ca"))
        certificate = LaunchCertificate(
            group=drive.group,
            replica=drive.replica,
            incarnation=drive.incarnation,
            role=drive.role,
            image=drive.image,
            domain="",
            machine="inside",
            agent=key_id(self.key),
            isolated=False,
            channel_ca=base64.b64encode(ca.certificate).decode(),
            measured_at="",
            measured=False,
        )
        guest = Guest(
            identity=self.identity,
            role=drive.role,
            machine=certificate.machine,
            image=drive.image,
            launch=seal_launch(certificate, self._identity_key),
            lease=Lease(self._clock.now_s(), drive.lease_s),
            ca=ca,
            welcome=drive.welcome,
            make=lambda label: derived_key(secret, label),
        )
        self.table.admit(guest)
        self._remember(guest)
        self._serve(guest, channel, _nothing_to_verify)

    def _remember(self, guest: Guest) -> None:
        for c in self._memory.prepared:
            guest.prepare(c)
        for envelope in self._memory.records:
            try:
                self.table.install(guest.identity.group, envelope)
            except CloudfitError as error:  # it was taken once; what is wrong now can only cost this guest its voice
                _log.warning("record forgotten", extra={"guest": str(guest.identity), "why": error.fact[:500]})
        for body in self._memory.commands:
            self.table.command(guest.identity, body)

    def _keep(self) -> None:
        """Journal what an order changed, before it is answered."""
        if self._drive.role is not Role.REPLICA:
            return
        guest, held = self.table.get(self.identity), self.table.records(self.identity.group)
        self._memory.prepared = sorted(guest.epochs)
        self._memory.records = [x.envelope for x in (held.active, held.prepared) if x is not None]
        self._memory.save(self._path)

    async def admit(self, order: Admission) -> bytes:
        """See `Agent.admit`. It was admitted when it started: this only says so, if the drive says the same."""
        image = manifest_digest(order.manifest) if order.manifest else self._drive.image
        asked, here = (order.identity, order.role, image), (self.identity, self._drive.role, self._drive.image)
        if asked != here:
            raise BadError(f"the drive makes this guest a {here[1]} {here[0]} with image {here[2]}, not {asked}")
        return self.table.get(self.identity).launch

    def prepare(self, identity: Identity, c: int) -> Epoch:
        """See `Agent.prepare`."""
        epoch = super().prepare(identity, c)
        self._keep()
        return epoch

    def install(self, group: str, envelope: bytes) -> None:
        """See `Agent.install`. RefusedError for an algorithm that believes counters: ours is worth nothing."""
        record = open_record(envelope, list(self._drive.controller_keys))
        if record.algorithm in COUNTED:
            raise RefusedError(
                f"record c={record.c} of {group} is for {record.algorithm}, which needs a wormhole at the hypervisor",
                next_command="trust: none goes with algorithm: pbft only",
            )
        super().install(group, envelope)
        self._keep()

    def command(self, identity: Identity, body: dict[str, Any]) -> None:
        """See `Agent.command`."""
        super().command(identity, body)
        self._memory.commands = [*self._memory.commands, body][-MAX_COMMANDS:]
        self._keep()

    async def evict(self, identity: Identity) -> None:
        """Raises RefusedError: these keys go with the guest's machine."""
        raise RefusedError(f"{identity} is the guest that this agent runs in", next_command="destroy its machine")


class Door:
    """Lets in who has the key of the drive's certificate, and hands the connection to `control`."""

    def __init__(self, drive: Drive, agent: Agent, control: Control) -> None:
        """Raises BadError if the drive's certificate is none."""
        key = derived_key(drive.seed, "control")
        name = f"{drive.group}/{drive.replica}#{drive.incarnation}"
        self._context = Credentials(key, control_certificate(key, name)).server_context([drive.controller])
        self._expected = drive.controller
        self._agent = agent
        self._control = control
        self._under_way: dict[asyncio.Task[None], str] = {}  # -> address; oldest first

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end."""
        task = asyncio.current_task()
        assert task is not None
        self._under_way[task] = str((writer.get_extra_info("peername") or ("",))[0])
        if len(self._under_way) > MAX_HANDSHAKES:
            self._agent.counters["control-crowded"] += 1
            ((most, _),) = Counter(self._under_way.values()).most_common(1)
            next(each for each, address in self._under_way.items() if address == most).cancel()
        try:
            await writer.start_tls(self._context, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S)
        except (OSError, asyncio.CancelledError):
            self._agent.counters["control-stranger"] += 1
            writer.close()
            return
        finally:
            del self._under_way[task]
        tls = writer.get_extra_info("ssl_object")
        if not isinstance(tls, ssl.SSLObject) or tls.getpeercert(binary_form=True) != self._expected:
            self._agent.counters["control-stranger"] += 1
            writer.close()
            return
        await self._control.serve(reader, writer)


async def _nothing_to_verify() -> None:
    """Who is at the other end of the socket is as trusted as we are."""


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on an address that the machine may not have yet. Raises OSError."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.bind((address, port))
        listener.listen(MAX_HANDSHAKES)
        listener.settimeout(0)
    except OSError:
        listener.close()
        raise
    return listener


async def run(drive: Drive, state: Path, channel: str, stop: asyncio.Event) -> None:
    """Serve until `stop`. Raises CloudfitError or OSError if it cannot begin."""
    agent = InsideAgent(drive, state)
    control = Control(agent)
    door = Door(drive, agent, control)
    agent.start(channel)
    listener = listen(str(drive.welcome["network"]["address"]), drive.control_port)
    server = await asyncio.start_server(door.serve, sock=listener, limit=MAX_LINE_BYTES)
    _log.info("started", extra={"agent": agent.name})
    await stop.wait()
    server.close()
    await control.stop()
    await agent.stop()


async def _until_signalled(drive: Drive, state: Path, channel: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run(drive, state, channel, stop)


def main(argv: list[str] | None = None) -> None:
    """Run until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 cannot start, 2 bad usage."""
    p = argparse.ArgumentParser("inside", description="Run the agent of the guest that this is.")
    p.add_argument("--drive", required=True, type=Path, help="user data of the config drive")
    p.add_argument("--channel", required=True, help="unix socket on which the replica listens")
    p.add_argument("--state", required=True, type=Path, help="directory of the replica's log")
    options = p.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold keys
    logging.basicConfig(level=logging.INFO, format="agent: %(levelname)s %(message)s", force=True)
    try:
        with options.drive.open("rb") as file:
            drive = Drive.decode(file.read(MAX_DRIVE_BYTES + 1))
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_until_signalled(drive, options.state, options.channel))
    except (CloudfitError, OSError, KeyError) as error:
        print(f"agent: {error!r}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
