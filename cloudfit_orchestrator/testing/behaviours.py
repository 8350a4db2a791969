"""What a Byzantine machine does: small behaviours that are put together.

A taken-over guest can do all that its core asks for in another way, leave it out, or add to it. It cannot make the
wormhole certify a counter twice or sign an untyped statement. Each behaviour is applied to one effect after the other.
"""

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from cloudfit_orchestrator.bft.effects import Answer, Certify, Effect, Send, Sign
from cloudfit_orchestrator.bft.messages import (
    BatchMessage,
    Chunk,
    Frozen,
    Read,
    ReadReply,
    Seen,
    StatementMessage,
    decode_client,
    encode,
    peer_decoder,
    seen_digest,
)
from cloudfit_orchestrator.bft.pbft import messages as pbft
from cloudfit_orchestrator.bft.usig import messages as usig
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    Entry,
    Header,
    NewView,
    Prepare,
    Req,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    decode_header,
    decode_peer,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import WITH_WORMHOLE
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.testing import pbft_behaviours
from cloudfit_orchestrator.testing.machine import Behaviour, Machine
from cloudfit_orchestrator.testing.puppet import LIES, Puppet
from cloudfit_orchestrator.wormhole.refusal import Refusal

Done = list[tuple[float, Effect]]  # what is done: delay in seconds and effect, in order
MAX_KEPT = 200  # frames kept for replay
PUPPETS = 0.35  # of taken machines: the strongest adversary, alone or in collusion


class Deaf:
    """Base of behaviours that do not depend on what others say."""

    def __init__(self, rng: random.Random) -> None:
        """`rng` makes all choices."""
        self._rng = rng

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""


decode = peer_decoder(usig.MESSAGES + pbft.MESSAGES)  # any message of a member, whatever its engine


class OnSend(Deaf):
    """Base of behaviours that change what is sent to peers, and nothing else."""

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        del machine
        if not isinstance(effect, Send):
            return [(0, effect)]
        try:
            message = decode(effect.body)
        except BadError:  # another behaviour's garbage
            return [(0, effect)]
        return self.send(effect, message)

    def send(self, effect: Send, message: Frozen) -> Done:
        """What is done in place of `effect`, whose body is `message`."""
        raise TypeError(f"{type(self).__name__} does not say what it does with {effect} and {message}")


class Silent(OnSend):
    """Says nothing to anybody."""

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        del machine
        return [] if isinstance(effect, Send | Answer) else [(0, effect)]


class SelectiveSend(OnSend):
    """Leaves out most of what goes to some peers, so that their cursors into its stream have gaps."""

    def __init__(self, rng: random.Random) -> None:
        """See `OnSend`."""
        super().__init__(rng)
        self._left_out: dict[str, float] = {}

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        del message
        rate = self._left_out.setdefault(effect.peer, self._rng.choice([0.0, 0.5, 0.9, 1.0]))
        return [] if self._rng.random() < rate else [(0, effect)]


class WithholdBatches(OnSend):
    """Proposes, but shows the batch to few, and never hands one out when asked."""

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        if isinstance(message, BatchMessage):
            return []
        if isinstance(message, StreamMessage | pbft.Vote) and message.batch and self._rng.random() < 0.7:
            return [(0, Send(effect.peer, encode(msgspec.structs.replace(message, batch=b""))))]
        return [(0, effect)]


class WrongBatches(OnSend):
    """Attaches other batches than the one that its PREPARE names."""

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        if isinstance(message, StreamMessage) and message.batch and self._rng.random() < 0.5:
            return [(0, Send(effect.peer, encode(msgspec.structs.replace(message, batch=b"\x91\xc4\x01x"))))]
        return [(0, effect)]


class WrongPayloads(OnSend):
    """Shows NEW-VIEWs with another payload than the one that was certified."""

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        if isinstance(message, StreamMessage) and message.payload and self._rng.random() < 0.7:
            return [(0, Send(effect.peer, encode(msgspec.structs.replace(message, payload=b"\x92\x90\x90"))))]
        return [(0, effect)]


