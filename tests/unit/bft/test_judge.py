"""R1, R2, R3 and form, rule by rule (protocol §3): what ends a stream, what only holds it, what is ignored."""

from dataclasses import replace

import pytest
from msgspec import structs

from cloudfit_orchestrator.bft.messages import Named, Signed, encode
from cloudfit_orchestrator.bft.usig.judge import (
    WEDGED_VIEW,
    Broken,
    Held,
    StreamState,
    initial,
    judge,
    leader,
    proposers,
)
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Entry,
    Header,
    NewView,
    Prepare,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
)
from cloudfit_orchestrator.model.record import Algorithm
from tests.unit.bft.house import House

HOUSE = House(3, window=4, period=2)
MINBFT = House(3, window=4, period=2, algorithm=Algorithm.MINBFT)
D = bytes(32)
NV = NewView(1, 4, 2, 5, ("r0",), ("r2",))  # view 4 is led by r1
CNV = CommitNewView(1, 4, 9, b"", D, b"")


class World:
    """What a judge may ask, with settled answers."""

    def __init__(self, **answers: object) -> None:
        self.answers = {"certificate": True, "requests": True, "prepared": True, "recomputes": True, "stands": True,
                        "cited": NV, **answers}  # fmt: skip
        self.asked: list[str] = []

    def _answer(self, name: str) -> object:
        self.asked.append(name)
        return self.answers[name]

    def stable_certificate(self, h, digest, certificate):
        return self._answer("certificate")

    def view_certificate(self, g, certificate):
        return self._answer("requests")

    def successor(self, prepared):
        return self._answer("prepared")

    def new_view_recomputes(self, leader, cv, header, payload):
        return self._answer("recomputes")

    def new_view_cited(self, leader, message):
        return self._answer("cited")

    def new_view_stands(self, leader, message):
        return self._answer("stands")


def state(**changes: object) -> StreamState:
    return structs.replace(StreamState(h=2, v=0, e=0, p=2, blacklist=(), retired=()), **changes)


def entry(s1: int, s2: int | None = None) -> Entry:
    return Entry(s1, s1 if s2 is None else s2, "r0", 1, b"", b"")


def verdict(
    header: Header, before: StreamState | None = None, *, who: str = "r1", payload: bytes = b"", **answers: object
) -> StreamState | Broken | Held:
    message = StreamMessage(1, who, 7, encode(header), payload, b"")
    return judge(HOUSE.record, before or state(), who, 7, header, message, World(**answers))


def stable(**changes: object) -> Stable:
    told = {
        "h": 4,
        "digest": D,
        "certificate": (),
        "v": 0,
        "e": 0,
        "p": 2,
        "blacklist": (),
        "retired": (),
        "vector": (),
    }
    return Stable(**{"c": 1, **told, **changes})


