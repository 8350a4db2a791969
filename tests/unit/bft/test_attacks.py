"""What one faulty member, or client, may try on correct replicas: it neither stops, nor fills, nor splits them."""

from types import UnionType
from typing import get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.bft import recall
from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.clients import _window_key, execute
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import (
    BundleBody,
    FetchBatches,
    Named,
    Request,
    Signed,
    StatementMessage,
    encode,
)
from cloudfit_orchestrator.bft.store import LIBRARY_RESERVE, MAX_CHUNK, StateStore, bucket_of
from cloudfit_orchestrator.bft.usig.journal import decode_entry
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    EpochEndMessage,
    Fetch,
    Header,
    Merge,
    NewView,
    PeerMessage,
    Prepare,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.model.ui import RECENT_UIS
from cloudfit_orchestrator.services.counter import CounterService, add
from tests.unit.bft.house import House, entry_of, replace_certificate
from tests.unit.bft.machine import Machine

FAULTY = "r2#3"


# ----- judges must agree, whatever came first
def both_orders(house: House, first: StreamMessage, second: StreamMessage) -> tuple[list, list]:
    one, other = house.judge(), house.judge()
    house.tell(one, [first])
    house.tell(one, [second])
    house.tell(other, [second])
    house.tell(other, [first])
    return one.slots.decisions(), other.slots.decisions()


def test_an_entry_with_a_wrong_certificate_counts_for_nobody() -> None:
    house = House()
    p = house.prepare("r1", 0, 1)
    c = house.say("r2", Commit(1, 0, (entry_of(p, certificate=bytes(64)),)))
    assert both_orders(house, p, c) == ([], [])


def test_a_vote_with_a_wrong_certificate_does_not_split_a_view_change() -> None:
    """r1 hears the proposal first and r0 the vote: had r1 counted it, r0's NEW-VIEW would look false to r1."""
    house = House(window=4)
    p = house.prepare("r1", 0, 1)
    c = house.say("r2", Commit(1, 0, (entry_of(p, certificate=bytes(64)),)))
    r0, r1 = house.judge(), house.judge()
    house.tell(r1, [p])
    house.tell(r1, [c])
    house.tell(r0, [c])
    house.tell(r0, [p])
    votes = [house.view_change(r, 3) for r in ("r0", "r2")]
    for judge in (r0, r1):
        house.tell(judge, votes)
    merged = r0.try_merge(r0.votes.of(3))
    assert merged is not None
    names = tuple(Named(v.replica, v.cv, v.digest) for v in votes)
    header = NewView(1, 3, merged.h, merged.s_max, merged.blacklist, merged.retired)
    house.tell(r1, [house.say("r0", header, encode(Merge(names, merged.choices)))])
    assert r1.liars == {}
    assert 3 in r1.new_views


def test_a_proposal_with_a_payload_is_none_for_everybody() -> None:
    house = House()
    p = house.say("r1", Prepare(1, 0, 1, house.batch()), b"x")
    assert both_orders(house, p, house.commit("r2", p)) == ([], [])


def test_a_commit_of_a_second_new_view_is_false_for_everybody() -> None:
    """n=5, f=2: faulty leader r1 certifies two NEW-VIEW(1), faulty r2 commits to the one that does not stand."""
    house = House(5, f=2, window=8, period=4)
    first = house.new_view("r1", 1, [house.view_change(r, 1) for r in ("r0", "r3", "r4")])
    house.commit_view("r0", first)
    before = list(house.order)
    second = house.say("r1", NewView(1, 1, 0, 8, ("r0", "r3"), ("r4",)), b"junk")
    commit = house.commit_view("r2", second)
    early, late = house.judge(), house.judge()
    for judge, order in ((early, [commit, second]), (late, [second, commit])):
        house.tell(judge, before)
        for message in order:
            house.tell(judge, [message])
    for judge in (early, late):
        assert judge.streams["r2"].ended == commit.cv


# ----- frames that must stop nobody
ODD_FRAMES = {
    "EPOCH-END of wrong sizes": EpochEndMessage(1, "r1", 0, b"", b"", b""),
    "EPOCH-END with a negative counter": EpochEndMessage(1, "r1", -1, bytes(32), bytes(64), b""),
    "EPOCH-END with a large counter": EpochEndMessage(1, "r1", (1 << 64) - 1, bytes(32), bytes(64), bytes(64)),
    "a known counter, no header": StreamMessage(1, "r1", 0, b"\xff", b"x", b""),
    "a negative counter": StreamMessage(1, "r1", -5, b"\xff", b"x", b""),
    "a stranger's stream": StreamMessage(1, "nobody", 1, b"", b"", b""),
    "a FETCH of everything": Fetch(1, "r1", -(1 << 60), 1 << 60),
    "a FETCH of nobody's": Fetch(1, "nobody", 1, 2),
    "a statement of no kind": StatementMessage(1, "r1", 77, b"", b""),
    "a CHECKPOINT beyond all": StatementMessage(1, "r1", Kind.CHECKPOINT, b"\xff" * 40, bytes(64)),
    "a REQ beyond all": StatementMessage(1, "r1", Kind.REQ, b"\xff" * 8, bytes(64)),
}


