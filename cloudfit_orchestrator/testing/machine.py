"""A simulated machine: one replica core, driven as `guest.runtime` drives it, on a disk that crashes leave torn.

Effects are carried out in order. What was appended to the log is synced before a request leaves for the wormhole, and a
sync takes time in which the machine may crash; so does each way to the wormhole and back.
"""

import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

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
from cloudfit_orchestrator.bft.messages import MAX_CLIENT_FRAME, MAX_PEER_FRAME
from cloudfit_orchestrator.bft.ordering import AgreementError, ProtocolError
from cloudfit_orchestrator.bft.replica import Replica
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.messages import StreamMessage
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.ui import message_digest
from cloudfit_orchestrator.testing.disk import SimDisk
from cloudfit_orchestrator.testing.network import Schedule
from cloudfit_orchestrator.testing.wormhole import SimWormhole
from cloudfit_orchestrator.wormhole.refusal import Refusal

TICK_S = 0.05
CLOCK_S = 0.005  # resolution of the clock that a core is told: one tick of it serves all that comes in meanwhile
MAX_EFFECTS = 20_000  # of one call or waiting: more is a storm
GUEST_CHANNEL_S = 0.0003  # one way


class World(Protocol):
    """What a machine needs of the simulation around it."""

    schedule: Schedule

    def carry(self, machine: "Machine", peer: str, body: bytes) -> None:
        """A frame to another machine."""
        ...

    def answer(self, machine: "Machine", client: bytes, body: bytes) -> None:
        """A frame to a client."""
        ...

    def body(self, digest: bytes, header: bytes, payload: bytes) -> None:
        """A body that a machine is about to have certified."""
        ...

    def judge(self) -> Configuration | None:
        """All that was certified, judged: what an adversary who reads everything knows."""
        ...

    def sever(self, machine: "Machine", rng: random.Random, for_s: float) -> None:
        """An adversary who rules the network keeps correct replicas apart for a while; it still hears them all."""
        ...

    def look(self) -> None:
        """Check what can be checked now: something has been said that may have broken it."""
        ...

    def report(self, machine: "Machine", topic: str, body: dict[str, Any]) -> None:
        """A report for the controller."""
        ...

    def watch(self, machine: "Machine", effect: Effect) -> None:
        """Every effect that a core asks for, before its machine does it, or something else."""
        ...

    def trace(self, who: str, what: str) -> None:
        """One line of the run's trace."""
        ...


class Behaviour(Protocol):
    """How a Byzantine machine treats what its core asks for."""

    def effects(self, machine: "Machine", effect: Effect) -> list[tuple[float, Effect]]:
        """What is done instead of `effect`: (delay in seconds, effect) in order; the empty list does nothing."""
        ...

    def hear(self, body: bytes) -> None:
        """A frame of a peer arrived."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the machine is."""

    group: str
    replica: str
    incarnation: int

    @property
    def peer_id(self) -> str:
        """`replica#incarnation`."""
        return f"{self.replica}#{self.incarnation}"


