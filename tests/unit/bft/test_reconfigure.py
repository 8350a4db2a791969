"""Reconfiguration (protocol §6): wedge, S, confirmations; S is not unique, and nothing tentative leaves a member."""

import base64
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.messages import (
    BatchMessage,
    Named,
    StateIndex,
    StatementMessage,
    StateQuery,
    WedgeSet,
    encode,
)
from cloudfit_orchestrator.bft.reconfigure import MAX_SETS_OF_PEER, Successors
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.usig.messages import Commit, StreamMessage, Wedge
from cloudfit_orchestrator.model.record import Confirmation, Status, confirm_body, open_record, record_hash, seal_record
from cloudfit_orchestrator.model.statement import Kind, statement_bytes
from cloudfit_orchestrator.services.counter import add
from tests.unit.bft.house import CONTROLLER, House
from tests.unit.bft.machine import Machine

EMPTY = StateStore().root()


def names(*wedges: StreamMessage) -> tuple[Named, ...]:
    return tuple(Named(w.replica, w.cv, w.digest) for w in wedges)


def confirmations(machine: Machine, *, above: int = 1) -> set[tuple[int, int, bytes]]:
    """(c', h, digest) of the CONFIRMs that were reported, c' > `above`."""
    return {
        (int(str(body["c"])), int(str(body["h"])), base64.b64decode(str(body["digest"])))
        for topic, body in machine.reports
        if topic == "confirm" and int(str(body["c"])) > above
    }


def active(house: House, prepared: bytes, h: int, digest: bytes, *, signers: tuple[str, ...] = ("r0", "r1")) -> bytes:
    """ACTIVE of a PREPARED record, as a controller makes it of confirmations."""
    record = open_record(prepared, house.controllers)
    body = confirm_body(record_hash(prepared), h, digest)
    signed = tuple(
        Confirmation(r, house.kss[r].sign(statement_bytes(Kind.CONFIRM, record.group, r, record.c, body)))
        for r in signers
    )
    return seal_record(
        record.activated(prepared=record_hash(prepared), previous=bytes(32), h=h, digest=digest, confirmations=signed),
        CONTROLLER,
    )


class Story:
    """Faulty r2 proposed x in slot 2 and nobody has voted: r0, r1 wedged without it, r2 wedged behind it."""

    def __init__(self) -> None:
        self.house = house = House(3, period=4, window=8)
        self.r0 = Machine(house, "r0")
        bundle = house.bundle([(1, add(5))])
        batch = make_batch([bundle])
        house.batches[batch_digest(batch)] = batch
        self.bundle = bundle
        self.prepared = house.successor(2)
        self.x = house.prepare("r2", 0, 2, batch_digest(batch))
        self.w1, self.w2 = house.wedge("r1", self.prepared), house.wedge("r2", self.prepared)
        self.r0.core.record(self.prepared)
        self.r0.serve()
        self.w0 = house.streams["r0"][-1]
        self.without, self.with_x = names(self.w0, self.w1), names(self.w0, self.w2)

    def both(self) -> set[tuple[int, int, bytes]]:
        """r0 hears all, and both sets; what it confirmed."""
        self.r0.hear(self.w1)
        self.r0.hear(WedgeSet(1, 2, self.with_x))
        self.r0.hear(self.x, self.w2)
        self.r0.hear(WedgeSet(1, 2, self.without))
        return confirmations(self.r0)


def test_a_prepared_record_wedges_the_stream_and_ends_the_epoch() -> None:
    s = Story()
    assert isinstance(s.r0.said()[-1], Wedge)
    assert s.r0.ends == [1]
    assert ("prepared", {"c": 2}) in s.r0.reports


def test_every_s_that_is_verified_is_confirmed() -> None:
    """One only would let a silent replica block the record: the others may have computed another."""
    s = Story()
    confirmed = s.both()
    assert {(c, h) for c, h, _ in confirmed} == {(2, 0), (2, 2)}
    assert len({digest for _, _, digest in confirmed}) == 2
    assert (2, 0, EMPTY) in confirmed


