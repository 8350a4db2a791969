"""A Byzantine replica that knows everything: it says whatever hurts, in its own name, and never forges a signature.

It lets its core run for a while, then takes the core's voice away and speaks by itself: what a correct replica might
say next, chosen to be awkward (an odd quorum, an old vote, a withheld tail), and now and then what breaks a rule. All
puppets of a run share what the observer knows and show their streams to the same few victims first: they collude.
"""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.effects import Certify, Effect
from cloudfit_orchestrator.bft.messages import NOOP, Bundle, Named, StatementMessage, encode
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.judge import StreamState, leader, proposers
from cloudfit_orchestrator.bft.usig.merge import Merged, merge
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Entry,
    Header,
    Merge,
    NewView,
    Prepare,
    Req,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
)
from cloudfit_orchestrator.bft.usig.stream import Kept
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, SIGNATURE_BYTES, sha256
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.testing.machine import Machine
from cloudfit_orchestrator.wormhole.refusal import Refusal

PACE_S = 0.015  # mean time between two moves
SEVER = 0.05  # share of moves that keep correct replicas apart for a while
SEVERED_S = 0.25
HIDDEN_S = 1.0  # mean time for which a message is kept from who is no victim
MALICE = (0.0, 0.05, 0.2, 0.5)  # share of moves that break a rule
LIES = (
    "late-vote", "far-vote", "again", "proposal", "far-proposal", "other-proposal", "stable", "stable-back",
    "stable-bare", "view", "view-bare", "view-again", "bogus-view", "out-of-turn", "entry", "wedge",
    "forged-request",
)  # fmt: skip
MOVES = {"commit": 9, "prepare": 6, "stable": 4, "commit_view": 7, "new_view": 5, "skip": 1, "ask": 1, "view_change": 2}


