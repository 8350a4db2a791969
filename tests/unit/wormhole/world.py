"""A group whose members are on one agent, and guests that speak the channel over real unix sockets."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    MAX_AGENT_FRAME,
    SESSION,
    SIGN_HEAD,
    ErrorCode,
    FrameKind,
    FrameReader,
    frame,
    hello,
)
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.record import (
    Algorithm,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    confirm_body,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.guests import Guest, Table
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.kss import ChannelCA, Lease
from cloudfit_orchestrator.wormhole.requests import Desk

GROUP = "ledger"
H, DIGEST = 0, bytes(range(32))


class ManualClock:
    def __init__(self):
        self.time_s = 100.0

    def now_s(self):
        return self.time_s


def identity(replica, incarnation):
    return Identity(GROUP, replica, incarnation)


class Pure:
    """Table and desks without any I/O: guests r0#1, r1#2, r2#3 of one group, all on this table."""

    def __init__(self, lease_s=1000.0):
        self.clock = ManualClock()
        self.controller = Ed25519PrivateKey.generate()
        self.table = Table([public_bytes(self.controller)])
        self.reports = []
        self.desks = {}
        for replica, incarnation in (("r0", 1), ("r1", 2), ("r2", 3)):
            self.add(identity(replica, incarnation), lease_s=lease_s)

    def add(self, who, *, role=Role.REPLICA, lease_s=1000.0):
        lease = Lease(self.clock.now_s(), lease_s)
        guest = Guest(who, role, f"machine-{who}", "sha256:0", b"launch", lease, ChannelCA(str(who)), {"port": 7000})
        self.table.admit(guest)
        self.desks[who] = Desk(guest, self.table, self.clock, lambda *report: self.reports.append(report))
        return guest

    def guest(self, replica):
        return next(g for g in self.table if g.identity.replica == replica)

    def prepared(self, c, base, *, members=None, key=None, change=lambda r: r):
        guests = list(self.table) if members is None else members
        record = record_of(c, base, [member(g, self.table.prepare(g.identity, c)) for g in guests])
        return seal_record(change(record), key or self.controller)

    def activate(self, c=1, base=None, **how):
        """Install PREPARED(c) and ACTIVE(c); returns both envelopes."""
        prepared = self.prepared(c, base, **how)
        self.table.install(GROUP, prepared)
        active = active_envelope(prepared, self.confirm, self.controller)
        self.table.install(GROUP, active)
        return prepared, active

    def confirm(self, replica, c, body):
        return self.guest(replica).epoch(c).sign(Kind.CONFIRM, body)

    def ask(self, replica, kind, body=b""):
        """(kind, body) of the answer; a refusal is its ErrorCode."""
        guest = self.guest(replica) if isinstance(replica, str) else replica
        data = self.desks[guest.identity].answer(kind, 1, body)
        ((answer, request, answer_body),) = FrameReader(MAX_AGENT_FRAME).feed(data)
        assert request == 1
        if answer == FrameKind.ERROR:
            return ErrorCode(int.from_bytes(answer_body[:2], "big"))
        return FrameKind(answer), answer_body

    def session(self, replica, c=1):
        kind, body = self.ask(replica, FrameKind.OPEN_SESSION, EPOCH.pack(c))
        assert kind is FrameKind.SESSION
        return SESSION.unpack(body)[0]

    def create(self, replica, session, cv, c=1, digest=DIGEST):
        return self.ask(replica, FrameKind.CREATE_UI, CREATE_UI.pack(session, c, cv, digest))

    def sign(self, replica, kind, body, c=1):
        return self.ask(replica, FrameKind.SIGN, SIGN_HEAD.pack(c, kind) + body)


def member(guest, epoch, **change):
    made = Member(
        replica=guest.identity.replica,
        incarnation=guest.identity.incarnation,
        cloud="lisbon",
        address="10.0.0.1:7000",
        usig_key=epoch.usig_key,
        kss_key=epoch.kss_key,
        channel_ca=guest.ca.certificate,
        image="sha256:0",
        launch="sha256:0",
    )
    return replace(made, **change)


def record_of(c, base, members, f=1):
    return ConfigRecord(
        group=GROUP,
        c=c,
        base=base,
        members=tuple(members),
        clients=(),
        service="kv",
        f=f,
        k=0,
        algorithm=Algorithm.EBAWA,
        parameters=Parameters(),
        previous=bytes(32),
    )


def active_envelope(prepared, confirm, key, *, count=2, change=lambda r: r):
    """ACTIVE for a PREPARED envelope; `confirm(replica, c, body)` signs."""
    from cloudfit_orchestrator.model.record import open_record

    record = open_record(prepared, [public_bytes(key)])
    digest = record_hash(prepared)
    body = confirm_body(digest, H, DIGEST)
    confirmations = [Confirmation(m.replica, confirm(m.replica, record.c, body)) for m in record.members[:count]]
    active = record.activated(prepared=digest, previous=digest, h=H, digest=DIGEST, confirmations=confirmations)
    return seal_record(change(active), key)