@pytest.mark.parametrize("name", ODD_FRAMES)
def test_an_odd_frame_stops_nobody_and_leaves_nothing(name: str) -> None:
    machine = Machine(House(), "r0")
    before = len(machine.log)
    machine.hear(ODD_FRAMES[name], sender=FAULTY)
    machine.ticks(0.3)
    assert len(machine.log) == before
    assert machine.core.status["live"]


def test_signed_nonsense_ends_its_senders_stream_and_nothing_else() -> None:
    house = House()
    machine = Machine(house, "r0")
    machine.hear(house.say("r2", b"\xc1 no header"), sender=FAULTY)
    assert ("liar", {"replica": "r2", "kind": "form: header does not decode", "slot": 0}) in machine.reports
    machine.hear(house.prepare("r1", 0, 1))
    assert machine.core.status["slot"] == 1


def test_frames_without_a_valid_ui_reach_neither_log_nor_memory() -> None:
    machine = Machine(House(), "r0")
    before = len(machine.log)
    for i in range(20):
        data = b"junk%d" % i
        machine.hear(
            StreamMessage(1, "r1", 0, batch_digest(data), b"", b"", data), sender=FAULTY, batches=False
        )  # fmt: skip
    assert len(machine.log) == before


# ----- bounds
def test_a_repeated_entry_waits_once_and_what_is_settled_waits_no_more() -> None:
    house = House(window=4)
    judge = house.judge()
    far = house.say("r2", Prepare(1, 0, 2, house.batch()))
    house.streams["r2"].clear()
    house.order.clear()
    ghost = StreamMessage(1, "r2", 1000, far.header, b"", b"")
    ghost = replace_certificate(ghost, house.certify("r2", 1000, ghost.digest))
    house.say("r2", Commit(1, 0, (entry_of(ghost),) * 4))
    house.tell(judge)
    assert len(judge.citations) == 1
    judge.truncate(2)
    assert len(judge.citations) == 0


def test_replies_that_fill_a_bucket_leave_room_for_every_clients_window() -> None:
    store = StateStore()
    client = b"v" * 32
    where = bucket_of(_window_key(client))
    number = 0
    while store._sizes[where] + (256 << 10) < MAX_CHUNK - LIBRARY_RESERVE:
        number += 1
        key = StateStore.RESERVED + b"r" + b"x" * 32 + number.to_bytes(8, "big")
        if bucket_of(key) == where:
            store.put_reply(key, bytes(128 << 10))
    (done,), _ = execute(store, CounterService(), (BundleBody("ledger", client, (Request(1, add(1)),)),), 16)
    assert len(done.results) == 1


def test_a_batch_that_a_peer_has_is_asked_for_among_many_that_nobody_gives() -> None:
    house = House(period=64, window=512, algorithm=Algorithm.MINBFT)
    machine = Machine(house, "r1")
    for s in range(1, 300):
        house.say("r0", Prepare(1, 0, s, bytes(2) + s.to_bytes(30, "big")))
    good = house.prepare("r0", 0, 300)
    machine.hear(*house.streams["r0"], batches=False)
    machine.ticks(4)
    asked = {digest for _, m in machine.sent if isinstance(m, FetchBatches) for digest in m.digests}
    header = decode_header(good.header)
    assert isinstance(header, Prepare)
    assert header.batch in asked


def test_no_more_bodies_wait_than_the_wormhole_remembers() -> None:
    house = House(period=64, window=512)
    machine = Machine(house, "r0")
    machine.wormhole = False
    voice = machine.core._at.ordering.voice
    assert voice is not None
    while voice.room:
        slot = voice._next_own()
        assert slot is not None
        voice.propose(slot, house.batch())
    for r in ("r1", "r2"):
        machine.hear(house.statement(r, Kind.REQ, 5))
    machine.core.record(house.successor())
    assert len(voice.pending) == RECENT_UIS
    machine.serve()
    machine.wormhole = True
    machine.serve()
    assert voice.tail.wedged, "said when there is room"


# ----- a faulty client
def executed_once(house: House, machine: Machine) -> bytes:
    bundle = house.bundle([(1, add(1))])
    batch = make_batch([bundle])
    digest = batch_digest(batch)
    house.batches[digest] = batch
    machine.hear(house.prepare("r1", 0, 1, digest))
    assert machine.core.status["slot"] == 1
    return bundle