class DelaysUIs(OnSend):
    """Holds its stream back: certified, but shown late, in order."""

    def __init__(self, rng: random.Random) -> None:
        """See `OnSend`."""
        super().__init__(rng)
        self._late_s = rng.choice([0.1, 0.5, 2.0])

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        return [(self._late_s if isinstance(message, StreamMessage) else 0, effect)]


class CorruptChunks(OnSend):
    """Hands out wrong state."""

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        if isinstance(message, Chunk) and self._rng.random() < 0.5:
            return [(0, Send(effect.peer, encode(msgspec.structs.replace(message, data=message.data + b"\0"))))]
        return [(0, effect)]


class NeverProposes(OnSend):
    """From some moment on keeps its PREPAREs, and so all that follows them in its stream, from everybody."""

    def __init__(self, rng: random.Random) -> None:
        """See `OnSend`."""
        super().__init__(rng)
        self._left = rng.randint(0, 20)

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        if isinstance(message, StreamMessage) and _is_prepare(message):
            self._left -= 1
            if self._left < 0:
                return []
        return [(0, effect)]


def _is_prepare(message: StreamMessage) -> bool:
    try:
        return isinstance(decode_header(message.header), Prepare)
    except BadError:  # another behaviour's garbage
        return False


class Replays(OnSend):
    """Sends old frames again, to anybody."""

    def __init__(self, rng: random.Random) -> None:
        """See `OnSend`."""
        super().__init__(rng)
        self._kept: deque[bytes] = deque(maxlen=MAX_KEPT)

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        del message
        self._kept.append(effect.body)
        again = [(self._rng.uniform(0, 2), Send(effect.peer, self._rng.choice(self._kept)))]
        return [(0, effect), *(again if self._rng.random() < 0.2 else [])]


class Garbage(OnSend):
    """Adds frames of random bytes, and frames with a few bytes changed."""

    def send(self, effect: Send, message: Frozen) -> Done:
        """See `OnSend`."""
        del message
        if self._rng.random() < 0.9:
            return [(0, effect)]
        body = bytearray(effect.body)
        for _ in range(self._rng.randint(1, 3)):
            body[self._rng.randrange(len(body))] = self._rng.randrange(256)
        noise = self._rng.randbytes(self._rng.randint(0, 60))
        return [(0, effect), (0, Send(effect.peer, bytes(body))), (0, Send(effect.peer, noise))]


class WrongStatements(Deaf):
    """Has the KSS sign wrong checkpoints, decisions, confirmations and roots of replies: the wormhole cannot tell."""

    KINDS = frozenset({Kind.CHECKPOINT, Kind.DECIDED, Kind.REPLY, Kind.CONFIRM})

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        del machine
        if isinstance(effect, Sign) and effect.kind in self.KINDS and self._rng.random() < 0.8:
            body = effect.body[:-1] + bytes([effect.body[-1] ^ 1])
            return [(0, Sign(effect.c, effect.kind, body, effect.token))]
        return [(0, effect)]


class AsksForViews(Deaf):
    """Asks for later views all the time, and for absurd ones."""

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        found: Done = [(0, effect)]
        if not isinstance(effect, Certify) or self._rng.random() > 0.3:
            return found
        body = LAYOUT[Kind.REQ].pack(self._rng.choice([1, 2, 3, 4, 5, 6, 1000, 1 << 62]))
        try:
            signature = machine.wormhole.sign(effect.c, Kind.REQ, body)
        except Refusal:
            return found
        statement = encode(StatementMessage(effect.c, machine.identity.replica, Kind.REQ, body, signature))
        return [*found, *((0, Send(peer, statement)) for peer in machine.peers)]


