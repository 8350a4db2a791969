"""Engines with one rule of the protocol taken out, each by one patch; and the seeds that show that it was needed.

`python -m tests.simulation.mutants NAME` runs a mutant over its seeds in this process, which is lost for anything else,
and says as JSON which seed caught it: [seed, algorithm, kind of failure], or null.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from cloudfit_orchestrator.bft import batch, clients, readvotes, voting
from cloudfit_orchestrator.bft.checkpoints import Checkpoints
from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.usig import configuration, evidence, logvotes, merge, slots, voice
from cloudfit_orchestrator.bft.usig.judge import Broken, StreamState, stated
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    NewView,
    Prepare,
    Skip,
    Stable,
    ViewChange,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.bft.usig.stream import Stream
from cloudfit_orchestrator.bft.usig.voice import Voice
from cloudfit_orchestrator.model.quorum import Quorums
from cloudfit_orchestrator.model.record import WITH_WORMHOLE, Algorithm, ConfigRecord
from cloudfit_orchestrator.testing import observer
from cloudfit_orchestrator.testing.network import Weather
from cloudfit_orchestrator.testing.profiles import PUPPETS, READS
from cloudfit_orchestrator.testing.simulator import simulate

QUIET = dict.fromkeys(("crashes", "partitions", "freezes", "clocks"), 0.0) | dict.fromkeys(
    ("replacements", "reshapes", "rogues", "lapses"), 0
)  # a profile in which nothing fails but what a mutant says
EVERY = 1 << 40  # above all counters of a run


@dataclass(frozen=True)
class Mutant:
    """`rule`: what is missing, and where the protocol states it. `kinds`: what the simulator must call the damage."""

    name: str
    rule: str
    patch: Callable[[], None]
    kinds: tuple[str, ...]
    most: int = 0  # seeds
    n: int = 3
    attack: str = ""  # of the puppets; empty: two lies that the seed draws
    profile: str = PUPPETS
    changes: dict[str, Any] = field(default_factory=dict)  # of the profile
    script: str = ""  # a written execution that catches it where chance does not

    def run(self, seed: int, algorithm: Algorithm) -> str:
        """The kind of the failure of one seed; empty if all is well."""
        changes = self.changes | ({"attacks": self.attack} if self.attack else {})
        return simulate(seed, self.n, algorithm, self.profile, changes=changes).kind

    def caught(self) -> tuple[int, Algorithm, str] | None:
        """The first seed and engine that fail, and of what."""
        for seed in range(1, self.most + 1):
            for algorithm in sorted(WITH_WORMHOLE):
                kind = self.run(seed, algorithm)
                if kind:
                    return seed, algorithm, kind
        return None


# ------------------------------------------------------------------------------------------------- rules of the judge
def _follow(state: StreamState, header: Any) -> StreamState:
    """The state after a message that should have ended its stream."""
    match header:
        case Prepare():
            return structs.replace(state, p=max(state.p, header.s), since=state.since + 1)
        case Skip():
            return structs.replace(state, p=max(state.p, header.s2), since=state.since + 1)
        case Commit():
            return structs.replace(state, since=state.since + 1)
        case Stable():
            return stated(header)
        case ViewChange():
            return structs.replace(state, v=header.g, since=0)
        case NewView():
            return _enter(state, header)
        case CommitNewView():
            view = decode_header(header.header)
            return _enter(state, view) if isinstance(view, NewView) else state
    return state


def _enter(state: StreamState, view: NewView) -> StreamState:
    return structs.replace(state, e=view.g, p=view.s_max, blacklist=view.blacklist, retired=view.retired, since=0)


def without(rule: str, *kinds: type) -> Callable[[], None]:
    """Nobody ends a stream by this rule."""

    def patch() -> None:
        real = configuration.judge

        def lenient(record: ConfigRecord, state: StreamState, replica: str, cv: int, header: Any, *rest: Any) -> Any:
            outcome = real(record, state, replica, cv, header, *rest)
            if isinstance(outcome, Broken) and outcome.rule.startswith(rule) and isinstance(header, kinds or object):
                return _follow(state, header)
            return outcome

        configuration.judge = voice.judge = lenient  # type: ignore[assignment,attr-defined]

    return patch


def told_as(**unsaid: Any) -> Callable[[], None]:
    """Who jumps does not take over all that a STABLE states."""

    def patch() -> None:
        configuration.stated = lambda stable: structs.replace(stated(stable), **unsaid)  # type: ignore[assignment]

    return patch


def always(room: Any, name: str, answer: object = True) -> Callable[[], None]:  # noqa: FBT002  any answer
    """A question that is answered without being looked at."""

    def patch() -> None:
        getattr(room, name)
        setattr(room, name, lambda *_, **__: answer)

    return patch


# --------------------------------------------------------------------------------------------- quorums and the merge
def quorums_less(commit: int, view_change: int) -> Callable[[], None]:
    def patch() -> None:
        real = ConfigRecord.quorums.fget  # type: ignore[attr-defined]

        def fewer(self: ConfigRecord) -> Quorums:
            q = real(self)
            return Quorums(q.commit - commit, q.view_change - view_change)

        ConfigRecord.quorums = property(fewer)  # type: ignore[assignment]

    return patch


def merge_ignores_carried() -> None:
    real = merge.vote_of

    def deaf(record: Any, name: Any, state: Any, kept: Any, **rest: Any) -> Any:
        return real(record, name, state, [structs.replace(item, entries=()) for item in kept], **rest)

    logvotes.vote_of = observer.vote_of = deaf  # type: ignore[attr-defined]


def merge_ignores_new_views() -> None:
    def add_view(self: Any, g: int, s_max: int) -> None:
        self._ends[g] = s_max

    merge._Work.add_view = add_view  # type: ignore[method-assign]


def skips_learned_early() -> None:
    real = slots.Slots.propose

    def propose(self: Any, proposal: Any) -> None:
        real(self, proposal)
        if proposal.batch == NOOP:
            self.decide(proposal.s, NOOP)

    slots.Slots.propose = propose  # type: ignore[method-assign]


def votes_add_up_over_views() -> None:
    real = slots.Slots.vote

    def vote(self: Any, proposal: Any, voter: str) -> None:
        real(self, structs.replace(proposal, g=0), voter)

    slots.Slots.vote = vote  # type: ignore[method-assign]


def near_anchors() -> None:
    """A log may begin at any attested STABLE."""
    real = Stream.truncate
    Stream.truncate = lambda self, attested, _: real(self, attested, 0)  # type: ignore[method-assign]
    Stream.complete = lambda *_: True  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------- evidence and certificates
def certificates_of_f() -> None:
    real = Checkpoints.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        self._needed -= 1

    Checkpoints.__init__ = init  # type: ignore[method-assign]


def unsigned_bundles() -> None:
    class Blind(batch.BundleChecker):
        def __init__(self, record: ConfigRecord, verifier: Any) -> None:
            super().__init__(record, verifier)
            self._verifier = type("Blind", (), {"verify": lambda *_: True})()

    configuration.BundleChecker = Blind  # type: ignore[misc]


def reads_of_f_plus_1() -> None:
    readvotes.read_quorum = lambda record: record.f + 1  # type: ignore[assignment]


def replies_of_f() -> None:
    real = voting.Votes.learn
    voting.Votes.learn = lambda self, record: real(self, replace(record, f=record.f - 1))  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------- execution, restart, the voice
def no_client_table() -> None:
    clients.ClientWindow.cached = lambda *_: None  # type: ignore[method-assign]


def bodies_not_logged() -> None:
    real = UsigOrdering._say

    def say(self: Any, cv: int, header: bytes, payload: bytes) -> None:
        journal, self._out.journal = self._out.journal, lambda _: None
        try:
            real(self, cv, header, payload)
        finally:
            self._out.journal = journal

    UsigOrdering._say = say  # type: ignore[method-assign]


def votes_between_views() -> None:
    """A correct replica does not stop the view that it has left."""
    Voice.active = property(lambda self: self.live)  # type: ignore[assignment]


SAFETY = (
    "decision can be lost", "decision lost", "judges differ", "disagreement", "AgreementError", "own stream",
    "false accusation", "not linearizable", "executed twice", "ProtocolError",
)  # fmt: skip
SEEDS = 40  # tried, each with both engines, until one catches a mutant: most are caught by the first few
Room = configuration.Configuration
EXECUTIONS = "tests/unit/bft/test_executions.py::test_"


def by_seeds(
    name: str, rule: str, patch: Callable[[], None], *, attack: str = "", kinds: tuple[str, ...] = SAFETY
) -> Mutant:
    """A mutant that chance finds."""
    return Mutant(name, rule, patch, kinds, most=SEEDS, attack=attack)


def by_script(name: str, rule: str, patch: Callable[[], None], script: str) -> Mutant:
    """A mutant that only a written execution finds in reasonable time."""
    return Mutant(name, rule, patch, SAFETY, script=EXECUTIONS + script)


MUTANTS = {
    mutant.name: mutant
    for mutant in (
        by_seeds(
            "R1 votes",
            "R1: votes only in the view entered last",
            without("R1: not the view", Commit),
            attack="puppet-late-vote",
        ),
        by_seeds(
            "R1 proposals",
            "R1: proposals only in that view",
            without("R1: not the view", Prepare, Skip),
            attack="puppet-proposal",
        ),
        by_seeds(
            "R1 views",
            "R1: views go up",
            without("R1: view is not above", NewView, CommitNewView),
            attack="puppet-view",
        ),
        by_seeds(
            "R1 targets", "R1: VIEW-CHANGE only upwards", without("R1: VIEW-CHANGE target"), attack="puppet-view-again"
        ),
        by_seeds(
            "R1 leader",
            "R1: NEW-VIEW is the leader's",
            without("R1: NEW-VIEW is the leader's"),
            attack="puppet-out-of-turn",
        ),
        by_seeds(
            "R3 proposer", "R3: only the proposer of s", without("R3: not the proposer"), attack="puppet-other-proposal"
        ),
        by_seeds("R3 upwards", "R3: s > p", without("R3: proposals go upwards"), attack="puppet-again"),
        by_seeds(
            "STABLE certificate",
            "R4: a STABLE's certificate is valid",
            always(Room, "stable_certificate"),
            attack="puppet-stable-bare",
        ),
        by_seeds(
            "REQ certificate",
            "§5.2: f+1 ask for the view",
            always(Room, "view_certificate"),
            attack="puppet-view-bare",
            kinds=("view forced",),
        ),
        by_seeds(
            "NEW-VIEW recomputes",
            "R4: a NEW-VIEW recomputes",
            always(Room, "new_view_recomputes"),
            attack="puppet-bogus-view",
        ),
        by_seeds("Qc", "§1: Qc", quorums_less(1, 0)),
        by_seeds("Qv", "§1: Qc + Qv > n", quorums_less(0, 1)),
        by_seeds("carried", "§5.3: proposals that COMMITs carry count", merge_ignores_carried),
        by_seeds("choices", "§5.3: a NEW-VIEW in O is eligible", merge_ignores_new_views),
        by_seeds("early SKIP", "§3: a SKIP is decided at Qc", skips_learned_early),
        by_seeds("views add up", "§3: Qc votes for the same (g, s, cv, D)", votes_add_up_over_views),
        by_seeds(
            "certificates of f",
            "§4, §5.2: f+1 CHECKPOINTs, f+1 REQs",
            certificates_of_f,
            kinds=(*SAFETY, "view forced"),
        ),
        by_seeds(
            "client signatures",
            "§3: valid(batch)",
            unsigned_bundles,
            attack="puppet-forged-request",
            kinds=("forged request", "executed twice"),
        ),
        by_seeds("client table", "§3: each request once", no_client_table, kinds=("executed twice",)),
        by_seeds("replies of f", "§3: f+1 equal replies", replies_of_f, kinds=("not linearizable", "WrongAnswerError")),
        Mutant(
            "reads of f+1",
            "§7: R meets each quorum that showed something",
            reads_of_f_plus_1,
            ("not linearizable",),
            most=SEEDS,
            profile=READS,
            changes={**QUIET, "byzantine": True, "attacks": "old-reads", "weather": Weather(drop=0.3, jitter_s=0.05)},
        ),
        by_seeds("bodies logged", "§2: the body is logged before create_ui", bodies_not_logged, kinds=("liveness",)),
        by_seeds("stops the view", "§5.2: who joins stops the view", votes_between_views, kinds=("ProtocolError",)),
        by_script(
            "R2 votes",
            "R2: votes up to h'+L",
            without("R2: vote"),
            "r2_a_vote_beyond_the_window_would_vanish_behind_an_anchor",
        ),
        by_script(
            "attested",
            "§4: a jump only to an attested STABLE",
            always(evidence.Attestations, "attested", EVERY),
            "a_cursor_jumps_only_to_an_attested_stable",
        ),
        by_script(
            "anchor", "§4: a log begins L behind the last STABLE", near_anchors, "an_anchor_is_l_behind_the_last_stable"
        ),
        by_script("STABLE says e", "R4: who jumps takes e over", told_as(e=0), "a_stable_states_the_view_entered_last"),
        by_script(
            "STABLE says p", "R4: who jumps takes p over", told_as(p=0), "a_stable_states_the_last_slot_proposed"
        ),
        by_script(
            "STABLE says blacklist",
            "R4: who jumps takes the blacklist over",
            told_as(blacklist=()),
            "a_stable_states_the_blacklist",
        ),
    )
}


def main(arguments: list[str]) -> None:
    """See the module."""
    mutant = MUTANTS[arguments[0]]
    mutant.patch()
    print(json.dumps(mutant.caught()))


if __name__ == "__main__":
    main(sys.argv[1:])