class Machine:
    """Off until `start`. `crash` and `start` again as often as wanted; disk and wormhole stay."""

    def __init__(
        self,
        world: World,
        identity: Identity,
        *,
        service: Callable[["Machine"], Service],
        controller_keys: list[bytes],
        verifier: Verifier,
        wormhole: SimWormhole,
        rng: random.Random,
        behaviour: Behaviour | None = None,
    ) -> None:
        """`service` makes a fresh service for each start; with `behaviour` the machine is Byzantine."""
        self.world = world
        self.identity = identity
        self.wormhole = wormhole
        self.behaviour = behaviour
        self.heard_clients: deque[tuple[bytes, bytes]] = deque(maxlen=64)  # (client, frame), while it is Byzantine
        self.lies = False  # its service makes results up
        self.marked: dict[bytes, str] = {}  # frames that are an attack's own -> its name
        self.disk = SimDisk()
        self.rng = rng
        self.replica: Replica | None = None
        self.paused = False
        self.boots = 0
        self._service = service
        self._controller_keys = controller_keys
        self._verifier = verifier
        self._queue: deque[Effect] = deque()
        self._lingering: dict[str, list[bytes]] = {}  # by peer: frames that need not go soon
        self._syncing = False
        self._sessions: dict[int, int] = {}
        self._opening: int | None = None
        self._local_s = 0.0  # its clock, as it was at `_local_at_s`
        self._local_at_s = 0.0
        self._clock_rate = 1.0
        self._told_s = -1.0  # what its core was told last
        self._requests = 0  # sent to the wormhole
        self._arrived = 0
        self._cut = 0  # of those that a crash caught on their way, the last one that still arrives
        self.crash_in_effects: int | None = None  # crash when so many more effects were carried out

    @property
    def name(self) -> str:
        """Its peer id."""
        return self.identity.peer_id

    @property
    def correct(self) -> bool:
        """Whether it follows the protocol."""
        return self.behaviour is None

    @property
    def running(self) -> bool:
        """Started and not crashed."""
        return self.replica is not None

    @property
    def peers(self) -> list[str]:
        """Whom its core would send to now."""
        return sorted(self.replica.peers) if self.replica is not None else []

    @property
    def asking(self) -> bool:
        """Requests are on their way to the wormhole."""
        return self._arrived < self._requests

    def has_log(self, c: int, replica: str, cv: int) -> bool:
        """Whether its core holds, and has judged, the whole log of that stream of epoch c up to counter `cv`. Where
        there are no streams a stopped member votes by what it has signed, and nothing is to be read.
        """
        if self.replica is not None and self.configuration is None:
            return bool(self.replica.status["c"] == c)
        configuration = self.configuration
        if configuration is None or configuration.record.c != c:
            return False
        stream = configuration.streams.get(replica)
        whole = stream is not None and stream.complete(configuration.record.parameters.window)
        return whole and stream is not None and stream.ended is None and stream.cursor == cv

    @property
    def configuration(self) -> Configuration | None:
        """What its core knows of the present configuration."""
        ordering = self.replica._at.ordering if self.replica is not None else None  # noqa: SLF001
        return ordering.configuration if isinstance(ordering, UsigOrdering) else None

    def session(self, c: int) -> int:
        """Its open session of epoch c, 0 if there is none."""
        return self._sessions.get(c, 0)

    # ---------------------------------------------------------------------------------------------------- on and off
    def start(self) -> None:
        """Boot from what the disk holds."""
        assert self.replica is None
        self.boots += 1
        self._local_s, self._local_at_s = (
            self.rng.uniform(0, 1000),
            self.world.schedule.now_s(),
        )  # each boot has its own
        self._told_s = -1.0
        self._queue.clear()
        self._lingering.clear()
        self._syncing = False
        self._sessions.clear()
        self._opening = None
        self.crash_in_effects = None
        self.world.trace(self.name, f"boot {self.boots}, {len(self.disk.records)} log records")
        self.replica = Replica(
            group=self.identity.group,
            replica=self.identity.replica,
            incarnation=self.identity.incarnation,
            service=self._service(self),
            controller_keys=self._controller_keys,
            verifier=self._verifier,
            log=self.disk.records,
            snapshots=self.disk.found_snapshots(),
        )
        self._drain(self.replica)
        for envelope in self.wormhole.greet():
            self.push_record(envelope)
        self._plan_tick()

    def crash(self) -> None:
        """Stop between two effects. What was on its way to the wormhole may still arrive there, up to some request."""
        if self.replica is None:
            return
        self.world.trace(self.name, f"crash, {len(self._queue)} effects not carried out")
        self.replica = None
        self.boots += 1
        self._cut = self.rng.randint(self._arrived, self._requests)
        self.disk.crash(self.rng)

    def set_clock(self, rate: float) -> None:
        """From now on its clock runs at `rate` times true time; 0 stops it."""
        self._local_s, self._local_at_s = self._clock_s(), self.world.schedule.now_s()
        self._clock_rate = rate

    def _clock_s(self) -> float:
        return self._local_s + (self.world.schedule.now_s() - self._local_at_s) * self._clock_rate

    def forge(self, c: int, cv: int, header: bytes, payload: bytes = b"") -> StreamMessage:
        """What a taken guest can do at any time: have something of its own certified. Raises Refusal."""
        digest = message_digest(header, payload)
        self.world.body(digest, header, payload)
        certificate = self.wormhole.create_ui(self.session(c), c, cv, digest)
        return StreamMessage(c, self.identity.replica, cv, header, payload, certificate)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Plan `action`, unless the machine has crashed by then."""
        boot = self.boots
        self.world.schedule.after(delay_s, lambda: action() if boot == self.boots else None)

    def _plan_tick(self) -> None:
        self._later(self.rng.uniform(0.5, 1.0) * TICK_S, self._tick)

    def _tick(self) -> None:
        if not self.paused:
            self._call(lambda _: None)
            for peer in list(self._lingering):
                self._flush(peer)
        self._plan_tick()

    # ----------------------------------------------------------------------------------------------- what comes in
    def push_record(self, envelope: bytes) -> None:
        """RECORD from the wormhole."""
        self._call(lambda replica: replica.record(envelope))

    def push_command(self, body: dict[str, Any]) -> None:
        """COMMAND from the controller."""
        self._call(lambda replica: replica.command(json.loads(json.dumps(body))))

    def receive(self, peer: str, body: bytes) -> None:
        """A frame of another machine; dropped, as the transport does, if its sender is not one to accept."""
        if self.replica is not None and peer in self.replica.peers:
            if self.behaviour is not None:
                self.behaviour.hear(body)
            self._call(lambda replica: replica.receive(peer, body))

    def from_client(self, client: bytes, body: bytes) -> None:
        """A frame of a client; dropped if it is not admitted."""
        if self.replica is not None and any(client == known.key for known in self.replica.clients):
            if self.behaviour is not None:
                self.heard_clients.append((client, body))
            self._call(lambda replica: replica.from_client(client, body))

    def _call(self, action: Callable[[Replica], None]) -> None:
        replica = self.replica
        if replica is None or self.paused:
            return
        try:
            now_s = self._clock_s()
            if now_s - self._told_s >= CLOCK_S:
                self._told_s = now_s
                replica.tick(now_s)
            action(replica)
            self._drain(replica)
        except (AgreementError, ProtocolError, BadError, LookupError, ValueError):
            if self.correct:
                raise
            self.crash()  # a core that its owner lied to may well stop

    # ------------------------------------------------------------------------------------------------------- effects
    def _drain(self, replica: Replica) -> None:
        for effect in replica.effects():
            self.world.watch(self, effect)
            if self.behaviour is None:
                if isinstance(effect, Sign) and not effect.waits:
                    self._do(effect)  # it overtakes what waits for the disk
                else:
                    self._queue.append(effect)
                continue
            for delay_s, done in self.behaviour.effects(self, effect):
                if delay_s:
                    self._later(delay_s, partial(self._late, done))
                else:
                    self._queue.append(done)
        if len(self._queue) > MAX_EFFECTS:
            raise AssertionError(f"{self.name} waits with {len(self._queue)} effects")
        self._pump()
        self._want_session()

    def _late(self, effect: Effect) -> None:
        self._queue.append(effect)
        self._pump()

    def _pump(self) -> None:
        while self._queue and not self._syncing and self.replica is not None:
            effect = self._queue[0]
            waits = isinstance(effect, Certify | EndEpoch) or (isinstance(effect, Sign) and effect.waits)
            if waits and self.disk.dirty:
                self._sync()
                return
            self._queue.popleft()
            self._do(effect)
            if self.crash_in_effects is not None:
                self.crash_in_effects -= 1
                if self.crash_in_effects <= 0:
                    self.crash()

    def _sync(self) -> None:
        self._syncing = True
        self._later(self.rng.uniform(0.0001, 0.003), self._synced)

    def _synced(self) -> None:
        self.disk.sync()
        self._syncing = False
        self._pump()

    def _do(self, effect: Effect) -> None:
        match effect:
            case Append():
                self.disk.append(effect.record)
            case Rewrite():
                self.disk.rewrite(effect.records)
                self._sync()
            case Certify():
                self._ask(partial(self._certify, effect))
            case Sign():
                self._ask(partial(self._sign, effect))
            case EndEpoch():
                self._ask(partial(self._end_epoch, effect))
            case Send():
                assert len(effect.body) <= MAX_PEER_FRAME
                self._lingering.setdefault(effect.peer, []).append(effect.body)
                if effect.soon:
                    self._flush(effect.peer)
            case Answer():
                assert len(effect.body) <= MAX_CLIENT_FRAME
                self.world.answer(self, effect.client, effect.body)
            case SaveSnapshot():
                self._later(self.rng.uniform(0.001, 0.03), lambda: self._saved(effect))
            case DropSnapshots():
                self.disk.keep_snapshots(effect.keep)
            case Report():
                self.world.report(self, effect.topic, json.loads(json.dumps(effect.body)))

    def _flush(self, peer: str) -> None:
        """What waits for `peer` goes, in its order, as the transport's queue does."""
        for body in self._lingering.pop(peer, []):
            self.world.carry(self, peer, body)

    def _saved(self, effect: SaveSnapshot) -> None:
        self.disk.snapshots[effect.c, effect.slot] = effect.snapshot
        self._call(lambda replica: replica.saved(effect.c, effect.slot))

    # ----------------------------------------------------------------------------------------- the way to the wormhole
    def _ask(self, request: Callable[[], Callable[[Replica], None] | None]) -> None:
        """Carry out `request` at the wormhole, then what it returns at the core. Both ways keep order."""
        self._requests += 1
        number, boot = self._requests, self.boots

        def arrive() -> None:
            if boot != self.boots and number > self._cut:
                return
            self._arrived = number
            answer = request()
            if answer is not None and boot == self.boots:
                self._later(GUEST_CHANNEL_S, lambda: self._call(answer))

        self.world.schedule.after(GUEST_CHANNEL_S, arrive)

    def _certify(self, effect: Certify) -> Callable[[Replica], None]:
        try:
            certificate = self.wormhole.create_ui(self.session(effect.c), effect.c, effect.cv, effect.digest)
        except Refusal as refusal:
            code = refusal.code
            self.world.trace(self.name, f"UI c={effect.c} cv={effect.cv} refused: {code.name}")
            return lambda replica: replica.refused(effect.c, code)
        return lambda replica: replica.certified(effect.c, effect.cv, certificate)

    def _sign(self, effect: Sign) -> Callable[[Replica], None] | None:
        try:
            signature = self.wormhole.sign(effect.c, effect.kind, effect.body)
        except Refusal:
            return None
        return lambda replica: replica.signed(effect.token, signature)

    def _end_epoch(self, effect: EndEpoch) -> Callable[[Replica], None] | None:
        try:
            end = self.wormhole.end_epoch(effect.c)
        except Refusal:
            return None
        return lambda replica: replica.epoch_ended(end)

    def _want_session(self) -> None:
        wanted = self.replica.needs_session if self.replica is not None else None
        if wanted is None or self._opening is not None:
            return
        self._opening = wanted
        self._ask(partial(self._open_session, wanted))

    def _open_session(self, c: int) -> Callable[[Replica], None] | None:
        try:
            session, next_cv, recent = self.wormhole.open_session(c)
        except Refusal as refusal:
            if refusal.code not in {ErrorCode.NOT_ACTIVE, ErrorCode.NO_EPOCH}:
                raise
            self._later(2 * TICK_S, self._session_again)
            return None

        def opened(replica: Replica) -> None:
            self._sessions[c] = session
            self._opening = None
            replica.session(c, next_cv, recent)

        return opened

    def _session_again(self) -> None:
        self._opening = None
        self._want_session()
