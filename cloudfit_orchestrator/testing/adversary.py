"""The entry of the adversary image: a replica that works well until the command `misbehave` says how it shall not.

It has what a taken-over machine has: its own wormhole signs for it what it asks for, under its own name. It exists for
tests and the demo; the launcher refuses its image unless the spec says `allow_adversary: true`.

- `replies`: changes results and has the changed ones signed, so clients see well-signed lies.
- `digests`: has a wrong digest signed for each of its checkpoints.
- `disk`: flips bytes in the chunks of its own stored snapshots.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from cloudfit_orchestrator.bft.clients import reply_root
from cloudfit_orchestrator.bft.effects import Answer, Effect, SaveSnapshot, Send
from cloudfit_orchestrator.bft.messages import Replies, Result, StatementMessage, decode_client, encode, reply_leaf
from cloudfit_orchestrator.bft.store import BUCKETS
from cloudfit_orchestrator.bft.usig.messages import decode_peer
from cloudfit_orchestrator.guest import machine
from cloudfit_orchestrator.guest.runtime import Runtime
from cloudfit_orchestrator.model.channel import SIGN_HEAD, FrameKind
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

WAYS = frozenset({"replies", "digests", "disk"})
MAX_FLIPPED = 40  # chunks of each snapshot: enough to see, few enough to list
MAX_SIGNED = 256  # wrong checkpoints remembered


def flipped(data: bytes) -> bytes:
    """The same bytes but for one bit of the last; something for nothing."""
    return data[:-1] + bytes([data[-1] ^ 1]) if data else b"\x01"


class Adversary(Runtime):
    """A runtime that carries out some effects dishonestly. The core does not know."""

    def __init__(self, **options: Any) -> None:
        """As `Runtime`."""
        super().__init__(**options)
        self.ways: frozenset[str] = frozenset()
        self._checkpoints: dict[tuple[int, bytes], StatementMessage | None] = {}

    def command(self, body: dict[str, Any]) -> None:
        """`{"op": "misbehave", "how": […]}` is obeyed here; the rest is the core's."""
        if body.get("op") != "misbehave":
            super().command(body)
            return
        self.ways = WAYS & set(body.get("how", ()))
        machine.log("misbehaves", how=sorted(self.ways))
        if "disk" in self.ways:
            for c, slot in list(self.durable.snapshots.indexes):
                self._corrupt(c, slot)

    def carry_out(self, effect: Effect) -> None:
        """Lie where a lie is wanted, otherwise as `Runtime`."""
        if "replies" in self.ways and isinstance(effect, Answer):
            self._lie_to_client(effect)
        elif "digests" in self.ways and isinstance(effect, Send):
            self._lie_to_peer(effect)
        else:
            super().carry_out(effect)

    def saved(self, effect: SaveSnapshot) -> None:
        """Damage what was saved before telling the core."""
        if "disk" in self.ways:
            self._corrupt(effect.c, effect.slot)
        super().saved(effect)

    def _lie_to_client(self, effect: Answer) -> None:
        message = decode_client(effect.body)
        if not isinstance(message, Replies):
            super().carry_out(effect)
            return
        results = tuple(Result(r.number, flipped(r.result)) for r in message.results)
        root = reply_root(reply_leaf(effect.client, results), message.path)

        def send(signature: bytes) -> None:
            lie = Replies(message.replica, message.c, message.slot, results, message.path, signature)
            self.transport.answer(effect.client, encode(lie))

        self._sign(message.c, Kind.REPLY, LAYOUT[Kind.REPLY].pack(message.slot, root), send)

    def _lie_to_peer(self, effect: Send) -> None:
        message = decode_peer(effect.body)
        if not isinstance(message, StatementMessage) or message.kind != Kind.CHECKPOINT:
            super().carry_out(effect)
            return
        name = (message.c, message.body)
        if name in self._checkpoints:
            lie = self._checkpoints[name]
            if lie is not None:
                self.transport.send(effect.peer, encode(lie))
            return
        if len(self._checkpoints) >= MAX_SIGNED:
            del self._checkpoints[next(iter(self._checkpoints))]
        self._checkpoints[name] = None
        body = flipped(message.body)

        def send(signature: bytes) -> None:
            lie = StatementMessage(message.c, message.replica, message.kind, body, signature)
            self._checkpoints[name] = lie
            for peer in self.replica.peers:
                self.transport.send(peer, encode(lie))

        self._sign(message.c, Kind.CHECKPOINT, body, send)

    def _sign(self, c: int, kind: Kind, body: bytes, then: Callable[[bytes], None]) -> None:
        future = self.channel.request(FrameKind.SIGN, SIGN_HEAD.pack(c, kind) + body)

        def answered(_: object) -> None:
            if not future.cancelled() and future.exception() is None:
                then(future.result())

        future.add_done_callback(answered)

    def _corrupt(self, c: int, slot: int) -> None:
        files = self.durable.snapshots
        index = files.indexes.get((c, slot))
        if index is None:
            return
        full = [i for i in range(BUCKETS) if index.heads[i]]
        for i in full[:: max(1, len(full) // MAX_FLIPPED)][:MAX_FLIPPED]:
            if files.is_sound(index, i):
                path, offset, length = files.piece_of(index, i)
                with path.open("r+b") as segment:
                    segment.seek(offset)
                    body = segment.read(length)
                    segment.seek(offset)
                    segment.write(flipped(body))
                    segment.flush()
                    os.fsync(segment.fileno())  # so that a snapshot of the disk shows it


async def adversary(where: machine.Machine) -> None:
    """Run the adversary of this machine."""
    await Adversary(
        port=where.port,
        state=where.state,
        prepare_network=where.prepare_network,
        announce_ready=where.announce_ready,
        log=machine.log,
    ).run()


if __name__ == "__main__":
    sys.exit(machine.run(adversary))