class Forges(Deaf):
    """At some moment certifies a message that breaks the rules in place of its own, shows it, and then no more."""

    def __init__(self, rng: random.Random) -> None:
        """See `Deaf`."""
        super().__init__(rng)
        self._left = rng.randint(0, 60)

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        if not isinstance(effect, Certify):
            return [(0, effect)]
        self._left -= 1
        if self._left >= 0:
            return [(0, effect)]
        if self._left < -1:
            return []
        header = self._header(machine, effect.c)
        payload = b"\x92\x90\x90" if isinstance(header, NewView) else b""  # no view changes, no choices
        try:
            forged = encode(machine.forge(effect.c, effect.cv, encode(header), payload))
        except Refusal:
            self._left = 0  # something is still on its way before it: the next one
            return [(0, effect)]
        return [(0, Send(peer, forged)) for peer in machine.peers]

    def _header(self, machine: Machine, c: int) -> Header:
        g, s = self._rng.randint(0, 4), self._rng.randint(0, 40)
        me = machine.identity.replica
        choices: list[Header] = [
            Prepare(c, g, s, self._rng.randbytes(32)),
            Skip(c, g, s, s + self._rng.choice([0, 3, 10**9])),
            Commit(c, g, (Entry(s, s, me, 1, encode(Prepare(c, g, s, bytes(32))), bytes(64)),)),
            Stable(c, 10**9, bytes(32), (), 0, 0, 10**9, (), (), ()),
            ViewChange(c, g + 1, (), ()),
            NewView(c, g, 0, s, (), ()),
        ]
        return self._rng.choice(choices)


class PlantsRequests(Deaf):
    """Sends a VIEW-CHANGE whose certificate holds, but has one REQ more, which is forged; and asks for that view."""

    def __init__(self, rng: random.Random) -> None:
        """See `Deaf`."""
        super().__init__(rng)
        self._heard: dict[str, Req] = {}
        self._c = 0
        self._done = False

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""
        try:
            message = decode_peer(body)
        except BadError:
            return
        if isinstance(message, StatementMessage) and message.kind == Kind.REQ:
            if message.c != self._c:
                self._c = message.c
                self._heard.clear()
            (target,) = LAYOUT[Kind.REQ].unpack(message.body)
            self._heard[message.replica] = Req(message.replica, target, message.signature)

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        if not isinstance(effect, Certify):
            return [(0, effect)]
        if self._done:
            return []
        good = [req for req in self._heard.values() if req.replica != machine.identity.replica and effect.c == self._c]
        others = sorted({peer.split("#")[0] for peer in machine.peers} - {req.replica for req in good})
        if not good or not others:
            return [(0, effect)]
        g = good[0].target
        try:
            absurd = LAYOUT[Kind.REQ].pack(1 << 60)
            mine = machine.wormhole.sign(effect.c, Kind.REQ, absurd)
            certificate = (
                good[0],
                Req(machine.identity.replica, 1 << 60, mine),
                Req(others[0], 1 << 60, bytes(64)),
            )
            header = encode(ViewChange(effect.c, g, certificate, ()))
            planted = machine.forge(effect.c, effect.cv, header)
        except Refusal:
            return [(0, effect)]
        self._done = True
        me = machine.identity.replica
        frames = [
            encode(planted),
            encode(StatementMessage(effect.c, me, Kind.REQ, absurd, mine)),
        ]
        return [(0, Send(peer, frame)) for peer in machine.peers for frame in frames]


class CrowdsCheckpoints(Deaf):
    """Signs CHECKPOINTs for slots that have none, to crowd out the others."""

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        found: Done = [(0, effect)]
        if not isinstance(effect, Sign) or effect.kind is not Kind.CHECKPOINT:
            return found
        slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(effect.body)
        for more in range(1, 20):
            body = LAYOUT[Kind.CHECKPOINT].pack(slot + more, digest)
            try:
                signature = machine.wormhole.sign(effect.c, Kind.CHECKPOINT, body)
            except Refusal:
                return found
            frame = encode(StatementMessage(effect.c, machine.identity.replica, Kind.CHECKPOINT, body, signature))
            found += [(0, Send(peer, frame)) for peer in machine.peers]
        return found