def test_nothing_of_a_tentative_s_leaves_a_member_but_its_confirmation() -> None:
    s = Story()
    before = len(s.r0.answers)
    s.r0.kss = False
    s.both()
    s.r0.client(s.bundle)
    s.r0.ticks(2)
    assert {e.kind for e in s.r0.waiting if hasattr(e, "kind")} <= {Kind.CONFIRM, Kind.CHECKPOINT}
    assert not s.r0.signs(Kind.CHECKPOINT)
    s.r0.kss = True
    s.r0.serve()
    assert len(s.r0.answers) == before
    assert s.r0.core.status["slot"] == 0
    assert not [m for _, m in s.r0.sent if isinstance(m, StatementMessage)]
    tentative = next(d for _, h, d in confirmations(s.r0) if h == 2)
    sent = len(s.r0.sent)
    s.r0.core.receive("r1#2", encode(StateQuery(tentative)))
    s.r0.serve()
    assert len(s.r0.sent) == sent, "the tentative state is served to nobody"


@pytest.mark.parametrize("h", [0, 2])
def test_the_s_that_active_pins_is_installed_and_the_other_dropped(h: int) -> None:
    s = Story()
    pinned = next(d for _, at, d in s.both() if at == h)
    s.r0.core.record(active(s.house, s.prepared, h, pinned))
    s.r0.serve()
    status = s.r0.core.status
    assert (status["c"], status["slot"], status["installed"]) == (2, h, True)
    assert s.r0.core._at.execution.store.root() == pinned
    assert (2, h) in s.r0.disk


def test_a_member_goes_back_to_base_and_fetches_if_another_s_is_pinned() -> None:
    s = Story()
    s.both()
    s.r0.core.record(active(s.house, s.prepared, 1, b"p" * 32))
    s.r0.serve()
    assert s.r0.core.status["c"] == 2
    assert not s.r0.core.status["installed"]
    s.r0.ticks(1)
    asked = {m.root for _, m in s.r0.sent if isinstance(m, StateQuery)}
    assert asked == {b"p" * 32}


def test_a_pinned_state_that_is_the_own_one_is_installed_with_its_index() -> None:
    """S had only no-ops for who had not computed it: its index left no chunk to be fetched, and so none came with which
    the transfer could end. Two of four such members stopped the group for good.
    """
    house = House(3)
    machine = Machine(house, "r0")
    own = machine.core._at.execution.store.snapshot()
    machine.core.record(active(house, house.successor(), 2, own.root, signers=("r1", "r2")))
    machine.serve()
    machine.ticks(1)
    assert not machine.core.status["installed"]
    assert {m.root for _, m in machine.sent if isinstance(m, StateQuery)} == {own.root}
    machine.hear(StateIndex(own.root, 2, b"".join(own.chunk_hashes)))
    assert machine.core.status["installed"]
    assert machine.core.status["slot"] == 2
    assert (2, 2) in machine.disk


def test_forged_confirmations_activate_nothing() -> None:
    s = Story()
    confirmed = s.both()
    digest = next(d for _, h, d in confirmed if h == 2)
    good = open_record(active(s.house, s.prepared, 2, digest), s.house.controllers)
    bad = [
        active(s.house, s.prepared, 2, digest, signers=("r2",)),
        active(s.house, s.prepared, 2, digest, signers=("r2", "r2")),
        seal_record(replace(good, h=1), CONTROLLER),
        seal_record(replace(good, digest=b"l" * 32), CONTROLLER),
    ]
    for envelope in bad:
        s.r0.core.record(envelope)
        s.r0.serve()
    assert s.r0.core.status["c"] == 1
    assert sum(topic == "bad_record" for topic, _ in s.r0.reports) == len(bad)


def test_a_record_that_no_controller_signed_does_nothing() -> None:
    s = House(3)
    machine = Machine(s, "r0")
    record = open_record(s.successor(2), s.controllers)
    machine.core.record(seal_record(record, Ed25519PrivateKey.generate()))
    machine.serve()
    assert not any(isinstance(h, Wedge) for h in machine.said())
    assert machine.core.status["c"] == 1


def test_the_old_configuration_never_resumes_and_one_wedge_serves_every_record_on_the_base() -> None:
    s = Story()
    first = s.both()
    later = s.house.successor(3)
    s.r0.core.record(later)
    s.r0.serve()
    s.r0.ticks(2)
    assert sum(isinstance(h, Wedge) for h in s.r0.said()) == 1
    assert {(h, d) for c, h, d in confirmations(s.r0) if c == 3} == {(h, d) for _, h, d in first}
    s.r0.hear(s.house.prepare("r1", 0, 1), batches=True)
    s.r0.client(s.bundle)
    s.r0.ticks(2)
    assert isinstance(s.r0.said()[-1], Wedge)


