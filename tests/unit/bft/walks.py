"""Random executions over real judges: correct members do anything that their rules allow, faulty ones anything at all.

A correct member may act on whatever exists, at any time: any delay, loss and partition is among the walks. What is
checked is stronger than waiting for a disagreement: all judges, whatever the order in which they hear, agree on every
stream; and no quorum of VIEW-CHANGEs that could be sent now loses a decided slot (the look-ahead).
"""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from cloudfit_orchestrator.bft.messages import encode
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.judge import leader, proposers
from cloudfit_orchestrator.bft.usig.merge import Merged, merge
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    Discarded,
    Entry,
    NewView,
    Prepare,
    Skip,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.signing import sha256
from tests.unit.bft.house import House, entry_of

VIEWS = 9
LOOK_AHEAD = 50  # a view above all of a walk


@dataclass(frozen=True)
class Setting:
    """`faulty` members of n; f as in the record."""

    n: int
    f: int
    faulty: tuple[str, ...]
    algorithm: Algorithm
    window: int


class Walk:
    """One random execution."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.rng = random.Random(seed)
        self.setting = setting
        self.house = House(
            setting.n, f=setting.f, algorithm=setting.algorithm, window=setting.window, period=1
        )  # fmt: skip
        self.live = self.house.judge()
        self.voted: dict[str, set[tuple[int, int]]] = {r: set() for r in self.house.names}
        self.malice = self.rng.choice([0.0, 0.01, 0.05, 0.2])
        weights = {
            "prepare": 6,
            "commit": 9,
            "stable": 4,
            "view_change": 0.8,
            "new_view": 5,
            "commit_view": 7,
            "skip": 1,
        }
        self.moves = list(weights)
        self.weights = [w * self.rng.choice([0.3, 1, 1, 2]) for w in weights.values()]

    def run(self, steps: int) -> None:
        """Take so many steps, as far as they are possible."""
        for _ in range(steps):
            who = self.rng.choice(self.house.names)
            if who in self.setting.faulty and self.rng.random() < self.malice:
                self._lie(who)
            else:
                move = self.rng.choices(self.moves, self.weights)[0]
                getattr(self, "_" + move)(who)

    def _say(self, message: StreamMessage) -> None:
        self.house.tell(self.live, [message])

    def _state(self, who: str) -> Any:
        return self.live.streams[who].state

    # ----- what correct members do
    def _own_slots(self, who: str) -> list[int]:
        state = self._state(who)
        if state.v > state.e:
            return []
        turn = proposers(self.house.record, state.e, state.blacklist, state.retired)
        first = max(state.p, state.h) + 1
        return [s for s in range(first, state.h + self.setting.window + 1) if turn[s % len(turn)] == who]

    def _prepare(self, who: str) -> None:
        slots = self._own_slots(who)
        if slots:
            state = self._state(who)
            s = self.rng.choice(slots[:2])
            self.voted[who].add((state.e, s))
            self._say(self.house.prepare(who, state.e, s, self.house.batch(valid=self.rng.random() < 0.95)))

    def _skip(self, who: str) -> None:
        slots = self._own_slots(who)
        if slots:
            s1, s2 = sorted(self.rng.choices(slots, k=2))
            state = self._state(who)
            self.voted[who] |= {(state.e, s) for s in slots if s1 <= s <= s2}
            self._say(self.house.skip(who, state.e, s1, s2))

    def _commit(self, who: str) -> None:
        state = self._state(who)
        if state.v > state.e:
            return
        entries, taken = [], set()
        for stream in self.live.streams.values():
            for kept in stream.kept.values():
                header = kept.header
                if stream.replica == who or not isinstance(header, Prepare | Skip) or header.g != state.e:
                    continue
                ends = (header.s, header.s) if isinstance(header, Prepare) else (header.s1, header.s2)
                turn = proposers(self.house.record, state.e, state.blacklist, state.retired)
                slots = {
                    (header.g, s) for s in range(ends[0], ends[1] + 1) if turn[s % len(turn)] == stream.replica
                }  # fmt: skip
                if ends[1] > state.h + self.setting.window or ends[1] <= state.h or slots & (self.voted[who] | taken):
                    continue
                if isinstance(header, Prepare) and not self.live.batches.valid(header.batch):
                    continue
                if self.rng.random() < 0.7 and len(entries) < self.setting.window:
                    entries.append(entry_of(kept.message))
                    taken |= slots
        if entries:
            self.voted[who] |= taken
            self._say(self.house.say(who, Commit(1, state.e, tuple(entries))))

    def _prefix(self) -> int:
        s = 0
        while self.live.slots.decision(s + 1) is not None:
            s += 1
        return s

    def _stable(self, who: str) -> None:
        state, h = self._state(who), self._prefix()
        if h > state.h:
            self._say(self._stable_of(who, self.rng.randint(state.h + 1, h)))

    def _stable_of(self, who: str, h: int, **false: Any) -> StreamMessage:
        state = self._state(who)
        digest = sha256(b"state", h.to_bytes(8, "big"))
        vector = tuple(
            s.last_stable for r, s in self.live.streams.items() if r != who and self.rng.random() < 0.8
        )  # fmt: skip
        told = {
            "digest": digest, "certificate": self.house.checkpoint(h, digest), "v": state.v, "e": state.e, "p": state.p,
            "blacklist": state.blacklist, "retired": state.retired, "vector": vector,
        }  # fmt: skip
        return self.house.say(who, Stable(1, h, **{**told, **false}))

    def _view_change(self, who: str) -> None:
        state = self._state(who)
        above = [x.state.v for x in self.live.streams.values() if x.state.v > max(state.v, state.e)]
        g = self.rng.choice(above) if above else max(state.v, state.e) + self.rng.choice([1, 1, 2])
        if g < VIEWS and (above or self.rng.random() < 0.3):
            self._say(self.house.view_change(who, g))

    def _new_view(self, who: str) -> None:
        state = self._state(who)
        g = state.v
        votes = self.live.votes.of(g) if g > state.e and leader(self.house.record, g) == who else []
        quorum = self.house.record.quorums.view_change
        if len(votes) < quorum:
            return
        chosen = self.rng.sample(votes, quorum)
        outcome = merge(self.house.record, chosen, self.live)
        if isinstance(outcome, Merged) and outcome.h <= state.h and outcome.s_max <= state.h + self.setting.window:
            self._say(self.house.new_view(who, g, [self._message(v.name.replica, v.name.cv) for v in chosen]))

    def _message(self, replica: str, cv: int) -> StreamMessage:
        return self.house.streams[replica][cv - 1]

    def _commit_view(self, who: str) -> None:
        state = self._state(who)
        for g, view in sorted(self.live.new_views.items()):
            fits = view.header.h <= state.h and view.header.s_max <= state.h + self.setting.window
            if view.message.replica != who and g > state.e and g >= state.v and fits and self.rng.random() < 0.7:
                self._say(self.house.commit_view(who, view.message))
                return

    # ----- what faulty members do besides
    def _lie(self, who: str) -> None:
        rng, house = self.rng, self.house
        state, top = self._state(who), self._prefix()
        g, s = rng.choice([state.e, rng.randrange(VIEWS)]), rng.randint(1, top + self.setting.window + 1)
        proposals = [m for m in house.order if isinstance(decode_header(m.header), Prepare | Skip)]
        views = [m for m in house.order if isinstance(decode_header(m.header), NewView)]
        lie = rng.randrange(10)
        if lie == 0:
            self._say(house.prepare(who, g, s))
        elif lie == 1:
            self._say(house.say(who, Prepare(1, g, s, house.batch()), b"x" * rng.randrange(2)))
        elif lie == 2 and proposals:
            p = rng.choice(proposals)
            false: dict[str, Any] = rng.choice([{}, {"certificate": bytes(64)}, {"cv": p.cv + 1}, {"s2": s}])
            self._say(house.say(who, Commit(1, rng.choice([state.e, g]), (entry_of(p, **false),))))
        elif lie == 3:
            self._say(house.say(who, Commit(1, state.e, (Entry(s, s, rng.choice(house.names), s, b"", b""),))))
        elif lie == 4:
            false = rng.choice([{"p": s}, {"e": g}, {"v": g}, {"blacklist": (who,)}, {}])
            self._say(self._stable_of(who, max(1, top), **false))
        elif lie == 5:
            self._say(house.view_change(who, max(1, g)))
        elif lie == 6 and views:
            view = rng.choice(views)
            self._say(house.commit_view(who, view))
        elif lie == 7 and views:
            view = rng.choice(views)
            self._say(house.say(who, view.header, view.payload))
        elif lie == 8 and leader(house.record, max(1, g)) == who:
            self._say(house.say(who, NewView(1, max(1, g), 0, s, (), ()), encode(Commit(1, 0, ()))))
        elif lie == 9:
            self._skip(who)

    # ----- what must hold
    def check(self) -> None:
        """All of it."""
        assert set(self.live.liars) <= set(self.setting.faulty), f"correct members broke a rule: {self.live.liars}"
        for _ in range(3):
            self._judges_agree(jump=False)
            self._judges_agree(jump=True)
        self._look_ahead()

    def _judges_agree(self, *, jump: bool) -> None:
        other = self.house.judge()
        messages = list(self.house.order)
        self.rng.shuffle(messages)
        if jump:
            for anchor in [m for m in messages if isinstance(decode_header(m.header), Stable)][:3]:
                proof = self.live.attestations.proof(anchor.replica, anchor.cv)
                if proof:
                    other.offer_jump(Discarded(anchor, proof))
        at = 0
        while at < len(messages):
            size = self.rng.randint(1, 8)
            self.house.tell(other, messages[at : at + size])
            at += size
        self.house.tell(other)
        self._serve_views(other)
        for replica, stream in self.live.streams.items():
            theirs = other.streams[replica]
            if jump and theirs.ended is None and 0 < theirs.cursor < (stream.ended or stream.cursor + 1):
                # It may have to wait for a log that it jumped over; as far as it has come, it agrees.
                assert theirs.state == stream.kept[theirs.cursor].state, f"judges differ on {replica}"
            else:
                assert (theirs.ended, theirs.state) == (stream.ended, stream.state), f"judges differ on {replica}"
        for s, digest in other.slots.decisions():
            assert self.live.slots.decision(s) in (digest, None), f"judges differ on slot {s}"
        if not jump:
            assert other.slots.decisions() == self.live.slots.decisions()

    def _serve_views(self, judge: Configuration) -> None:
        """Answer what a judge asks for, as correct members do."""
        for _ in range(3):
            for g in list(judge.wanted.views):
                view = self.live.new_views.get(g)
                if view is not None:
                    judge.offer_view(view.message)
                    for log in view.logs:
                        judge.offer_log(log)
                for commit in self.live.commits.get(g, {}).values():
                    judge.offer_view(commit)
            judge.advance()

    def _look_ahead(self) -> None:
        decided = self.live.slots.decisions()
        streams = self.live.streams
        sound = [r for r in self.house.names if streams[r].ended is None and streams[r].state.v < LOOK_AHEAD]
        for r in sound:
            self._say(self.house.view_change(r, LOOK_AHEAD))
        votes = self.live.votes.of(LOOK_AHEAD)
        assert {v.name.replica for v in votes} == set(sound), "a VIEW-CHANGE of a correct member counts"
        for chosen in combinations(votes, self.house.record.quorums.view_change):
            outcome = merge(self.house.record, chosen, self.live)
            assert isinstance(outcome, Merged), f"a merge misses {outcome}"
            chosen_for = {c.s: c.batch for c in outcome.choices}
            for s, digest in decided:
                if s > outcome.h:
                    assert chosen_for.get(s) == digest, f"slot {s} is lost by {[v.name.replica for v in chosen]}"