class Puppet:
    """See the module. A behaviour (`machine.Behaviour`)."""

    def __init__(self, rng: random.Random, lie: str = "") -> None:
        """`rng` makes all choices. `lie`: its only one, told often; else it has two of `LIES` (the first breach of a
        rule ends its stream, so who tells all kinds gets to tell few).
        """
        self._rng = rng
        self._left = rng.choice([0, 0, 3, 20])  # UIs that the core still gets
        self._lies = [lie] if lie else rng.sample(LIES, 2)
        self._malice = MALICE[-1] if lie else rng.choice(MALICE)
        self._c = 0
        self._cv = 0  # the last counter that was used
        self._moves = list(MOVES)
        self._weights = [weight * rng.choice([0.3, 1, 1, 2]) for weight in MOVES.values()]
        self._voted: set[tuple[int, str, int]] = set()
        self._favourite = rng.getrandbits(16)
        self._name = f"puppet-{lie}" if lie else "puppet"

    def hear(self, body: bytes) -> None:
        """See `Behaviour`."""

    def effects(self, machine: Machine, effect: Effect) -> list[tuple[float, Effect]]:
        """See `Behaviour`."""
        if not isinstance(effect, Certify):
            return [(0, effect)]
        self._left -= 1
        if self._left >= 0 and self._c in (0, effect.c):
            return [(0, effect)]
        if self._c != effect.c:  # the first time, and in each configuration after that
            self._c, self._cv = effect.c, effect.cv - 1
            self._voted.clear()
            self._plan(machine, effect.c)
        return []

    # ------------------------------------------------------------------------------------------------------ one move
    def _plan(self, machine: Machine, c: int) -> None:
        machine.world.schedule.after(self._rng.expovariate(1 / PACE_S), lambda: self._move(machine, c))

    def _move(self, machine: Machine, c: int) -> None:
        judge = machine.world.judge()
        if judge is None or self._c != c or judge.record.c != c or machine.correct:
            return
        self._plan(machine, c)
        if not machine.running or machine.paused or machine.identity.replica not in judge.streams:
            return
        stream = judge.streams[machine.identity.replica]
        if stream.ended is not None or stream.waiting:
            return  # nothing that follows would count; or it cannot be judged yet
        if self._rng.random() < SEVER:
            machine.world.sever(machine, self._rng, self._rng.expovariate(1 / SEVERED_S))
        lies = self._rng.random() < self._malice
        if lies:
            said = self._lie(machine, judge, stream.state)
        else:
            move = self._rng.choices(self._moves, self._weights)[0]
            said = getattr(self, "_" + move)(machine, judge, stream.state)
        if said is not None:
            self._say(machine, *said)
            if lies:
                machine.world.look()

    def _say(self, machine: Machine, header: Header, payload: bytes = b"", batch: bytes = b"") -> None:
        try:
            message = machine.forge(self._c, self._cv + 1, encode(header), payload)
        except Refusal:
            return  # frozen, or the session is a new one: later
        self._cv += 1
        frame = encode(msgspec.structs.replace(message, batch=batch) if batch else message)
        machine.marked[frame] = self._name
        victims = random.Random(self._favourite ^ self._cv // 8)
        for peer in machine.peers:
            if victims.random() < 0.5:
                machine.world.carry(machine, peer, frame)
            elif self._rng.random() < 0.7:
                self._show_later(machine, peer, frame)
        if machine.peers:  # its own core learns of it, and answers who asks for it
            machine.receive(machine.peers[0], encode(message))

    def _show_later(self, machine: Machine, peer: str, frame: bytes) -> None:
        delay_s = self._rng.expovariate(1 / HIDDEN_S)
        machine.world.schedule.after(delay_s, lambda: machine.world.carry(machine, peer, frame))

    # ------------------------------------------------------------------------------------ what a correct one might say
    def _own_slots(self, machine: Machine, judge: Configuration, state: StreamState) -> list[int]:
        if state.v > state.e:
            return []
        turn = proposers(judge.record, state.e, state.blacklist, state.retired)
        last = state.h + judge.record.parameters.window
        me = machine.identity.replica
        return [s for s in range(max(state.p, state.h) + 1, last + 1) if turn[s % len(turn)] == me]

    def _batch(self, machine: Machine) -> tuple[bytes, bytes]:
        """(digest, batch): bundles of clients, perhaps of old; or no batch at all."""
        assert machine.replica is not None
        waiting = [w.data for w in machine.replica._at.pool.bundles()]  # noqa: SLF001
        batch = make_batch(self._rng.sample(waiting, min(len(waiting), 2))) if waiting else make_batch([b"none"])
        configuration = machine.configuration
        held = configuration.batches.all() if configuration is not None else []
        if held and self._rng.random() < 0.3:
            batch = self._rng.choice(held)
        return batch_digest(batch), batch

    def _prepare(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        slots = self._own_slots(machine, judge, state)
        if not slots:
            return None
        digest, batch = self._batch(machine)
        shown = batch if self._rng.random() < 0.7 else b""
        return Prepare(judge.record.c, state.e, self._rng.choice(slots[:2]), digest), b"", shown

    def _skip(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        slots = self._own_slots(machine, judge, state)
        if not slots:
            return None
        first, last = sorted(self._rng.choices(slots, k=2))
        return (Skip(judge.record.c, state.e, first, last),)

    def _proposals(self, judge: Configuration, me: str, fits: Callable[[Prepare | Skip], bool]) -> list[Kept]:
        return [
            kept
            for stream in judge.streams.values()
            if stream.replica != me
            for kept in list(stream.kept.values())[-64:]
            if isinstance(kept.header, Prepare | Skip) and fits(kept.header)
        ]

    def _commit(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        if state.v > state.e:
            return None
        window = judge.record.parameters.window

        def fits(header: Prepare | Skip) -> bool:
            end = header.s if isinstance(header, Prepare) else header.s2
            return header.g == state.e and state.h < end <= state.h + window

        found = [
            kept
            for kept in self._proposals(judge, machine.identity.replica, fits)
            if (state.e, kept.message.replica, kept.message.cv) not in self._voted
        ]
        if not found:
            return None
        chosen = self._rng.sample(found, self._rng.randint(1, min(len(found), window)))
        self._voted |= {(state.e, kept.message.replica, kept.message.cv) for kept in chosen}
        return (Commit(judge.record.c, state.e, tuple(_entry(kept) for kept in chosen)),)

    def _stable(self, machine: Machine, judge: Configuration, state: StreamState, **false: Any) -> Any:
        certificates = judge.statements.certificates
        slots = [s for s in certificates if s > state.h] or ([*certificates] if false else [])
        if not slots:
            return None
        certificate = certificates[self._rng.choice(slots)]
        vector = []
        for stream in judge.streams.values():
            if stream.replica != machine.identity.replica and self._rng.random() < 0.8:
                named = stream.last_stable
                if self._rng.random() < 0.2:  # attests what it cannot know
                    named = Named(stream.replica, named.cv + self._rng.randint(1, 9), bytes(DIGEST_BYTES))
                vector.append(named)
        fields: dict[str, Any] = {
            "h": certificate.slot, "digest": certificate.digest, "certificate": certificate.signatures,
            "v": state.v, "e": state.e, "p": state.p, "blacklist": state.blacklist, "retired": state.retired,
            "vector": tuple(vector), **false,
        }  # fmt: skip
        return (Stable(judge.record.c, **fields),)

    def _ask(self, machine: Machine, judge: Configuration, state: StreamState) -> None:
        """REQ for a later view: f of them change nothing, but who joins is quickly moved on."""
        c = judge.record.c
        body = LAYOUT[Kind.REQ].pack(max(state.v, state.e) + self._rng.choice([1, 1, 2, judge.record.n]))
        try:
            signature = machine.wormhole.sign(c, Kind.REQ, body)
        except Refusal:
            return
        frame = encode(StatementMessage(c, machine.identity.replica, Kind.REQ, body, signature))
        for peer in machine.peers:
            machine.world.carry(machine, peer, frame)

    def _view_change(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        del machine
        asked = judge.statements.view_wanted()
        if asked[0] <= max(state.v, state.e):
            return None
        return (ViewChange(judge.record.c, asked[0], asked[1], ()),)

    def _merged(self, judge: Configuration, g: int) -> tuple[Merged, tuple[Named, ...]] | None:
        votes = judge.votes.of(g)
        quorum = judge.record.quorums.view_change
        if len(votes) < quorum:
            return None
        chosen = self._rng.sample(votes, quorum)
        outcome = merge(judge.record, chosen, judge)
        return (outcome, tuple(vote.name for vote in chosen)) if isinstance(outcome, Merged) else None

    def _new_view(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        g = state.v
        found = self._merged(judge, g) if g > state.e and leader(judge.record, g) == machine.identity.replica else None
        if found is None:
            return None
        m, names = found
        if m.h > state.h or m.s_max > state.h + judge.record.parameters.window:
            return None
        header = NewView(judge.record.c, g, m.h, m.s_max, m.blacklist, m.retired)
        return header, encode(Merge(names, m.choices))

    def _commit_view(
        self, machine: Machine, judge: Configuration, state: StreamState, *, any_view: bool = False
    ) -> Any:
        views = sorted(judge.new_views.items(), reverse=True)
        if any_view:
            self._rng.shuffle(views)
        for g, view in views:
            message, header = view.message, view.header
            fits = header.h <= state.h and header.s_max <= state.h + judge.record.parameters.window
            if message.replica != machine.identity.replica and (any_view or (fits and g > state.e and g >= state.v)):
                return (_cited(judge.record.c, g, message),)
        return None

    # --------------------------------------------------------------------------------------------- what breaks a rule
    def _lie(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """One that fits the situation: it shall hurt whom no rule protects."""
        lies = self._lies
        if state.v > state.e and "late-vote" in lies:
            lies = ["late-vote"]  # now or never
        return getattr(self, "_lie_" + self._rng.choice(lies).replace("-", "_"))(machine, judge, state)

    def _vote_for(self, judge: Configuration, found: list[Kept]) -> Any:
        undecided = [k for k in found if judge.slots.decision(_end(k)) is None] or found
        if not undecided:
            return None
        kept = self._rng.choice(undecided)
        return (Commit(judge.record.c, kept.header.g, (_entry(kept),)),)  # type: ignore[union-attr]

    def _lie_late_vote(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A vote in a view that its VIEW-CHANGE has left, or that it never entered."""
        left = state.v > state.e

        def fits(header: Prepare | Skip) -> bool:
            return header.g <= state.e if left else header.g != state.e

        return self._vote_for(judge, self._proposals(judge, machine.identity.replica, fits))

    def _lie_far_vote(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A vote beyond the window."""
        far = state.h + judge.record.parameters.window

        def fits(header: Prepare | Skip) -> bool:
            return header.g == state.e and (header.s if isinstance(header, Prepare) else header.s2) > far

        return self._vote_for(judge, self._proposals(judge, machine.identity.replica, fits))

    def _lie_again(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A second proposal for a slot of its own."""
        turn = proposers(judge.record, state.e, state.blacklist, state.retired)
        me = machine.identity.replica
        slots = [s for s in range(state.h + 1, state.p + 1) if turn[s % len(turn)] == me]
        if not slots:
            return None
        digest, batch = self._batch(machine)
        return Prepare(judge.record.c, state.e, self._rng.choice(slots), digest), b"", batch

    def _slot_lie(self, machine: Machine, judge: Configuration, slots: list[int], view: int) -> Any:
        if not slots:
            return None
        digest, batch = self._batch(machine)
        return Prepare(judge.record.c, view, self._rng.choice(slots), digest), b"", batch

    def _lie_proposal(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """In a view that it has left, or has not entered."""
        me, window = machine.identity.replica, judge.record.parameters.window
        views = [g for g in (state.e - 1, state.e, state.e + 1, state.v) if 0 <= g < 1 << 60]
        view = self._rng.choice(views)
        turn = proposers(judge.record, view, state.blacklist, state.retired)
        slots = [s for s in range(max(state.h, state.p) + 1, state.h + window + 1) if turn[s % len(turn)] == me]
        return self._slot_lie(machine, judge, slots, view)

    def _lie_far_proposal(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """Beyond the window."""
        turn = proposers(judge.record, state.e, state.blacklist, state.retired)
        first = max(state.h + judge.record.parameters.window, state.p) + 1
        me = machine.identity.replica
        slots = [s for s in range(first, first + 2 * len(turn)) if turn[s % len(turn)] == me]
        return self._slot_lie(machine, judge, slots, state.e)

    def _lie_other_proposal(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """For a slot of another."""
        first = max(state.h, state.p) + 1
        slots = list(range(first, state.h + judge.record.parameters.window + 1))
        return self._slot_lie(machine, judge, slots[:3], state.e)

    def _lie_stable(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """Of another state than its stream's."""
        false: dict[str, Any] = self._rng.choice(
            [
                {"p": max(0, state.p - 1)},
                {"p": 0},
                {"e": max(0, state.e - 1)},
                {"v": state.e},
                {"blacklist": (judge.record.members[0].replica,)},
                {"blacklist": ()},
            ]
        )
        return self._stable(machine, judge, state, **false)

    def _lie_stable_back(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """Of a slot that is no greater."""
        certificates = judge.statements.certificates
        slots = [s for s in certificates if s <= state.h]
        if not slots:
            return None
        c = certificates[self._rng.choice(slots)]
        return self._stable(machine, judge, state, h=c.slot, digest=c.digest, certificate=c.signatures)

    def _lie_stable_bare(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """Without a certificate."""
        h = state.h + judge.record.parameters.checkpoint_period
        return self._stable(machine, judge, state, h=h, digest=bytes(DIGEST_BYTES), certificate=())

    def _lie_view(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A COMMIT of a NEW-VIEW out of turn: of an older view, or of one that its VIEW-CHANGE has gone beyond."""
        return self._commit_view(machine, judge, state, any_view=True)

    def _lie_view_bare(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A VIEW-CHANGE that nobody asked for."""
        del machine
        g = max(state.v, state.e) + 1
        forged = tuple(Req(m.replica, g, bytes(SIGNATURE_BYTES)) for m in judge.record.members[: judge.record.f + 1])
        return (ViewChange(judge.record.c, g, forged, ()),)

    def _lie_view_again(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A VIEW-CHANGE for a view that it has asked for already: another log under the old name."""
        del state
        kept = judge.streams[machine.identity.replica].kept.values()
        asked = [k.header for k in kept if isinstance(k.header, ViewChange)]
        return (self._rng.choice(asked),) if asked else None

    def _lie_bogus_view(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A NEW-VIEW of the view that it leads, which does not follow from its VIEW-CHANGEs."""
        return self._bogus(machine, judge, state, turn=0)

    def _lie_out_of_turn(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A NEW-VIEW of a view that another leads."""
        return self._bogus(machine, judge, state, turn=1)

    def _bogus(self, machine: Machine, judge: Configuration, state: StreamState, *, turn: int) -> Any:
        g = max(state.v, state.e + 1, 1)
        if g >= 1 << 60:
            return None
        while (leader(judge.record, g) != machine.identity.replica) != bool(turn):
            g += 1
        found = self._merged(judge, g)
        h = state.h
        choices = found[0].choices if found is not None else ()
        names = found[1] if found is not None else ()
        s_max = max(h, found[0].s_max - 1 if found is not None else h)
        choices = tuple(msgspec.structs.replace(x, batch=NOOP) for x in choices if x.s <= s_max)
        return NewView(judge.record.c, g, h, s_max, (), ()), encode(Merge(names, choices))

    def _lie_entry(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A vote for what nobody proposed. It is ignored, and ends nothing."""
        proposal = encode(Prepare(judge.record.c, state.e, state.h + 1, self._batch(machine)[0]))
        proposer = proposers(judge.record, state.e, state.blacklist, state.retired)[0]
        entry = Entry(state.h + 1, state.h + 1, proposer, 1, proposal, bytes(SIGNATURE_BYTES))
        return (Commit(judge.record.c, state.e, (entry,)),)

    def _lie_forged_request(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A request in a client's name, which has not signed it. No breach: the batch is invalid, and ineligible."""
        slots = self._own_slots(machine, judge, state)
        held = [checked for data in judge.batches.all() if (checked := judge.batches.checked(batch_digest(data)))]
        if not slots or not held:
            return None
        body = self._rng.choice(held[-4:]).bodies[0]
        request = body.requests[-1]
        forged = msgspec.structs.replace(
            request, number=request.number + self._rng.choice([1, 2, 8]), operation=request.operation + b"!"
        )
        bundle = Bundle(encode(msgspec.structs.replace(body, requests=(forged,))), bytes(SIGNATURE_BYTES))
        batch = make_batch([encode(bundle)])
        return Prepare(judge.record.c, state.e, slots[0], batch_digest(batch)), b"", batch

    def _lie_wedge(self, machine: Machine, judge: Configuration, state: StreamState) -> Any:
        """A wedge, if there is a record for it: and it goes on after that."""
        del state
        assert machine.replica is not None
        newest = machine.replica._succession.successors.newest()  # noqa: SLF001
        return (Wedge(judge.record.c, newest[1]),) if newest is not None else None


def _end(kept: Kept) -> int:
    assert isinstance(kept.header, Prepare | Skip)
    return kept.header.s if isinstance(kept.header, Prepare) else kept.header.s2


def _entry(kept: Kept) -> Entry:
    header, message = kept.header, kept.message
    assert isinstance(header, Prepare | Skip)
    ends = (header.s, header.s) if isinstance(header, Prepare) else (header.s1, header.s2)
    return Entry(*ends, message.replica, message.cv, message.header, message.certificate)


def _cited(c: int, g: int, message: StreamMessage) -> CommitNewView:
    return CommitNewView(c, g, message.cv, message.header, sha256(message.payload), message.certificate)