def test_votes_of_others_after_their_wedge_count_for_nothing() -> None:
    s = Story()
    s.both()
    s.r0.hear(s.house.commit("r1", s.x))  # r1 wedged before: a false vote
    s.r0.ticks(1)
    assert s.r0.core.status["slot"] == 0
    assert s.r0.core._at.ordering.configuration.slots.decisions() == []


def test_votes_that_came_before_the_wedges_still_decide() -> None:
    house = House(3, period=4, window=8)
    r0 = Machine(house, "r0")
    p = house.prepare("r1", 0, 1)
    commit = house.commit("r2", p)
    r0.core.record(house.successor(2))
    r0.serve()
    assert not any(isinstance(h, Commit) for h in r0.said())
    r0.hear(p, commit)
    assert r0.core.status["slot"] == 1, "decided in c by r1 and r2"


def test_s_has_what_was_decided_whichever_wedges_it_is_built_from() -> None:
    house = House(3, period=4, window=8)
    p = house.prepare("r1", 0, 1)
    house.commit("r0", p)
    wedges = {r: house.wedge(r) for r in ("r0", "r1", "r2")}
    for pair in (("r0", "r1"), ("r0", "r2"), ("r1", "r2")):
        merged = house.merged(-1, [wedges[r] for r in pair])
        assert merged.s_max == 1, f"slot 1 is lost by the wedges of {pair}"
    assert house.full_judge().slots.decision(1) is not None


def test_a_member_that_lacks_a_batch_confirms_when_it_has_it() -> None:
    s = Story()
    s.r0.hear(WedgeSet(1, 2, s.with_x))
    s.r0.hear(s.x, s.w2, batches=False)
    assert {h for _, h, _ in confirmations(s.r0)} == set()
    s.r0.ticks(0.5)
    s.r0.hear(BatchMessage(make_batch([s.bundle])))
    assert {h for _, h, _ in confirmations(s.r0)} == {2}


def test_a_refused_confirmation_is_asked_for_again() -> None:
    s = Story()
    s.r0.kss = False
    s.r0.hear(s.w1)
    s.r0.waiting = []  # refused, and dropped
    s.r0.kss = True
    s.r0.ticks(3)
    assert {h for _, h, _ in confirmations(s.r0)} == {0}


@pytest.mark.parametrize("h", [0, 2])
def test_confirmed_states_survive_a_restart(h: int) -> None:
    s = Story()
    confirmed = s.both()
    pinned = next(d for _, at, d in confirmed if at == h)
    again = s.r0.restarted()
    again.ticks(2)
    assert confirmations(again) == confirmed
    again.core.record(active(s.house, s.prepared, h, pinned))
    again.serve()
    assert (again.core.status["slot"], again.core.status["installed"]) == (h, True)


def test_an_activation_that_was_lost_in_a_crash_is_taken_from_the_log_alone() -> None:
    s = Story()
    pinned = next(d for _, at, d in s.both() if at == 2)
    envelope = active(s.house, s.prepared, 2, pinned)
    s.r0.saving = False  # the snapshot of (2, 2) does not reach the disk
    s.r0.core.record(envelope)
    s.r0.serve()
    assert (2, 2) not in s.r0.disk
    again = s.r0.restarted(start=False)
    again.serve()
    assert again.core.status["c"] == 2
    assert again.core._at.execution.store.root() == pinned
    assert (2, 2) in again.disk


def test_a_peer_names_few_sets() -> None:
    """A faulty peer's invented sets must not use up the room for those of others."""
    successors = Successors()
    for i in range(10):
        taken = successors.add_set((Named("r1", i, bytes(32)),), "r2#3")
        assert taken is (i < MAX_SETS_OF_PEER)
    assert successors.add_set((Named("r1", 99, bytes(32)),), "r1#2")


def test_invented_wedges_are_confirmed_by_nobody() -> None:
    s = Story()
    s.r0.hear(WedgeSet(1, 2, (s.without[0], Named("r1", 1, b"z" * 32))))
    s.r0.hear(WedgeSet(1, 2, (s.without[0], s.without[0])))
    s.r0.hear(WedgeSet(1, 2, s.without[:1]))
    s.r0.ticks(1)
    assert confirmations(s.r0) == set()


def test_the_first_configuration_begins_with_the_empty_state() -> None:
    house = House()
    machine = Machine(house, "r0", start=False)
    machine.core.record(house.prepared)
    machine.serve()
    assert confirmations(machine, above=0) == {(1, 0, EMPTY)}
    assert open_record(house.prepared, house.controllers).status is Status.PREPARED