class FakeGuest:
    """A guest's end of its channel: listens where the agent connects."""

    def __init__(self, path):
        self.path = path
        self._connections = asyncio.Queue()
        self._server = None
        self._writers = []
        self._request = 0
        self._frames = None
        self._inbox = []

    async def listen(self):
        self._server = await asyncio.start_unix_server(self._connected, self.path)

    def _connected(self, reader, writer):
        self._writers.append(writer)
        self._connections.put_nowait((reader, writer))

    async def accept(self):
        """Wait for the agent's (next) connection."""
        self.reader, self.writer = await asyncio.wait_for(self._connections.get(), 20)

    async def greet(self, request=77):
        """Say HELLO on the connection there is; the WELCOME."""
        self._frames = FrameReader(MAX_AGENT_FRAME, welcome=request)
        self._inbox = []
        self.writer.write(hello(request))
        return await self.read()

    async def read(self):
        """The next frame, as (kind, request, body)."""
        while not self._inbox:
            data = await asyncio.wait_for(self.reader.read(1 << 16), 20)
            if not data:
                raise EOFError
            self._inbox.extend(self._frames.feed(data))
        return self._inbox.pop(0)

    async def ask(self, kind, body=b""):
        """The answer's (kind, body); pushes that come before it are returned by `read` later."""
        self._request += 1
        self.writer.write(frame(kind, self._request, body))
        pushes = []
        while True:
            kind, request, body = await self.read()
            if request == self._request:
                self._inbox = pushes + self._inbox
                return kind, body
            pushes.append((kind, request, body))

    async def session(self, c=1):
        kind, body = await self.ask(FrameKind.OPEN_SESSION, EPOCH.pack(c))
        assert kind == FrameKind.SESSION, (kind, body)
        return SESSION.unpack(body)[0]

    async def close(self):
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for writer in self._writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class World:
    """An agent in this process, and guests of it."""

    def __init__(self, folder, bucket):
        self.folder = folder
        self.controller = Ed25519PrivateKey.generate()
        self.image_key = Ed25519PrivateKey.generate()
        self.identity_key = Ed25519PrivateKey.generate()
        self.agent = HostAgent(
            "a1",
            self.identity_key,
            controller_keys=[public_bytes(self.controller)],
            image_keys=[public_bytes(self.image_key)],
            bucket=bucket,
        )
        self.guests = {}

    def order(self, who, path, **change):
        # Each guest needs a process of its own; any that lives will do, for nothing is measured of it.
        pid = os.getpid() if who.incarnation == 1 else os.getppid()
        made = Admission(
            identity=who,
            role=Role.REPLICA,
            machine=MachineRef("process", pid=pid, socket=path),
            manifest=b"",
            allow_adversary=False,
            lease_s=1000.0,
            welcome={"port": 7000, "options": {"x": 1}, "replica": "another"},
        )
        return replace(made, **change)

    async def admit(self, who, **change):
        guest = FakeGuest(f"{self.folder}/{who.replica}-{who.incarnation}")
        await guest.listen()
        self.guests[who] = guest
        await self.agent.admit(self.order(who, guest.path, **change))
        await guest.accept()
        return guest

    def activate(self, c=1, base=None, f=0):
        """Install PREPARED(c) and ACTIVE(c) of all admitted guests."""
        prepared, confirmed = self.seal(c, base, f)
        self.agent.install(GROUP, prepared)
        active = confirmed()
        self.agent.install(GROUP, active)
        return prepared, active

    def seal(self, c, base, f=0):
        """PREPARED(c), and what makes its ACTIVE(c)."""
        guests = list(self.agent.table)
        members = [member(g, self.agent.table.prepare(g.identity, c)) for g in guests]
        prepared = seal_record(record_of(c, base, members, f=f), self.controller)
        by_name = {g.identity.replica: g for g in guests}
        confirm = lambda replica, c, body: by_name[replica].epoch(c).sign(Kind.CONFIRM, body)  # noqa: E731
        return prepared, lambda: active_envelope(prepared, confirm, self.controller, count=f + 1)


@contextlib.asynccontextmanager
async def world(bucket=None):
    folder = tempfile.mkdtemp(prefix="cfw", dir="/tmp")
    made = World(folder, bucket)
    try:
        yield made
    finally:
        await made.agent.stop()
        for guest in made.guests.values():
            await guest.close()
        shutil.rmtree(folder)


def short_folder():
    return Path(tempfile.mkdtemp(prefix="cfw", dir="/tmp"))