BREAKS = {
    "R1: PREPARE of a view not entered": (Prepare(1, 1, 4, D), {}, {}),
    "R1: PREPARE of an older view": (Prepare(1, 0, 4, D), {"e": 3, "v": 3}, {}),
    "R1: PREPARE after a VIEW-CHANGE": (Prepare(1, 0, 4, D), {"v": 1}, {}),
    "R1: SKIP after a VIEW-CHANGE": (Skip(1, 0, 4, 4), {"v": 1}, {}),
    "R1: COMMIT after a VIEW-CHANGE": (Commit(1, 0, (entry(4),)), {"v": 1}, {}),
    "R1: VIEW-CHANGE to the same target": (ViewChange(1, 3, (), ()), {"v": 3}, {}),
    "R1: VIEW-CHANGE to a lower target": (ViewChange(1, 2, (), ()), {"v": 3}, {}),
    "R1: VIEW-CHANGE to the wedge's view": (ViewChange(1, WEDGED_VIEW, (), ()), {}, {}),
    "R1: NEW-VIEW by one who does not lead it": (NewView(1, 5, 2, 3, (), ()), {}, {}),
    "R1: COMMIT(NEW-VIEW) by its leader": (CNV, {}, {}),
    "R1: NEW-VIEW of the view entered": (NV, {"e": 4, "v": 4}, {}),
    "R1: NEW-VIEW below the VIEW-CHANGE": (NV, {"v": 5}, {}),
    "R1: anything after a wedge": (stable(v=WEDGED_VIEW), {"v": WEDGED_VIEW}, {}),
    "R1: a second wedge": (Wedge(1, b""), {"v": WEDGED_VIEW}, {}),
    "R2: PREPARE beyond the window": (Prepare(1, 0, 7, D), {}, {}),
    "R2: SKIP that ends beyond the window": (Skip(1, 0, 4, 7), {}, {}),
    "R2: COMMIT with one entry beyond the window": (Commit(1, 0, (entry(4), entry(7))), {}, {}),
    "R2: COMMIT of a SKIP that ends beyond it": (Commit(1, 0, (entry(4, 7),)), {}, {}),
    "R2: NEW-VIEW that ends beyond the window": (NewView(1, 4, 2, 7, (), ()), {}, {}),
    "R2: STABLE of the same slot": (stable(h=2), {}, {}),
    "R2: STABLE that goes back": (stable(h=1), {}, {}),
    "R3: PREPARE for another's slot": (Prepare(1, 0, 5, D), {}, {}),
    "R3: SKIP from another's slot": (Skip(1, 0, 3, 4), {}, {}),
    "R3: SKIP to another's slot": (Skip(1, 0, 4, 6), {}, {}),
    "R3: SKIP that runs backwards": (Skip(1, 0, 4, 1), {"p": 0}, {}),
    "R3: a second PREPARE for a slot": (Prepare(1, 0, 4, D), {"p": 4}, {}),
    "R3: PREPARE below what was skipped": (Prepare(1, 0, 4, D), {"p": 6}, {}),
    "R3: PREPARE in a slot of the NEW-VIEW": (Prepare(1, 3, 4, D), {"e": 3, "v": 3, "p": 5}, {}),
    "R3: PREPARE by a blacklisted member": (Prepare(1, 0, 4, D), {"blacklist": ("r1",)}, {}),
    "R3: PREPARE by a retired member": (Prepare(1, 0, 4, D), {"retired": ("r1",)}, {}),
    "form: another configuration": (Prepare(2, 0, 4, D), {}, {}),
    "form: an endless log": (Prepare(1, 0, 4, D), {"since": 8}, {}),
    "form: votes without end": (Commit(1, 0, (entry(5), entry(6))), {"cited": 7}, {}),
    "form: COMMIT with nothing": (Commit(1, 0, ()), {}, {}),
    "form: COMMIT with more than L entries": (Commit(1, 0, (entry(4),) * 5), {}, {}),
    "form: VIEW-CHANGE without its REQs": (ViewChange(1, 3, (), ()), {}, {"requests": False}),
    "form: wedge without PREPARED": (Wedge(1, b""), {}, {"prepared": False}),
    "form: STABLE without certificate": (stable(), {}, {"certificate": False}),
    "form: STABLE with a false v": (stable(v=1), {}, {}),
    "form: STABLE with a false view e": (stable(e=1), {}, {}),
    "form: STABLE with a false p": (stable(p=0), {}, {}),
    "form: STABLE with a false blacklist": (stable(blacklist=("r0",)), {}, {}),
    "form: STABLE that hides a retired": (stable(), {"retired": ("r0",)}, {}),
    "form: NEW-VIEW that does not recompute": (NV, {}, {"recomputes": False}),
}  # fmt: skip
HOLDS = {
    "NEW-VIEW whose votes are not all here": (NV, "r1", {"recomputes": None}),
    "COMMIT(NEW-VIEW) whose NEW-VIEW is not here": (CNV, "r0", {"stands": None}),
}
STANDS = {
    "PREPARE": (Prepare(1, 0, 4, D), {}, "r1", {"p": 4, "since": 1}),
    "PREPARE at the window's end": (Prepare(1, 0, 4, D), {"h": 0, "p": 0}, "r1", {"p": 4, "since": 1}),
    "SKIP": (Skip(1, 0, 1, 4), {"h": 0, "p": 0}, "r1", {"p": 4, "since": 1}),
    "COMMIT": (Commit(1, 0, (entry(6),)), {"since": 7}, "r1", {"since": 8, "cited": 1}),
    "COMMIT for slots already stable": (Commit(1, 0, (entry(1),)), {}, "r1", {"since": 1, "cited": 1}),
    "COMMIT with an entry that claims nonsense": (Commit(1, 0, (entry(-5),)), {}, "r1", {"since": 1, "cited": 1}),
    "VIEW-CHANGE": (ViewChange(1, 3, (), ()), {"since": 8}, "r1", {"v": 3, "since": 0}),
    "a wedge": (Wedge(1, b""), {"v": 3}, "r1", {"v": WEDGED_VIEW, "since": 0}),
    "STABLE": (stable(), {"since": 8}, "r1", {"h": 4, "since": 0}),
    "STABLE 10^9 with its certificate": (stable(h=10**9), {}, "r1", {"h": 10**9}),
    "STABLE between VIEW-CHANGE and NEW-VIEW": (stable(v=4), {"v": 4}, "r1", {"h": 4}),
    "NEW-VIEW": (NV, {"since": 8}, "r1", {"e": 4, "p": 5, "blacklist": ("r0",), "retired": ("r2",), "since": 0}),
    "COMMIT(NEW-VIEW)": (CNV, {"v": 4}, "r0", {"e": 4, "p": 5, "blacklist": ("r0",), "retired": ("r2",)}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_ends_a_stream(name: str) -> None:
    header, before, answers = BREAKS[name]
    outcome = verdict(header, state(**before), **answers)
    assert isinstance(outcome, Broken)
    assert outcome.rule.startswith(name.partition(":")[0]), outcome.rule


@pytest.mark.parametrize("name", [n for n in STANDS if n != "NEW-VIEW"])
def test_form_only_a_new_view_has_a_payload(name: str) -> None:
    """A COMMIT that carries a PREPARE carries all of it; had it a payload, who has it would judge otherwise."""
    header, before, who, _ = STANDS[name]
    assert isinstance(verdict(header, state(**before), who=who, payload=b"x"), Broken)


HUGE = bytes(1 << 20)


@pytest.mark.parametrize(
    "header",
    [
        Commit(1, 0, (Entry(4, 4, "r0", 1, HUGE, b""),)),
        stable(vector=(Named("r0", 1, HUGE),)),
        stable(certificate=(Signed("r0", HUGE),)),
        ViewChange(1, 3, (), (HUGE,)),
        Prepare(1, 0, 4, HUGE),
    ],
    ids=lambda header: type(header).__name__,
)
def test_form_no_message_is_larger_than_a_correct_one(header: Header) -> None:
    assert isinstance(verdict(header), Broken)


@pytest.mark.parametrize("name", HOLDS)
def test_what_only_holds_a_stream(name: str) -> None:
    header, who, answers = HOLDS[name]
    assert isinstance(verdict(header, who=who, **answers), Held)


@pytest.mark.parametrize("name", STANDS)
def test_what_stands_and_the_state_after_it(name: str) -> None:
    header, before, who, after = STANDS[name]
    outcome = verdict(header, state(**before), who=who)
    assert isinstance(outcome, StreamState), outcome
    assert outcome == state(**{**before, **after})


@pytest.mark.parametrize(("cited", "sound"), [(None, True), (NV, False), (NewView(1, 1, 2, 5, (), ()), True)])
def test_form_a_commit_of_a_new_view_that_is_none_or_does_not_stand_ends_its_stream(cited, sound) -> None:
    outcome = verdict(CNV, who="r0", cited=cited, stands=sound)
    assert isinstance(outcome, Broken)


def test_r2_a_commit_of_a_new_view_beyond_the_own_window_ends_its_stream() -> None:
    assert isinstance(verdict(CNV, state(h=0), who="r0"), Broken)
    assert isinstance(verdict(CNV, state(h=1), who="r0"), StreamState)


def test_r4_the_rules_read_nothing_of_the_past_but_the_stated_state() -> None:
    """A judge who starts at a STABLE agrees with one who has read everything: `stated` is all there is."""
    before = state(h=2, v=4, e=3, p=3, blacklist=("r0",), retired=())
    whole = verdict(stable(v=4, e=3, p=3, blacklist=("r0",)), before)
    assert isinstance(whole, StreamState)
    assert whole == StreamState(4, 4, 3, 3, ("r0",), ())


def test_the_leader_never_depends_on_the_blacklist() -> None:
    assert [leader(HOUSE.record, g) for g in range(4)] == ["r0", "r1", "r2", "r0"]


def test_who_proposes_in_a_view() -> None:
    record = HOUSE.record
    assert proposers(record, 0, (), ()) == ("r0", "r1", "r2")
    assert proposers(record, 0, ("r1",), ()) == ("r0", "r2")
    assert proposers(record, 0, ("r1",), ("r2",)) == ("r0",)
    assert proposers(record, 0, ("r0", "r1"), ("r2",)) == ("r0", "r1"), "all blacklisted or retired: less the retired"
    assert proposers(record, 0, (), ("r0", "r1", "r2")) == ("r0", "r1", "r2"), "all retired: all"
    assert proposers(MINBFT.record, 4, ("r1",), ("r1",)) == ("r1",), "minbft: the leader alone"


def test_every_stream_starts_at_the_records_slot() -> None:
    record = replace(HOUSE.record, h=40)
    assert initial(record) == StreamState(40, 0, 0, 40, (), ())
