"""Drives the core (`bft.replica.Replica`) in the world: frames, ticks and answers in, effects out, in one event loop.

Order of things: open the state disk, greet the wormhole (WELCOME says who this is), have a TLS certificate issued,
listen, make the core from log and snapshots, then hand it whatever happens and carry out what it wants. An error that
nobody expected ends the process: the next one begins from the log.
"""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.effects import (
    Answer,
    Append,
    Certify,
    DropSnapshots,
    Effect,
    EndEpoch,
    Report,
    Rewrite,
    SaveSnapshot,
    Send,
    Sign,
)
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.replica import Replica
from cloudfit_orchestrator.guest.certifier import Certifier
from cloudfit_orchestrator.guest.channel import Channel, ChannelLostError, Handlers, WormholeRefusedError
from cloudfit_orchestrator.guest.durable import Durable
from cloudfit_orchestrator.guest.ports import Port
from cloudfit_orchestrator.guest.storage import DiskFailedError, DiskFullError
from cloudfit_orchestrator.guest.transport import Transport
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.channel import FrameKind
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import Ed25519Verifier
from cloudfit_orchestrator.services.registry import load
from cloudfit_orchestrator.wormhole.tls import Credentials

TICK_S = 0.04  # the core wants one every 50 ms, and an idle replica on an emulated core pays for each
ISSUE_RETRY_S = 1.0
DISK_RETRY_S = 5.0
FIGURES_S = 60.0  # between two lines of figures on the console, which is a file of the host's


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who this machine is, as its wormhole says."""

    group: str
    replica: str
    incarnation: int
    role: str
    network: dict[str, Any]
    port: int
    options: dict[str, Any]

    @classmethod
    def parse(cls, doc: dict[str, Any]) -> "Welcome":
        """Raises BadError if something is missing."""
        try:
            return cls(
                str(doc["group"]),
                str(doc["replica"]),
                int(doc["incarnation"]),
                str(doc["role"]),
                dict(doc["network"] or {}),
                int(doc["port"]),
                dict(doc["options"] or {}),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadError(f"WELCOME is malformed: {type(error).__name__}: {error}") from error

    @property
    def controller_keys(self) -> list[bytes]:
        """Whose records are believed: raw Ed25519 keys."""
        try:
            return [base64.b64decode(key, validate=True) for key in self.options["controller_keys"]]
        except (KeyError, TypeError, ValueError) as error:
            raise BadError(f"WELCOME has no good options.controller_keys: {error!r}") from error


class Greeter:
    """The channel, up to the point where somebody uses it: waits for WELCOME, keeps what is pushed meanwhile."""

    def __init__(self, port: Port, turn: Turn | None = None) -> None:
        """Starts nothing. `turn`: see `Channel`."""
        handlers = Handlers(self._opened, self._lost, self._pushed_record, self._pushed_command)
        self.channel = Channel(port, handlers, turn)
        self._welcome: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._early: list[tuple[str, Any]] = []
        self._handlers: Handlers | None = None

    async def welcome(self) -> Welcome:
        """The first WELCOME."""
        return Welcome.parse(await asyncio.shield(self._welcome))

    def attach(self, handlers: Handlers) -> None:
        """Hand over: what was pushed so far comes at once."""
        self._handlers = handlers
        early, self._early = self._early, []
        for what, value in early:
            (handlers.record if what == "record" else handlers.command)(value)

    def _opened(self, welcome: dict[str, Any]) -> None:
        if not self._welcome.done():
            self._welcome.set_result(welcome)
        if self._handlers is not None:
            self._handlers.opened(welcome)

    def _lost(self) -> None:
        if self._handlers is not None:
            self._handlers.lost()

    def _pushed_record(self, body: bytes) -> None:
        if self._handlers is None:
            self._early.append(("record", body))
        else:
            self._handlers.record(body)

    def _pushed_command(self, body: dict[str, Any]) -> None:
        if self._handlers is None:
            self._early.append(("command", body))
        else:
            self._handlers.command(body)


async def obtain_credentials(channel: Channel) -> Credentials:
    """A fresh TLS key, and the certificate that the wormhole issues for it; asks until it does."""
    key = Ed25519PrivateKey.generate()
    while True:
        try:
            return Credentials(key, await channel.request(FrameKind.ISSUE, Credentials.request(key)))
        except (ChannelLostError, WormholeRefusedError):
            await asyncio.sleep(ISSUE_RETRY_S)


class Runtime:
    """One replica. `prepare_network` is called with the WELCOME before anything listens."""

    def __init__(
        self,
        *,
        port: Port,
        state: Path,
        prepare_network: Callable[[Welcome], str],
        announce_ready: Callable[[], None],
        log: Callable[..., None],
        make_service: Callable[[str], Service] = load,
        make_transport: Callable[..., Transport] = Transport,
    ) -> None:
        """`prepare_network` returns the address to listen on; `log(event, **fields)`."""
        self._port = port
        self._state = state
        self._prepare_network = prepare_network
        self._announce_ready = announce_ready
        self._log = log
        self._make_service = make_service
        self._make_transport = make_transport
        self.counters: Counter[str] = Counter()
        self._known: tuple[Any, Any] = (None, None)
        self._turn = Turn()
        self._pumping = False
        self._ticked_s = -1.0
        self._figures: dict[str, int] = {}
        self._figures_s = 0.0

    async def run(self) -> None:
        """Run until cancelled. Raises what went wrong and was not expected."""
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        greeter = Greeter(self._port, self._turn)
        self.channel = greeter.channel
        channel_task = self._loop.create_task(greeter.channel.run())
        self.durable = await self._open_disk(greeter)
        snapshots = await asyncio.to_thread(self.durable.snapshots.load)
        self.welcome = await greeter.welcome()
        self._log("welcome", group=self.welcome.group, replica=self.welcome.replica, inc=self.welcome.incarnation)
        host = self._prepare_network(self.welcome)
        self.transport = self._make_transport(
            group=self.welcome.group,
            credentials=await obtain_credentials(greeter.channel),
            from_peer=self._from_peer,
            from_client=self._from_client,
            turn=self._turn,
        )
        self.replica = Replica(
            group=self.welcome.group,
            replica=self.welcome.replica,
            incarnation=self.welcome.incarnation,
            service=self._make_service(str(self.welcome.options.get("service", "kv"))),
            controller_keys=self.welcome.controller_keys,
            verifier=Ed25519Verifier(),
            log=self.durable.log.records(),
            snapshots=snapshots,
        )
        self._carries = self._ways()
        self.certifier = Certifier(self.welcome.replica, greeter.channel, self.replica, self.call, self.counters)
        await self.transport.listen(host, self.welcome.port)
        self._log("listening", host=host, port=self.welcome.port, cut_bytes=self.durable.log.cut_bytes)
        for damage in self.durable.snapshots.damaged[:1]:
            self._log("damaged snapshots", first=damage.fact, count=len(self.durable.snapshots.damaged))
        greeter.attach(Handlers(self._reopened, self.certifier.channel_lost, self._record, self.command))
        ticking = self._loop.create_task(self._tick())
        try:
            await self._over
        finally:
            for task in (ticking, channel_task):
                task.cancel()
            await asyncio.gather(ticking, channel_task, return_exceptions=True)
            await self.certifier.close()
            await self.transport.close()
            await self.durable.close()

    async def _open_disk(self, greeter: Greeter) -> Durable:
        """The state disk; while it cannot be used the machine says so to the controller, and stays silent otherwise."""
        said = ""

        async def say(state: str, fact: str) -> None:
            self._log("disk", state=state, fact=fact)
            await greeter.welcome()
            body = json.dumps({"topic": "storage", "state": state, "fact": fact}).encode()
            await asyncio.gather(greeter.channel.request(FrameKind.REPORT, body), return_exceptions=True)

        while True:
            try:
                durable = await asyncio.to_thread(Durable, self._state, self._disk_trouble, self._crash, self._turn)
            except (DiskFullError, DiskFailedError) as error:
                if str(error) != said:
                    said = str(error)
                    await say("unusable", said)
                await asyncio.sleep(DISK_RETRY_S)
                continue
            if said:
                await say("ok", "the state disk can be used again")
            return durable

    # --------------------------------------------------------------------------------------------------- into the core
    def call(self, method: Callable[..., None], *args: object) -> None:
        """Every call of the core goes through here: time first, effects after; its errors end the process."""
        if self._over.done():
            return
        try:
            now_s = self._loop.time()
            if now_s > self._ticked_s + TICK_S:
                self._ticked_s = now_s
                self.replica.tick(now_s)
            method(*args)
        except Exception as error:  # noqa: BLE001  the boundary: no error of the core may be survived silently
            self._crash(error)
            return
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _from_peer(self, peer: str, body: bytes) -> None:
        if self.durable.stalled:
            self.counters["input dropped: disk"] += 1
            return
        self.call(self.replica.receive, peer, body)

    def _from_client(self, client: bytes, body: bytes) -> None:
        if self.durable.stalled:
            self.counters["input dropped: disk"] += 1
            return
        self.call(self.replica.from_client, client, body)

    def _record(self, envelope: bytes) -> None:
        self.call(self._believe, self.replica.record, envelope)

    def command(self, body: dict[str, Any]) -> None:
        """A COMMAND push."""
        self.call(self._believe, self.replica.command, body)

    def _believe(self, method: Callable[[Any], None], value: object) -> None:
        try:
            method(value)
        except BadError as error:
            self.counters["refused push"] += 1
            self._log("refused", what=method.__name__, why=str(error))

    def _reopened(self, doc: dict[str, Any]) -> None:
        again = Welcome.parse(doc)
        mine = (self.welcome.group, self.welcome.replica, self.welcome.incarnation)
        if (again.group, again.replica, again.incarnation) != mine:
            self._crash(BadError(f"the wormhole calls this machine {again.replica}#{again.incarnation} now"))
            return
        self.certifier.channel_opened()

    async def _tick(self) -> None:
        self.certifier.channel_opened()
        while True:
            self.call(lambda: None)
            self.transport.flush()
            self._follow_configuration()
            self._say_figures()
            await asyncio.sleep(TICK_S)

    # ------------------------------------------------------------------------------------------------- out of the core
    def _pump(self) -> None:
        self._pumping = False
        if self._over.done():
            return
        try:
            with self._turn:
                for effect in self.replica.effects():
                    self.carry_out(effect)
            self.certifier.want_session(self.replica.needs_session)
        except Exception as error:  # noqa: BLE001  see `call`
            self._crash(error)

    def carry_out(self, effect: Effect) -> None:
        """What each effect demands: see `bft.effects`."""
        self._carries[type(effect)](effect)

    def _ways(self) -> dict[type[Effect], Callable[[Any], None]]:
        """How each kind of effect is carried out."""
        return {
            Append: self.durable.write,
            Rewrite: self.durable.write,
            Certify: lambda effect: self.durable.after(lambda: self.certifier.certify(effect)),
            Sign: self._have_signed,
            EndEpoch: lambda effect: self.durable.after(lambda: self.certifier.end_epoch(effect)),
            Send: lambda effect: self.transport.send(effect.peer, effect.body, soon=effect.soon),
            Answer: lambda effect: self.transport.answer(effect.client, effect.body),
            SaveSnapshot: lambda effect: self.durable.save(effect, lambda: self.saved(effect)),
            DropSnapshots: self.durable.drop,
            Report: self._report,
        }

    def _have_signed(self, effect: Sign) -> None:
        if effect.waits:
            self.durable.after(lambda: self.certifier.sign(effect), may_be_lost=True)
        else:
            self.certifier.sign(effect)

    def saved(self, effect: SaveSnapshot) -> None:
        """A snapshot is durable."""
        self.call(self.replica.saved, effect.c, effect.slot)

    def _report(self, effect: Report) -> None:
        if effect.topic == "ready":
            self._log("ready", c=effect.body.get("c"))
            self._announce_ready()
        self.certifier.report(effect)

    def _follow_configuration(self) -> None:
        wanted = (dict(self.replica.peers), list(self.replica.clients))
        if wanted != self._known:
            self._known = wanted
            self.transport.configure(wanted[0].values(), wanted[1])

    def _say_figures(self) -> None:
        """What was refused, dropped and closed, and why: on the console, now and then, if it is something new."""
        now_s = self._loop.time()
        if now_s < self._figures_s:
            return
        self._figures_s = now_s + FIGURES_S
        figures = {**self.counters, **self.transport.counters, **self.replica.status["counters"]}
        if figures != self._figures:
            self._figures = figures
            self._log("figures", **figures)

    def _disk_trouble(self, state: str, fact: str) -> None:
        self._log("disk", state=state, fact=fact)
        self.certifier.report(Report("storage", {"state": state, "fact": fact}))

    def _crash(self, error: BaseException) -> None:
        if not self._over.done():
            self._over.set_exception(error)
