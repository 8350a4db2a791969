"""What a Byzantine member of a PBFT group does beside what any does: no counter stops it from saying two things.

Its KSS signs whatever it asks for, under its own name. Each behaviour is applied to one effect after the other.
"""

import random
from collections import deque
from collections.abc import Callable

import msgspec

from cloudfit_orchestrator.bft.effects import Effect, Send
from cloudfit_orchestrator.bft.messages import NOOP, Named, Signed, encode, peer_decoder
from cloudfit_orchestrator.bft.pbft.messages import (
    MESSAGES,
    WEDGE,
    Change,
    NewView,
    Phase,
    Prepared,
    ViewChange,
    Vote,
    change_statement,
    decode_body,
    vote_statement,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.testing.machine import Behaviour, Machine
from cloudfit_orchestrator.wormhole.refusal import Refusal

Done = list[tuple[float, Effect]]  # as in `behaviours.py`
MAX_HEARD = 64  # votes of others that are remembered, to vote for again when it must not be
_decode = peer_decoder(MESSAGES)


class Says:
    """Base: changes what is sent to peers, and may have other things signed."""

    def __init__(self, rng: random.Random) -> None:
        """`rng` makes all choices."""
        self._rng = rng

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""

    def effects(self, machine: Machine, effect: Effect) -> Done:
        """See `Behaviour`."""
        if not isinstance(effect, Send):
            return [(0, effect)]
        try:
            message = _decode(effect.body)
        except BadError:  # not of this engine, or another behaviour's garbage
            return [(0, effect)]
        if isinstance(message, Vote | Change) and message.replica == machine.identity.replica:
            return self.say(machine, effect, message)
        return [(0, effect)]

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """What is done in place of sending the own `message`."""
        raise TypeError(f"{type(self).__name__} does not say what it does with {effect} of {machine} and {message}")

    @staticmethod
    def vote(machine: Machine, like: Vote, **changes: object) -> Vote | None:
        """Another vote, well signed, without a batch."""
        vote = msgspec.structs.replace(like, batch=b"", **changes)
        try:
            statement = vote_statement(vote.phase, vote.g, vote.s, vote.digest)
            signature = machine.wormhole.sign(vote.c, Kind.PBFT, statement)
        except (Refusal, BadError):
            return None
        return msgspec.structs.replace(vote, signature=signature)

    @staticmethod
    def change(machine: Machine, c: int, body: ViewChange | NewView) -> Change | None:
        """Another VIEW-CHANGE or NEW-VIEW, well signed."""
        data = encode(body)
        try:
            signature = machine.wormhole.sign(c, Kind.PBFT, change_statement(data))
        except Refusal:
            return None
        return Change(c, machine.identity.replica, data, signature)


class Equivocates(Says):
    """Says one thing to some and another to the rest, in all three phases: a batch here, a no-op there."""

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        if not isinstance(message, Vote):
            return [(0, effect)]
        side = random.Random(f"{effect.peer} {message.s // 3}").random() < 0.5  # whom it fools changes now and then
        other = self.vote(machine, message, digest=NOOP) if side and message.digest != NOOP else None
        return [(0, effect)] if other is None else [(0, Send(effect.peer, encode(other)))]


class VotesTwice(Says):
    """Says both things to everybody, the wrong one first now and then."""

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        other = self.vote(machine, message, digest=NOOP) if isinstance(message, Vote) else None
        if other is None:
            return [(0, effect)]
        both: Done = [(0, effect), (0, Send(effect.peer, encode(other)))]
        return both if self._rng.random() < 0.5 else both[::-1]


class Forgets(Says):
    """Sends some peers VIEW-CHANGEs and wedges that show nothing prepared: well signed, and untrue."""

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        if not isinstance(message, Change) or random.Random(effect.peer).random() < 0.4:
            return [(0, effect)]
        body = decode_body(message.body)
        other = None
        if isinstance(body, ViewChange):
            kept = tuple(prepared for prepared in body.prepared if self._rng.random() < 0.3)
            other = self.change(machine, message.c, msgspec.structs.replace(body, prepared=kept))
        return [(0, effect)] if other is None else [(0, Send(effect.peer, encode(other)))]


class ForgesCertificates(Says):
    """Sends VIEW-CHANGEs whose prepared certificates are made up, and NEW-VIEWs that name what does not exist."""

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        if not isinstance(message, Change):
            return [(0, effect)]
        body = decode_body(message.body)
        forged: ViewChange | NewView
        if isinstance(body, ViewChange):
            prepares = tuple(Signed(f"r{i}", self._rng.randbytes(64)) for i in range(1, 3))
            lie = Prepared(body.h + 1, max(0, min(body.target - 1, 3)), NOOP, self._rng.randbytes(64), prepares)
            forged = msgspec.structs.replace(body, prepared=(lie,))
        else:
            names = tuple(Named(named.replica, 0, self._rng.randbytes(32)) for named in body.view_changes)
            forged = NewView(body.replica, body.g, names)
        other = self.change(machine, message.c, forged)
        return [(0, effect)] if other is None else [(0, Send(effect.peer, encode(other))), (0, effect)]


class AsksForViews(Says):
    """Asks for later views all the time, and for absurd ones."""

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        found: Done = [(0, effect)]
        if isinstance(message, Vote) and self._rng.random() < 0.1:
            target = self._rng.choice([1, 2, 3, 4, 5, 1000, WEDGE - 1])
            other = self.change(machine, message.c, ViewChange(message.replica, target, 0, bytes(32), (), ()))
            if other is not None:
                found.append((0, Send(effect.peer, encode(other))))
        return found


class VotesOn(Says):
    """Goes on voting for what it has heard, in views that it has left and after its wedge."""

    def __init__(self, rng: random.Random) -> None:
        """See `Says`."""
        super().__init__(rng)
        self._heard: deque[Vote] = deque(maxlen=MAX_HEARD)

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""
        try:
            message = _decode(body)
        except BadError:
            return
        if isinstance(message, Vote):
            self._heard.append(message)

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        found: Done = [(0, effect)]
        if isinstance(message, Change) or self._rng.random() < 0.2:
            for vote in list(self._heard)[-8:]:
                again = self.vote(machine, vote, replica=machine.identity.replica, phase=int(Phase.COMMIT))
                if again is not None and again.c == message.c:
                    found.append((0, Send(effect.peer, encode(again))))
        return found


class NeverProposes(Says):
    """From some moment on keeps its PRE-PREPAREs from everybody."""

    def __init__(self, rng: random.Random) -> None:
        """See `Says`."""
        super().__init__(rng)
        self._left = rng.randint(0, 20)

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        del machine
        if isinstance(message, Vote) and message.phase == Phase.PRE_PREPARE:
            self._left -= 1
            if self._left < 0:
                return []
        return [(0, effect)]


class DelaysVotes(Says):
    """Shows its votes late."""

    def __init__(self, rng: random.Random) -> None:
        """See `Says`."""
        super().__init__(rng)
        self._late_s = rng.choice([0.1, 0.5, 2.0])

    def say(self, machine: Machine, effect: Send, message: Vote | Change) -> Done:
        """See `Says`."""
        del machine, message
        return [(self._late_s, effect)]


ALL: dict[str, Callable[[random.Random], Behaviour]] = {
    "equivocates": Equivocates,
    "votes-twice": VotesTwice,
    "forgets": Forgets,
    "forges-certificates": ForgesCertificates,
    "asks-for-any-view": AsksForViews,
    "votes-on": VotesOn,
    "keeps-proposals": NeverProposes,
    "delays-votes": DelaysVotes,
}
