"""An observer who knows everything: a judge that hears each message the moment a wormhole has certified it.

It sees what no replica sees: also what was certified and never sent. Upon it rest the strongest checks, those that do
not wait for a disagreement to happen (after the models of protocol §3-§6):

- no correct replica's message ends its own stream, and none joins a view that no correct one has asked for;
- every replica judges every stream as the observer does, however it came to it: whole, truncated, or by a jump;
- the look-ahead: no quorum of VIEW-CHANGEs or wedges that are there, or that could be sent now, loses a decided slot;
- what a replica takes for decided, the observer finds decided.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.effects import Append, Certify, Effect
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import NOOP, Named, StatementMessage
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.journal import LogBody, decode_entry
from cloudfit_orchestrator.bft.usig.judge import StreamState
from cloudfit_orchestrator.bft.usig.logvotes import WEDGE
from cloudfit_orchestrator.bft.usig.merge import Merged, Proposal, Vote, merge, vote_of
from cloudfit_orchestrator.bft.usig.messages import (
    CommitNewView,
    NewView,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
    decode_merge,
)
from cloudfit_orchestrator.bft.usig.proofs import Found
from cloudfit_orchestrator.bft.usig.stream import Kept, Stream
from cloudfit_orchestrator.model.record import WITH_WORMHOLE, ConfigRecord, record_hash
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

MAX_QUORUMS = 40  # looked at a time: all of n=3 and n=5, and of n=7 with one log each
_LOG_BATCH = LogBatch.__struct_config__.tag
_LOG_BODY = b"\x04"  # the tag of LogBody as it stands in its encoding
assert LogBody.__struct_config__.tag == _LOG_BODY[0]


class FindingError(AssertionError):
    """A check of the observer failed. `kind` names it."""

    def __init__(self, kind: str, fact: str) -> None:
        """`fact`: what was seen."""
        super().__init__(fact)
        self.kind = kind


class Observer:
    """See the module. One judge a configuration, made when its record is ACTIVE."""

    def __init__(self, verifier: Verifier, controllers: list[bytes], happened: Callable[[str], None]) -> None:
        """`happened` is told of branches of the rules that were exercised."""
        self._verifier = verifier
        self._controllers = controllers
        self._happened = happened
        self.judge: Configuration | None = None
        self._bodies: dict[bytes, tuple[bytes, bytes]] = {}  # digest -> (header, payload)
        self._batches: dict[bytes, bytes] = {}
        self._records_seen: set[bytes] = set()
        self._last_append: dict[str, bytes] = {}  # machine -> its last log record
        self._unknown: set[str] = set()  # replicas of whose streams a certified body is not known
        self._asked = 0  # the highest view that a correct replica has asked for
        self._changes: list[tuple[str, int]] = []  # (replica, target) of VIEW-CHANGEs that were not looked at yet
        self._read: dict[tuple[str, int], tuple[Kept, Vote]] = {}  # what each message of a log contributes to its vote
        self.certified_count = 0
        self._told: Counter[str] = Counter()

    # ---------------------------------------------------------------------------------------------------- what it sees
    def begin(self, record: ConfigRecord, envelope: bytes) -> None:
        """The record is ACTIVE: its epoch is about to open, those before it are closed. Only streams have a judge."""
        self.judge = None
        if record.algorithm in WITH_WORMHOLE:
            self.judge = Configuration(record, record_hash(envelope), self._verifier, self._controllers)
        self._unknown.clear()
        self._read.clear()
        self._told.clear()
        self._asked = 0
        self._changes.clear()

    def watch(self, machine: str, effect: Effect) -> None:
        """Effects of all cores: bodies and batches go to the log before they are certified."""
        if isinstance(effect, Append):
            self._last_append[machine] = effect.record
            if effect.record[1] == _LOG_BATCH and effect.record not in self._records_seen:
                self._records_seen.add(effect.record)
                entry = decode_entry(effect.record)
                assert isinstance(entry, LogBatch)
                self._batches[batch_digest(entry.batch)] = entry.batch
        elif self.judge is not None and isinstance(effect, Certify) and effect.digest not in self._bodies:
            record = self._last_append.get(machine, b"")
            body = decode_entry(record) if record[1:2] == _LOG_BODY else None  # else of a core of another engine
            if isinstance(body, LogBody) and body.cv == effect.cv:
                self.body(effect.digest, body.header, body.payload)

    def body(self, digest: bytes, header: bytes, payload: bytes) -> None:
        """Something that may be certified next."""
        self._bodies[digest] = header, payload

    def certified(self, replica: str, c: int, cv: int, digest: bytes, certificate: bytes) -> None:
        """A wormhole made a UI."""
        self.certified_count += 1
        judge = self.judge
        if judge is None or c != judge.record.c:
            return
        body = self._bodies.get(digest)
        if body is None:  # a behaviour did not say what it had certified: its stream is opaque from here
            self._unknown.add(replica)
            return
        judge.offer(StreamMessage(c, replica, cv, *body, certificate))

    def signed(self, replica: str, c: int, kind: Kind, body: bytes, signature: bytes, *, correct: bool) -> None:
        """A wormhole signed a statement, of a replica that is (still) `correct` or not."""
        judge = self.judge
        self.certified_count += kind is Kind.PBFT
        if judge is not None and c == judge.record.c and kind in (Kind.CHECKPOINT, Kind.REQ):
            judge.statements.add(StatementMessage(c, replica, kind, body, signature), 0)
            if kind is Kind.REQ and correct:
                (target,) = LAYOUT[kind].unpack(body)
                self._asked = max(target, self._asked)

    def advance(self) -> Configuration | None:
        """Judge all that is there."""
        judge = self.judge
        if judge is None:
            return None
        for _ in range(3):  # what a merge misses is asked for, and comes
            for kept in judge.advance():
                self._note(judge, kept)
            judge.found = Found()
            # Sorted: puppets draw from what the judge holds in the order in which it came, and a set has none.
            wanted = sorted(digest for digest in judge.wanted.batches if digest in self._batches)
            if not wanted:
                break
            for digest in wanted:
                judge.offer_batch(self._batches[digest])
        return judge

    def _note(self, judge: Configuration, kept: Kept) -> None:
        header = kept.header
        if isinstance(header, NewView):
            choices = decode_merge(kept.message.payload).choices
            self._happened("rule:NEW-VIEW")
            if any(c.batch != NOOP and c.g < header.g - 1 for c in choices):
                self._happened("rule:NEW-VIEW chose a proposal of an older view")
            if any(c.batch == NOOP for c in choices):
                self._happened("rule:NEW-VIEW chose a no-op")
            if len({c.g for c in choices}) > 1:
                self._happened("rule:NEW-VIEW chose from several views")
            if header.blacklist:
                self._happened("rule:NEW-VIEW blacklists")
            if header.retired:
                self._happened("rule:NEW-VIEW retires")
            if header.h > judge.record.h:
                self._happened("rule:NEW-VIEW above a stable slot")
        elif isinstance(header, ViewChange):
            self._changes.append((kept.message.replica, header.g))
        elif isinstance(header, CommitNewView):
            self._happened("rule:COMMIT(NEW-VIEW)")
        elif isinstance(header, Skip) and header.s2 > header.s1:
            self._happened("rule:SKIP of a range")
        elif isinstance(header, Wedge):
            self._happened("rule:wedge")

    # ---------------------------------------------------------------------------------------------------------- checks
    def check_streams(self, faulty: set[str]) -> None:
        """No correct replica ends its own stream, or joins a view that only faulty ones ask for. `faulty`: those that
        count in f in this configuration.
        """
        judge = self.judge
        if judge is None:
            return
        for replica, rule in judge.liars.items():
            if not self._told[f"{replica} {rule}"]:
                self._told[f"{replica} {rule}"] += 1
                self._happened(f"rule:stream ended: {rule}")
            if replica not in faulty:
                raise FindingError("own stream", f"{replica}, which is correct, ended its stream by {rule!r}")
        for replica, g in self._changes:
            if replica not in faulty and g > self._asked:
                raise FindingError(
                    "view forced", f"{replica} changes to view {g}, correct ones asked for {self._asked}"
                )
        self._changes.clear()

    def check_judge(self, who: str, theirs: Configuration) -> None:
        """A replica's judgements are the observer's, as far as both have come."""
        ours = self.judge
        if ours is None or theirs.record.c != ours.record.c:
            return
        for replica, stream in theirs.streams.items():
            if replica not in self._unknown:
                self._check_stream(who, ours.streams[replica], stream)
        known = not self._unknown and not ours.wanted.batches and not ours.wanted.streams
        for s, digest in theirs.slots.decisions():
            decided = ours.slots.decision(s)
            if decided != digest and (decided is not None or known):
                said = "nothing" if decided is None else decided.hex()[:8]
                raise FindingError("judges differ", f"{who} takes slot {s} for {digest.hex()[:8]}, decided is {said}")

    def _check_stream(self, who: str, ours: Stream, theirs: Stream) -> None:
        if ours.ended is not None and theirs.cursor >= ours.ended:
            raise FindingError(
                "judges differ", f"{who} follows {ours.replica} beyond {ours.ended}, where it ended: {ours.end_rule}"
            )
        if theirs.ended is not None and ours.cursor >= theirs.ended:
            raise FindingError(
                "judges differ", f"{who} ends {ours.replica} at {theirs.ended} by {theirs.end_rule!r}, it goes on"
            )
        if 0 < theirs.cursor <= ours.cursor:
            state = ours.kept[theirs.cursor].state
            if state != theirs.state:
                raise FindingError(
                    "judges differ", f"{who} has {ours.replica} at {theirs.cursor} as {theirs.state}, it is {state}"
                )

    def look_ahead(self) -> None:
        """No quorum of votes of logs loses a slot that was decided in a lower view."""
        judge = self.judge
        if judge is None:
            return
        decided = list(self._decided(judge))
        if not decided:
            return
        self._happened("check:look-ahead")
        targets = {self._last_target(stream) for stream in judge.streams.values()} - {0}
        now = {stream.replica: self._votes_now(judge, stream) for stream in judge.streams.values()}
        for target in [None, *sorted(targets)]:
            votes = dict(now)
            if target is not None:
                votes = {
                    r: v
                    for r, v in now.items()
                    if judge.streams[r].state.v < target and judge.streams[r].state.e < target
                }
                votes |= {vote.name.replica: [vote] for vote in judge.votes.of(target)}
            elif judge.votes.of(WEDGE):
                self._happened("check:look-ahead at a wedge")
            for chosen in self._quorums(judge.record, {r: v for r, v in votes.items() if v}):
                self._check_quorum(judge, decided, chosen, target)

    @staticmethod
    def _quorums(record: ConfigRecord, votes: dict[str, list[Vote]]) -> Iterator[tuple[Vote, ...]]:
        seen = 0
        for depth in range(max((len(v) for v in votes.values()), default=0)):
            logs = [(v[depth:] or v)[0] for v in votes.values()]
            for chosen in combinations(logs, record.quorums.view_change):
                yield chosen
                seen += 1
                if seen >= MAX_QUORUMS:
                    return

    @staticmethod
    def _check_quorum(
        judge: Configuration, decided: list[tuple[int, int, bytes]], chosen: Iterable[Vote], target: int | None
    ) -> None:
        votes = tuple(chosen)
        outcome = merge(judge.record, votes, judge)
        if not isinstance(outcome, Merged):
            return  # a batch that nobody has: such a quorum waits
        picked = {choice.s: choice.batch for choice in outcome.choices}
        for s, g, digest in decided:
            if s > outcome.h and (target is None or g < target) and picked.get(s) != digest:
                names = [f"{v.name.replica} to {v.name.cv}" for v in votes]
                raise FindingError(
                    "decision can be lost",
                    f"slot {s} was decided in view {g}; logs of {names} for view {target or 'to come'} lose it",
                )

    @staticmethod
    def _decided(judge: Configuration) -> Iterator[tuple[int, int, bytes]]:
        """(slot, view, digest) of what is decided."""
        slots = judge.slots
        quorum = judge.record.quorums.commit
        views = {g for g, voters in slots._views.items() if len(voters) >= quorum}  # noqa: SLF001
        for s, slot in slots._slots.items():  # noqa: SLF001
            for g, voters in slot.voters.items():
                if len(voters) >= quorum and slot.decided is not None:
                    yield s, g, slot.decided
        for g in views:
            found = judge.new_views.get(g)
            for choice in found.choices if found is not None else ():
                yield choice.s, g, choice.batch

    @staticmethod
    def _last_target(stream: Stream) -> int:
        v = stream.state.v
        last = [k.header.g for k in stream.kept.values() if isinstance(k.header, ViewChange)] if v else []
        return last[-1] if last else 0

    def _votes_now(self, judge: Configuration, stream: Stream) -> list[Vote]:
        """What the stream would vote now: with its whole log, and with the log from the last permitted anchor."""
        if stream.ended is not None:
            return []
        name = Named(stream.replica, stream.cursor + 1, bytes(DIGEST_BYTES))
        log = list(stream.kept.values())
        if stream.state.wedged:
            log = log[:-1]
        state = log[-1].state if log else stream.base_state
        attested = judge.attestations.attested(stream.replica)
        window = judge.record.parameters.window
        start = next(
            (
                i
                for i in range(len(log) - 1, -1, -1)
                if isinstance(log[i].header, Stable)
                and log[i].message.cv <= attested
                and log[i].state.h <= state.h - window
            ),
            0,
        )
        cut = self._vote_of(judge.record, name, state, log[start:])
        return [cut, self._vote_of(judge.record, name, state, log)] if start else [cut]

    def _vote_of(self, record: ConfigRecord, name: Named, state: StreamState, log: Iterable[Kept]) -> Vote:
        """The same as `vote_of`, which reads each message by itself: so each is read once, and not at every look."""
        proposals: list[Proposal] = []
        views: list[tuple[int, int]] = []
        for kept in log:
            place = name.replica, kept.message.cv
            known = self._read.get(place)
            if known is None or known[0] is not kept:
                known = self._read[place] = kept, vote_of(record, name, state, [kept])
            proposals += known[1].proposals
            views += known[1].views
        return Vote(name, state, tuple(proposals), tuple(views), (), ())
