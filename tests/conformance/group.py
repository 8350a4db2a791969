"""A group of real replicas, whatever orders, in the hands of a test: who is heard when, who restarts, what is lost.

Logs, snapshots and wormholes are in memory and answer at once; messages wait until the test delivers them. Nothing here
knows an engine, but for `role`, which names what a member may say only once.
"""

import base64
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
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
from cloudfit_orchestrator.bft.messages import (
    Bundle,
    BundleBody,
    Replies,
    Request,
    StatementMessage,
    bundle_bytes,
    decode_client,
    encode,
    peer_decoder,
)
from cloudfit_orchestrator.bft.pbft import messages as pbft
from cloudfit_orchestrator.bft.replica import Replica
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.bft.usig import messages as usig
from cloudfit_orchestrator.model.record import (
    Client,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.testing.crypto import KeyRing
from cloudfit_orchestrator.testing.wormhole import SimWormhole
from cloudfit_orchestrator.wormhole.refusal import Refusal

CONTROLLER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x09")
TICK_S = 0.05
_decode = peer_decoder(usig.MESSAGES + pbft.MESSAGES)


class Notes:
    """The service: keeps every operation. Its state shows what was executed."""

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        store.put(b"note" + operation, b"")
        return b"noted " + operation


class Node:
    """One member, with its disk and its wormhole. `silent`: none of what it sends arrives."""

    def __init__(self, group: "Group", replica: str, incarnation: int) -> None:
        self.group = group
        self.replica, self.incarnation = replica, incarnation
        self.name = f"{replica}#{incarnation}"
        self.wormhole = SimWormhole(
            group="g", replica=replica, keys=group.keys, controller_keys=[public_bytes(CONTROLLER)],
            rng=random.Random(f"{group.seed} {self.name}"),
        )  # fmt: skip
        self.log: list[bytes] = []
        self.snapshots: dict[tuple[int, int], Snapshot] = {}
        self.sessions: dict[int, int] = {}
        self.said: dict[tuple[Any, ...], bytes] = {}  # what it may say once -> what it said
        self.decided: dict[tuple[int, int], bytes] = {}  # (c, slot) -> digest
        self.certified: set[tuple[int, bytes]] = set()  # (slot, digest) of certificates that it ever held
        self.answers: list[tuple[int, Replies]] = []  # (present configuration, replies)
        self.silent = self.lies = self.down = False
        self.boot()

    def boot(self) -> None:
        """Start from what the disk holds."""
        self.down = False
        self.core = Replica(
            group="g", replica=self.replica, incarnation=self.incarnation, service=Notes(),
            controller_keys=[public_bytes(CONTROLLER)], verifier=self.group.keys, log=list(self.log),
            snapshots=dict(self.snapshots),
        )  # fmt: skip
        for envelope in self.wormhole.greet():
            self.core.record(envelope)
        self.core.tick(self.group.now_s)
        self.run()

    @property
    def correct(self) -> bool:
        return not (self.silent or self.lies)

    def run(self) -> None:
        """Carry out all effects."""
        while not self.down:
            effects = self.core.effects()
            wanted = self.core.needs_session
            if wanted is not None:
                self._open_session(wanted)
            if not effects and wanted is None:
                break
            for effect in effects:
                self._do(effect)
        self._observe()

    def _open_session(self, c: int) -> None:
        try:
            session, next_cv, recent = self.wormhole.open_session(c)
        except Refusal as refusal:
            self.core.refused(c, refusal.code)
            return
        self.sessions[c] = session
        self.core.session(c, next_cv, recent)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Append():
                self.log.append(effect.record)
            case Rewrite():
                self.log = list(effect.records)
            case Certify():
                self._certify(effect)
            case Sign():
                self._sign(effect)
            case EndEpoch():
                with suppress(Refusal):
                    self.core.epoch_ended(self.wormhole.end_epoch(effect.c))
            case Send():
                self._say(effect)
            case Answer():
                message = decode_client(effect.body)
                if isinstance(message, Replies):
                    self.answers.append((self.core.status["c"], message))
            case SaveSnapshot():
                self.snapshots[effect.c, effect.slot] = effect.snapshot
                self.core.saved(effect.c, effect.slot)
            case DropSnapshots():
                self.snapshots = {name: x for name, x in self.snapshots.items() if name in effect.keep}
            case Report():
                self.group.reported(self, effect.topic, effect.body)

    def _certify(self, effect: Certify) -> None:
        try:
            certificate = self.wormhole.create_ui(self.sessions[effect.c], effect.c, effect.cv, effect.digest)
        except Refusal as refusal:
            self.core.refused(effect.c, refusal.code)
            return
        self.core.certified(effect.c, effect.cv, certificate)

    def _sign(self, effect: Sign) -> None:
        try:
            signature = self.wormhole.sign(effect.c, effect.kind, effect.body)
        except Refusal:
            return
        self.core.signed(effect.token, signature)

    def _say(self, effect: Send) -> None:
        for c, key, content in role(_decode(effect.body), self.replica):
            known = self.said.setdefault((c, *key), content)
            assert known == content, f"{self.name} contradicts itself: {key} in c={c}"
        if not self.silent:
            self.group.flying.append((self.name, effect.peer, self._lie(effect.body) if self.lies else effect.body))

    def _lie(self, body: bytes) -> bytes:
        """Another state than the own in each CHECKPOINT, well signed."""
        message = _decode(body)
        if not isinstance(message, StatementMessage) or message.kind != Kind.CHECKPOINT:
            return body
        wrong = message.body[:-1] + bytes([message.body[-1] ^ 1])
        with suppress(Refusal):
            signature = self.wormhole.sign(message.c, Kind.CHECKPOINT, wrong)
            return encode(StatementMessage(message.c, message.replica, message.kind, wrong, signature))
        return body

    def _observe(self) -> None:
        at = self.core._at
        if at.ordering is None:
            return
        held = at.ordering.statements.certificates.values()
        self.certified.update((certificate.slot, certificate.digest) for certificate in held)
        if not at.installed:
            return
        for s, digest in at.execution.history.items():
            self.decided[at.c, s] = digest
            checked = at.ordering.batches.checked(digest)
            if checked is not None:
                self.group.contents[digest] = checked

    @property
    def operations(self) -> list[bytes]:
        """What its state holds."""
        return [key[4:] for key, _ in self.core._at.execution.store.items(b"note")]


def role(message: object, me: str) -> Iterator[tuple[int, tuple[Any, ...], bytes]]:
    """(c, what a correct member says once, what it says) of an own message."""
    if isinstance(message, usig.StreamMessage) and message.replica == me:
        yield message.c, ("counter", message.cv), message.digest
    elif isinstance(message, pbft.Vote) and message.replica == me:
        yield message.c, ("vote", message.phase, message.g, message.s), message.digest
    elif isinstance(message, pbft.Change) and message.replica == me:
        body = pbft.decode_body(message.body)
        what = body.target if isinstance(body, pbft.ViewChange) else body.g
        yield message.c, (type(body).__name__, what), message.body


class Group:
    """`n` members r0…, f of which may be faulty; one client."""

    def __init__(self, algorithm: str, *, n: int, f: int, seed: int = 1, period: int = 4, window: int = 16) -> None:
        self.seed = seed
        self.records: list[ConfigRecord] = []
        self.rng = random.Random(f"conformance {seed}")
        self.keys = KeyRing()
        self.now_s = 0.0
        self.flying: list[tuple[str, str, bytes]] = []
        self.confirmed: dict[tuple[int, int, bytes], dict[str, bytes]] = {}  # (c', h, digest) -> replica -> signature
        self.contents: dict[bytes, Any] = {}  # digest -> Checked
        self.client = self.keys.generate(self.rng)
        self.issued: list[bytes] = []
        self.reports: list[tuple[str, str, dict[str, Any]]] = []
        self.chain: list[bytes] = []
        self.active: ConfigRecord | None = None
        self.f = f
        self.parameters = Parameters(
            checkpoint_period=period, window=window, max_batch_requests=4, max_batch_bytes=1 << 16,
            client_window=256, progress_timeout_ms=500,
        )  # fmt: skip
        self.algorithm = algorithm
        self.nodes = {f"r{i}#{i + 1}": Node(self, f"r{i}", i + 1) for i in range(n)}
        self.reconfigure()

    @property
    def correct(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.correct]

    # ------------------------------------------------------------------------------------------------------- records
    def prepare(self, **changes: Any) -> ConfigRecord:
        """Write a PREPARED record and show it to all."""
        c = max([0, *(record.c for record in self.records)]) + 1
        members = []
        for node in self.nodes.values():
            usig_key, kss_key = node.wormhole.prepare(c)
            members.append(
                Member(
                    node.replica, node.incarnation, f"cloud-{node.replica}", f"{node.replica}:1", usig_key, kss_key,
                    b"ca " + node.name.encode(), "sha256:" + "0" * 64, "sha256:" + "1" * 64,
                )
            )  # fmt: skip
        record = ConfigRecord(
            "g", c, self.active.c if self.active else None, tuple(members),
            (Client("client", self.client.public, b"certificate"),), "notes", self.f, 0, self.algorithm,
            self.parameters, record_hash(self.chain[-1]) if self.chain else bytes(32),
        )  # fmt: skip
        record = replace(record, **changes)
        self.records.append(record)
        self._show(seal_record(record, CONTROLLER))
        return record

    def _show(self, envelope: bytes) -> None:
        self.chain.append(envelope)
        for node in self.nodes.values():
            node.wormhole.install(envelope)
            if not node.down:
                node.core.record(envelope)
                node.run()

    def activate(self, record: ConfigRecord) -> bool:
        """The compare-and-swap of ACTIVE, if some state has its confirmations."""
        for (c, h, digest), signatures in sorted(self.confirmed.items()):
            if c == record.c and len(signatures) >= record.confirmations_needed:
                prepared = record_hash(seal_record(record, CONTROLLER))
                self.active = record.activated(
                    prepared=prepared, previous=record_hash(self.chain[-1]), h=h, digest=digest,
                    confirmations=[Confirmation(r, s) for r, s in sorted(signatures.items())],
                )  # fmt: skip
                self._show(seal_record(self.active, CONTROLLER))
                return True
        return False

    def confirmations(self, record: ConfigRecord) -> dict[tuple[int, bytes], dict[str, bytes]]:
        """(h, digest) -> member -> signature, of what was confirmed for that record."""
        return {(h, digest): found for (c, h, digest), found in self.confirmed.items() if c == record.c}

    def reconfigure(self, *, seconds: float = 40.0, **changes: Any) -> ConfigRecord:
        """PREPARED, wedges, confirmations, ACTIVE, installed by all that are correct and run."""
        record = self.prepare(**changes)
        assert self.settle(lambda: self.activate(record), seconds), f"c={record.c} is not ACTIVE after {seconds} s"
        running = [node for node in self.correct if not node.down]
        assert self.settle(lambda: all(node.core.status["live"] for node in running), seconds), "not all are live"
        assert self.active is not None
        return self.active

    def reported(self, node: Node, topic: str, body: dict[str, Any]) -> None:
        self.reports.append((node.name, topic, body))
        if topic == "confirm":
            name = (body["c"], body["h"], base64.b64decode(body["digest"]))
            self.confirmed.setdefault(name, {})[node.replica] = base64.b64decode(body["signature"])

    # ------------------------------------------------------------------------------------------------------- events
    def submit(self, *to: str, number: int | None = None) -> bytes:
        """A new request (or that with `number` again), to these members, to all if none is named."""
        if number is None:
            number = len(self.issued) + 1
            self.issued.append(number.to_bytes(4, "big"))
        operation = self.issued[number - 1]
        assert self.active is not None
        body = encode(BundleBody(self.active.life, self.client.public, (Request(number, operation),)))
        bundle = encode(Bundle(body, self.client.sign(bundle_bytes(body))))
        for node in self.nodes.values():
            if not node.down and (not to or node.replica in to):
                node.core.from_client(self.client.public, bundle)
                node.run()
        return operation

    def deliver(self, index: int = 0) -> None:
        """One message that is on its way."""
        sender, peer, body = self.flying.pop(index)
        node = self.nodes.get(peer)
        if node is not None and not node.down:
            node.core.receive(sender, body)
            node.run()

    def deliver_all(self, most: int = 100_000) -> None:
        """What is on its way, and what follows from it, in order."""
        while self.flying:
            most -= 1
            assert most > 0, "a storm of messages"
            self.deliver()

    def tick(self, seconds: float = TICK_S) -> None:
        """Time passes."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            for node in self.nodes.values():
                if not node.down:
                    node.core.tick(self.now_s)
                    node.run()

    def settle(self, done: Any, seconds: float) -> bool:
        """The network delivers everything at once; until `done()`, or for so long."""
        until = self.now_s + seconds
        while not done():
            if self.now_s >= until:
                return False
            self.deliver_all()
            self.tick()
        return True

    def storm(self, steps: int, *, crash: bool = False) -> None:
        """Random events: messages are delivered in any order, lost, doubled; requests come; time passes."""
        rng = self.rng
        for _ in range(steps):
            dice = rng.random()
            if dice < 0.72 and self.flying:
                self.deliver(rng.randrange(len(self.flying)))
            elif dice < 0.76 and self.flying:
                self.flying.pop(rng.randrange(len(self.flying)))
            elif dice < 0.78 and self.flying:
                self.flying.append(rng.choice(self.flying))
            elif dice < 0.86:
                self.submit(*rng.sample([node.replica for node in self.nodes.values()], 2))
            elif crash and dice < 0.88:
                rng.choice(self.correct).boot()
            else:
                self.tick()

    def finish(self, seconds: float = 120.0) -> bool:
        """The network heals, the client asks again: whether all that was issued is in all correct states."""
        for number in range(1, len(self.issued) + 1):
            self.submit(number=number)
        wanted = sorted(self.issued)
        return self.settle(lambda: all(sorted(node.operations) == wanted for node in self.correct), seconds)