class OldReads(Deaf):
    """Answers reads as it answered them first, under each configuration whose epoch is open, and never refuses."""

    def __init__(self, rng: random.Random) -> None:
        """See `Deaf`."""
        super().__init__(rng)
        self._first: dict[bytes, Seen] = {}  # operation -> the first answer to it

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        if not isinstance(effect, Answer):
            return [(0, effect)]
        try:
            reply = decode_client(effect.body)
        except BadError:  # another behaviour's garbage
            return [(0, effect)]
        operations = self._asked(machine, effect.client, reply.number) if isinstance(reply, ReadReply) else ()
        if not isinstance(reply, ReadReply) or not operations:
            return [(0, effect)]
        for operation, seen in zip(operations, reply.seen, strict=False):
            self._first.setdefault(operation, seen)
        if not self._first.keys() >= set(operations):
            return [(0, effect)]
        old = tuple(self._first[operation] for operation in operations)
        found: Done = []
        for c in machine.wormhole.alive:
            slot = max(seen.slot for seen in old)
            body = LAYOUT[Kind.READ].pack(effect.client, reply.number, slot, seen_digest(operations, old))
            try:
                signature = machine.wormhole.sign(c, Kind.READ, body)
            except Refusal:
                continue
            lie = ReadReply(reply.replica, c, reply.number, slot, old, signature)
            found.append((0, Answer(effect.client, encode(lie))))
        return found

    @staticmethod
    def _asked(machine: Machine, client: bytes, number: int) -> tuple[bytes, ...]:
        for who, frame in machine.heard_clients:
            with contextlib.suppress(BadError):  # of a Byzantine client
                message = decode_client(frame)
                if who == client and isinstance(message, Read) and message.number == number:
                    return message.operations
        return ()


ALL: dict[str, Callable[[random.Random], Behaviour]] = {
    "silent": Silent,
    "selective": SelectiveSend,
    "withhold": WithholdBatches,
    "wrong-batches": WrongBatches,
    "wrong-payloads": WrongPayloads,
    "wrong-statements": WrongStatements,
    "asks-for-views": AsksForViews,
    "forges": Forges,
    "plants-requests": PlantsRequests,
    "crowds-checkpoints": CrowdsCheckpoints,
    "replays": Replays,
    "delays": DelaysUIs,
    "corrupt-chunks": CorruptChunks,
    "never-proposes": NeverProposes,
    "garbage": Garbage,
}
STRONGEST: dict[str, Callable[[random.Random], Behaviour]] = {
    "puppet": Puppet,
    **{f"puppet-{lie}": partial(Puppet, lie=lie) for lie in LIES},
}

# Of reads that are not ordered: for the profile that has them, so that the draws of the others stay as they are.
OF_READS: dict[str, Callable[[random.Random], Behaviour]] = {"old-reads": OldReads}

# Of the behaviours above, those that mean something to an engine without streams; more are in `pbft_behaviours.py`.
_SHARED = [
    "silent",
    "selective",
    "withhold",
    "wrong-statements",
    "crowds-checkpoints",
    "replays",
    "corrupt-chunks",
    "garbage",
]
WITHOUT_WORMHOLE = {name: ALL[name] for name in _SHARED} | pbft_behaviours.ALL


EVERY = ALL | STRONGEST | WITHOUT_WORMHOLE | OF_READS


class Together:
    """Several behaviours, each applied to what the ones before it leave. `acted` is told when one does something of
    its own: its name, what it leaves out, and what it does instead.
    """

    def __init__(self, parts: dict[str, Behaviour], acted: Callable[[str, Effect, Done], None]) -> None:
        """In this order."""
        self._parts = parts
        self._acted = acted

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""
        for part in self._parts.values():
            part.hear(body)

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        found: Done = [(0, effect)]
        for name, part in self._parts.items():
            before, found = found, []
            for late, one in before:
                done = part.effects(machine, one)
                if done != [(0, one)]:
                    self._acted(name, one, done)
                found += [(late + more, other) for more, other in done]
        return found


def choose(rng: random.Random, algorithm: str) -> tuple[str, ...]:
    """The names of some behaviours of members that order by `algorithm`."""
    if algorithm not in WITH_WORMHOLE:
        return tuple(sorted(rng.sample(sorted(WITHOUT_WORMHOLE), rng.choice([1, 1, 2, 3]))))
    if rng.random() < PUPPETS:
        return (rng.choice(["puppet", rng.choice(sorted(STRONGEST))]),)
    return tuple(sorted(rng.sample(sorted(ALL), rng.choice([1, 1, 2, 3]))))


def together(
    names: Iterable[str], rng: random.Random, acted: Callable[[str, Effect, Done], None] = lambda *_: None
) -> Together:
    """Behaviours by name."""
    return Together({name: EVERY[name](rng) for name in names}, acted)