@pytest.mark.parametrize("refused", [False, True])
def test_a_client_that_repeats_itself_crowds_out_no_checkpoint(refused: bool) -> None:  # noqa: FBT001
    house = House(period=2, window=8)
    machine = Machine(house, "r0")
    bundle = executed_once(house, machine)
    machine.kss = False
    for i in range(5000):
        machine.core.tick(1 + i * 0.06)
        machine.core.from_client(house.client_keys[0].public, bundle)
        effects = machine.core.effects()
        machine.waiting += [] if refused else effects
    machine.now_s = 400.0
    machine.kss = True
    machine.hear(house.prepare("r2", 0, 2))
    machine.ticks(1)
    said = [m for _, m in machine.sent if isinstance(m, StatementMessage) and m.kind == Kind.CHECKPOINT]
    assert said


# ----- durability
def test_a_rewritten_log_keeps_the_batch_of_a_proposal_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A COMMIT must not outlive its batch: the batch came with a PREPARE ahead of a gap, then the log was cut."""
    monkeypatch.setattr(recall, "REWRITE_SLACK", -10_000)
    house = House(period=4, window=8)
    machine = Machine(house, "r0")
    first, second = house.prepare("r1", 0, 1), house.prepare("r1", 0, 4)
    machine.hear(second)
    machine.ticks(1.5)
    assert machine.rewrites
    machine.hear(first)
    voted = {e.cv for header in machine.said() if isinstance(header, Commit) for e in header.entries}
    assert second.cv in voted
    logged = {batch_digest(e.batch) for e in map(decode_entry, machine.log) if isinstance(e, LogBatch)}
    header = decode_header(second.header)
    assert isinstance(header, Prepare)
    assert header.batch in logged


# ----- anything that decodes
numbers = st.integers(-2, 6) | st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)])
texts = st.sampled_from(["r0", "r1", "r2", "", "stranger"])
octets = st.sampled_from([b"", b"x", bytes(32), bytes(64)]) | st.binary(max_size=40)


def anything(kind: object) -> st.SearchStrategy[object]:
    """Messages of that type, of fields that come near to what is real."""
    if kind in (int, str, bytes, bool):
        return {int: numbers, str: texts, bytes: octets, bool: st.booleans()}[kind]
    origin = get_origin(kind)
    if origin is tuple:
        inner = get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return st.lists(anything(inner[0]), max_size=3).map(tuple)
        return st.tuples(*(anything(x) for x in inner))
    if origin is UnionType:
        return st.one_of(*(anything(x) for x in get_args(kind)))
    assert isinstance(kind, type)
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: anything(hint) for name, hint in hints.items() if not name.startswith("__")})


HOUSE = House(3, window=4, period=2)
HEADERS = anything(Header)
FRAMES = anything(PeerMessage)


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(FRAMES, min_size=1, max_size=4), said=st.lists(st.tuples(HEADERS, octets), max_size=3))
def test_nothing_that_a_faulty_member_sends_or_signs_stops_a_replica(frames, said) -> None:
    HOUSE.streams = {r: [] for r in HOUSE.names}
    HOUSE.order = []
    machine = Machine(HOUSE, "r0")
    for header, payload in said:
        machine.hear(HOUSE.say("r2", header, payload), sender=FAULTY)
    for frame in frames:
        machine.hear(frame, sender=FAULTY, batches=False)
        if isinstance(frame, StreamMessage):
            machine.hear(msgspec.structs.replace(frame, c=1, replica="r2"), sender=FAULTY, batches=False)
        if hasattr(frame, "c"):
            machine.hear(msgspec.structs.replace(frame, c=1), sender=FAULTY, batches=False)
    machine.ticks(0.5)
    assert machine.core.status["live"]
    machine.hear(HOUSE.prepare("r1", 0, 1))
    assert machine.core.status["slot"] == 1


def test_a_certificate_with_one_bad_signature_is_taken_over_by_nobody() -> None:
    """It would swell the STABLEs of those who pass it on beyond what any correct one may be."""
    house = House(period=1, window=4)
    machine = Machine(house, "r0")
    p = house.prepare("r1", 0, 1)
    commit = house.commit("r2", p)
    machine.kss = False
    machine.hear(p, commit)
    root = machine.core._at.execution.digests[1]
    padded = (*house.checkpoint(1, root, "r1", "r2"), Signed("r0", bytes(8000)))
    machine.hear(house.stable("r2", 1, digest=root, certificate=padded, vector=()), sender=FAULTY)
    machine.kss = True
    machine.serve()
    assert machine.core._at.ordering.configuration.streams["r2"].ended == 2
    machine.hear(house.statement("r1", Kind.CHECKPOINT, 1, root))
    (stable,) = [h for h in machine.said() if isinstance(h, Stable)]
    assert len(stable.certificate) == 2
