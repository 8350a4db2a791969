"""Executions of an eighth reading: each property did not hold once, for the reason told there."""

import tracemalloc

import pytest

from cloudfit_orchestrator.bft.batch import BundleChecker, batch_digest, make_batch
from cloudfit_orchestrator.bft.clients import ClientWindow, execute
from cloudfit_orchestrator.bft.effects import Report
from cloudfit_orchestrator.bft.journal import entry_decoder
from cloudfit_orchestrator.bft.messages import BundleBody, Named, Read, ReadReply, Request, decode_client, encode
from cloudfit_orchestrator.bft.outbox import MAX_REPLY_BYTES, Outbox
from cloudfit_orchestrator.bft.pbft.journal import ENTRIES, LogView
from cloudfit_orchestrator.bft.pbft.messages import WEDGE, Change, NewView, change_statement
from cloudfit_orchestrator.bft.pool import MAX_BUNDLES, MAX_BYTES, Pool
from cloudfit_orchestrator.bft.store import MAX_KEY, StateStore
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Discarded,
    Fetch,
    FetchNewView,
    Merge,
)
from cloudfit_orchestrator.bft.usig.messages import NewView as UsigNewView
from cloudfit_orchestrator.bft.usig.serving import answer_fetch, answer_view
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.services.counter import CounterService, add, value
from cloudfit_orchestrator.services.kv import Get, KvService, List, Put, encode_operation
from tests.conformance.group import Group
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine
from tests.unit.bft.test_pbft import change, group_of, node, ordering, prepared, tell, view_change
from tests.unit.bft.test_readings_five import behind_a_gap

PATIENT = {"progress_timeout_ms": 60_000}  # nobody is suspected in these executions


# ----- votes
def test_a_vote_counts_however_far_ahead_the_proposal_lies():
    """n=5, f=2. A vote for what lies more than 2,048 messages ahead of the own place in its proposer's stream was let
    go, as "a checkpoint will cover it": with wide windows, or after a partition. The faulty r0 shows r1 and r2 a
    request behind 2,100 empty votes, lets it be decided by them, and says no more; nor does r3. r4 had their votes
    first, and read the proposal afterwards: two votes of three, its own among them. The checkpoint needs three, as does
    the client, which asks again; r1 and r2 have nothing to wait for, so r4 alone asks for a view: for good.
    """
    house = House(5, f=2, algorithm=Algorithm.MINBFT, period=1100, window=1100, parameters=PATIENT)
    machine = Machine(house, "r4")
    first = house.prepare("r0", 0, 1)
    machine.hear(first, house.commit("r1", first), house.commit("r2", first))
    assert machine.core.status["slot"] == 1
    rest = [house.commit("r0", first) for _ in range(2100)]
    rest.append(house.prepare("r0", 0, 2))
    machine.hear(house.commit("r1", rest[-1]), house.commit("r2", rest[-1]))
    machine.hear(*rest)
    machine.ticks(1)
    assert machine.core.status["slot"] == 2


# ----- PBFT
def named(*changes: Change) -> tuple[Named, ...]:
    return tuple(Named(change.replica, 0, change_statement(change.body)) for change in changes)


def enter(group: Group, g: int) -> None:
    """r3 hears of view `g` and of what it follows from, in one turn of its loop, and asks for nothing itself."""
    votes = [view_change(group, name, g) for name in ("r0", "r1", "r2")]
    leader = f"r{g}"
    for message in (*votes, change(group, leader, NewView(leader, g, named(*votes)))):
        node(group, "r3").core.receive("r0#1", encode(message))
    node(group, "r3").run()
    assert ordering(group, "r3").e == g


def test_a_view_is_read_again_behind_what_is_left_of_a_later_one():
    """The machine stopped while it wrote that view 2 was entered: three VIEW-CHANGEs were whole, the NEW-VIEW was not.
    Started again it heard of view 1 first. From then on each start failed: the votes for view 2 took the place of those
    for view 1, without which its NEW-VIEW, in the log, could not be entered.
    """
    group = group_of()
    machine = node(group, "r3")
    enter(group, 2)
    entries = list(map(entry_decoder(ENTRIES), machine.log))
    del machine.log[next(i for i, entry in enumerate(entries) if isinstance(entry, LogView)) :]
    machine.boot()
    assert ordering(group, "r3").e == 0
    enter(group, 1)
    machine.boot()
    assert ordering(group, "r3").e == 1


def test_wedges_that_a_false_new_view_names_are_not_kept():
    """A NEW-VIEW of the faulty r1 names VIEW-CHANGEs "of" others by the digests of wedges that r1 signs: it is dropped
    when the first comes, and that stayed until the configuration was over, 246 KiB each with the default window.
    """
    group = group_of()
    for i in range(40):
        wedge = view_change(group, "r1", WEDGE, prepared(group, 1, i, bytes(32)))
        names = [Named("r0", 0, change_statement(wedge.body)), Named("r1", 0, bytes(32)), Named("r2", 0, bytes(32))]
        tell(group, "r3", change(group, "r1", NewView("r1", 1, tuple(names))), wedge, sender="r1#2")
    assert len(ordering(group, "r3").changes._bodies) < 3


# ----- old and new incarnations
def test_another_incarnation_than_the_members_is_not_the_owner_of_its_stream():
    """The word of a stream's owner that a part of it is gone is believed at once; and who owned it was told by the name
    alone. So a machine of that name that is no member - the incarnation that was replaced and lives on while its
    successor's state is fetched, a recovery's machine that lies - could make a member jump over the correct owner's
    votes, beside f faulty members: whoever waited for that one answer waited for ever.
    """
    pair, r0, stable, attested = behind_a_gap()
    r0.hear(Discarded(stable, (attested,)), sender="r1#7")  # r1 is r1#2
    pair.catch_up()  # from here on r2 is silent, and the network good
    pair.ticks(5)
    assert r0.core.status["slot"] == 3


def test_a_liar_that_is_no_member_is_told_of_by_name_and_incarnation():
    out = Outbox()
    out.replaying = False
    out.blame("r1", "chunk")
    out.blame("r1#7", "chunk")
    out.blame("r1#7", "chunk")
    told = [effect.body for effect in out.drain() if isinstance(effect, Report)]
    liar = {"replica": "r1", "kind": "chunk", "slot": 0}
    assert told == [liar, {**liar, "incarnation": 7}]


# ----- memory and work
def test_a_vote_holds_each_proposal_once_however_often_it_was_voted_for():
    """One SKIP over a window, and 2L COMMITs of a faulty member that vote for it: each of its VIEW-CHANGEs held all of
    the SKIP's slots 2L times - 44,000 proposals with the default window, 2.8 million with one of 2,048 - and a leader
    went through them with each message that came in.
    """
    house = House(3, period=32, window=64)
    skip = house.skip("r1", 0, 1, 64)
    for _ in range(127):
        house.commit("r1", skip)
    house.view_change("r1", 1)
    (vote,) = house.full_judge().votes.of(1)
    assert len(vote.proposals) == 22
    assert house.merged(1, [house.streams["r1"][-1], house.view_change("r2", 1)]).s_max == 64


def test_what_many_clients_ask_for_again_fills_no_memory_and_pushes_no_statement_out():
    """The seventh reading bounded the results of a slot, but not what is asked for again: 2 MiB of each client, made at
    once for all of them, by each replica, twenty times a second. And as it was more than all replies may be together,
    each checkpoint, request for a view or vote of PBFT that was to be signed meanwhile pushed the one before it out.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=64, window=256, clients=24, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.core._at.execution.service = KvService()
    bundles = [house.bundle([(1, encode_operation(Put(b"key", bytes(120_000))))])]
    gets = [encode_operation(Get(b"key"))] * 15
    bundles += [house.bundle(list(enumerate(gets, 2)), client=client) for client in range(24)]
    bundles[24] = house.bundle([(2, gets[0])], client=23)
    for s, bundle in enumerate(bundles, 1):
        data = make_batch([bundle])
        house.batches[batch_digest(data)] = data
        machine.hear(house.prepare("r0", 0, s, batch_digest(data)), sender="r0#1")
    machine.ticks(1)
    assert machine.core.status["slot"] == 25
    machine.answers.clear()
    machine.kss = False
    for client, bundle in enumerate(bundles[1:]):
        machine.client(bundle, client)
    machine.ticks(0.2)
    machine.core._at.announce(Kind.REQ, LAYOUT[Kind.REQ].pack(1))
    machine.core._at.announce(Kind.CHECKPOINT, LAYOUT[Kind.CHECKPOINT].pack(64, bytes(32)))
    machine.kss = True
    machine.serve()
    assert set(machine.core._at.statements) == {Kind.REQ, Kind.CHECKPOINT}
    assert sum(len(body) for _, body in machine.answers) < MAX_REPLY_BYTES / 1.5
    assert house.client_keys[23].public in dict(machine.answers), "who asks for little gets it"


def test_a_listing_looks_at_none_of_the_librarys_own_keys(monkeypatch: pytest.MonkeyPatch):
    """They come first in order, and a listing from the beginning went through all of them: the replies kept for 24
    clients are 50,000 entries, a quarter of a second, and one frame of 3 KB asks for 256 listings, a batch for 1,024.
    """
    store = StateStore()
    for i in range(100):
        store.put(StateStore.RESERVED + bytes([i]) + b"\xff" * (MAX_KEY - 2), b"reply")
    for key in (b"\x01", b"key", b"\xff"):
        store.put(key, b"value")
    view = store.service_view()
    list(view.items())  # makes the index, once
    seen: list[bytes] = []
    get = StateStore.get
    monkeypatch.setattr(StateStore, "get", lambda self, key: seen.append(key) or get(self, key))
    assert [key for key, _ in view.items()] == seen == [b"\x01", b"key", b"\xff"]
    assert [key for key, _ in view.items(b"", b"\x00zero")] == [b"\x01", b"key", b"\xff"]
    assert [key for key, _ in view.items(b"", b"key")] == [b"\xff"]
    assert [key for key, _ in view.items(b"k", b"a")] == [b"key"]
    assert not list(view.items(StateStore.RESERVED))


def test_a_client_that_leaves_a_window_out_with_each_request_costs_no_more(monkeypatch: pytest.MonkeyPatch):
    """Each page of 64 numbers that its window closed over was looked for and made, used or not: 65,000 for a bundle of
    1,024 requests that are 4,096 numbers apart, two seconds a slot where 15 ms are usual. That is the time after which
    a leader is suspected; so one client with 20 KB now and then made the group change views and do nothing else.
    """
    store = StateStore()
    body = BundleBody("ledger", bytes(32), tuple(Request(1 + 4096 * i, add(1)) for i in range(100)))
    seen: list[bytes] = []
    get = StateStore.get
    monkeypatch.setattr(StateStore, "get", lambda self, key: seen.append(key) or get(self, key))
    ((done,), _) = execute(store, CounterService(), (body,), 4096)
    assert [value(result.result) for result in done.results] == list(range(1, 101))
    assert len(seen) < 1000
    assert value(ClientWindow(store, bytes(32)).cached(body.requests[-1].number) or b"") == 100
    assert len(list(store.items(StateStore.RESERVED))) == 3, "its row, and the pages at both ends of the window"


def test_what_was_executed_is_not_held_decoded(monkeypatch: pytest.MonkeyPatch):
    """A batch was held twice, as it came and decoded, until a window after its slot: with the default window and large
    values 192 MiB of a machine's 384, and as much again at each start. One client is enough.
    """
    monkeypatch.setattr(BundleChecker, "MAX_SEEN_BYTES", 1)  # a cache beside it, of 16 MiB
    house = House(3, algorithm=Algorithm.MINBFT, period=16, window=16, parameters=PATIENT)
    machine = Machine(house, "r1")
    for s in range(1, 9):
        data = make_batch([house.bundle([(s, bytes(200_000))])])
        house.batches[batch_digest(data)] = data
        machine.hear(house.prepare("r0", 0, s, batch_digest(data)), sender="r0#1")
    for each in (machine, machine.restarted()):
        assert each.core.status["slot"] == 8
        held = each.core._at.ordering.batches
        tracemalloc.start()
        decoded = [held.checked(batch_digest(data)) for data in held.all()]
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert all(decoded)
        assert grown > 8 * 200_000, "none was held decoded"


def test_a_read_of_many_listings_goes_through_few_entries():
    """256 listings in a frame of 3 KB, of a thousand small entries each, were stopped by the size of the answer only:
    after 87 of them, a third of a second of all replicas, for a client that asks and throws the answer away.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=16, window=16, parameters=PATIENT)
    machine = Machine(house, "r1")
    machine.core._at.execution.service = KvService()
    store = machine.core._at.execution.store
    for i in range(1000):
        store.put(b"key" + i.to_bytes(2, "big"), b"")
    listed = encode_operation(List())
    assert ask(machine, listed).seen, "one listing is answered"
    tracer: list[bytes] = []
    get = store.get
    store.get = lambda key: tracer.append(key) or get(key)  # type: ignore[method-assign]
    assert not ask(machine, *[listed] * 256).seen
    assert len(tracer) < 6000


def ask(machine: Machine, *operations: bytes) -> ReadReply:
    machine.client(encode(Read(1, operations)))
    reply = decode_client(machine.answers[-1][1])
    assert isinstance(reply, ReadReply)
    return reply


# ----- streams
def test_who_drips_its_stream_keeps_nobody_from_jumping_to_what_a_certificate_covers():
    """r2 was cut off, and the others have let go of what it lacks of the stream of r0, which is faulty. They may say so
    when that has stood still for half a second; r0, which has kept it, handed out one message between two such answers.
    So r2 went through all of it at that pace, hours for some thousand messages, and had none of r0's last proposals; r1
    had executed them, and whoever needed a second answer waited as long.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=2, parameters=PATIENT)
    machine = Machine(house, "r2")
    for s in range(1, 30):
        house.commit("r1", house.prepare("r0", 0, s))
        for who in ("r0", "r1"):
            house.stable(who, s)
    other = house.full_judge()
    other.truncate(29)
    for discarded in answer_fetch(other, Fetch(1, "r1", 1, 1)):
        machine.hear(discarded, sender="r1#2")  # r1's own word
    machine.hear(*house.streams["r1"][-6:], sender="r1#2")
    streams = machine.core._at.ordering.configuration.streams
    assert streams["r1"].cursor == len(house.streams["r1"])
    for message in house.streams["r0"][:10]:
        machine.ticks(1)
        machine.hear(message, sender="r0#1")
        machine.hear(*answer_fetch(other, Fetch(1, "r0", 1, 1)), sender="r1#2")
    assert streams["r0"].cursor > 50


def test_who_jumps_over_the_new_view_of_the_present_view_fetches_it():
    """Protocol §4 says so, but nobody asked for it: only a merge or a judge that lacked it did. A member that had been
    cut off while the view changed read streams that are in a view that it could not enter, so it voted for nothing in
    it. Beside f silent ones the others need its vote; they asked for the next view, it for the first above its own, one
    after the other: with a minute each, hours for some hundred views.
    """
    house = House(3, algorithm=Algorithm.MINBFT, period=1, window=4, parameters=PATIENT)
    machine = Machine(house, "r2")
    first = house.prepare("r0", 0, 1)
    machine.hear(first, sender="r0#1")
    machine.ticks(0.2)
    digest = machine.core._at.execution.digests[1]
    truth = {"digest": digest, "certificate": house.checkpoint(1, digest, "r0", "r2")}
    house.commit("r1", first)
    view = house.new_view("r1", 1, [house.view_change(who, 1) for who in ("r0", "r1")])
    house.commit_view("r0", view)
    view_ends = house.full_judge().streams["r1"].state.p
    anchor, attested = house.stable("r1", 1, **truth), house.stable("r0", 1, **truth)
    machine.hear(Discarded(anchor, (attested,)), sender="r1#2")
    machine.hear(*house.streams["r0"], sender="r0#1")
    machine.sent.clear()
    machine.ticks(2)
    asked = [message for _, message in machine.sent if isinstance(message, FetchNewView)]
    assert FetchNewView(1, 1) in asked
    machine.hear(*answer_view(house.full_judge(), asked[0]), sender="r1#2")
    machine.hear(house.prepare("r1", 1, view_ends + 1), sender="r1#2")
    assert [type(header) for header in machine.said()[-2:]] == [CommitNewView, Commit]


def test_views_that_nobody_can_prove_hide_no_other_from_who_asks():
    """n=9, f=4. Of the views that were wanted the lowest four were asked for: four faulty members whose NEW-VIEWs of
    views 1 to 4 name what will never be keep them wanted, so nobody asked for a later one. Whoever had jumped over what
    a correct leader's NEW-VIEW follows from was deaf to that leader for good.
    """
    house = House(9, f=4, algorithm=Algorithm.MINBFT, period=4, window=16, parameters=PATIENT)
    machine = Machine(house, "r8")
    names = tuple(Named(f"r{i}", 1000, bytes(32)) for i in range(5))
    for g in range(1, 6):
        machine.hear(
            house.say(f"r{g}", UsigNewView(1, g, 0, 0, (), ()), encode(Merge(names, ()))), sender=f"r{g}#{g + 1}"
        )
    machine.ticks(20)
    asked = {(peer, message.g) for peer, message in machine.sent if isinstance(message, FetchNewView)}
    assert asked >= {(f"r{i}#{i + 1}", 5) for i in range(8)}


def test_the_time_that_a_replica_executes_for_is_no_reason_to_suspect_its_leader():
    """A batch of 1,024 listings takes a replica some five seconds, in which it hears nobody: then all of them asked for
    the next view, as nothing had come for that long. One client was enough, with 15 KB now and then.
    """
    house = House(5, f=2, algorithm=Algorithm.MINBFT, period=16, window=16)
    machine = Machine(house, "r1")
    machine.hear(house.prepare("r0", 0, 1), sender="r0#1")  # two votes of three
    machine.ticks(1)
    machine.now_s += 6
    machine.ticks(0.1)
    assert Kind.REQ not in machine.core._at.statements
    machine.ticks(2)
    assert Kind.REQ in machine.core._at.statements


@pytest.mark.parametrize("size", [1, 16 << 10])
def test_a_few_clients_that_fill_the_pool_leave_room_for_another(size: int):
    """Eight clients with 512 bundles each, or 8 MiB, had all of it, at every replica, and whoever refilled first what a
    slot had drained kept it. Another client was told that the group is overloaded, for as long as they liked.
    """
    pool = Pool()
    for i in range(512):
        for greedy in range(8):
            pool.add(b"%d %d" % (greedy, i), bytes(size), BundleBody("ledger", bytes([greedy]), ()), float(i))
    assert not pool.add(b"more", bytes(size), BundleBody("ledger", bytes([3]), ()), 600.0)
    pool.take(1 << 30, 16 * (size + 8))  # these are under way, and stay
    for i in range(20):
        assert pool.add(b"modest %d" % i, bytes(size), BundleBody("ledger", b"modest", ()), 600.0)
    assert {waiting.name for waiting in pool.bundles()} >= {b"%d 0" % greedy for greedy in range(8)}
    assert len(pool) <= MAX_BUNDLES
    assert sum(len(waiting.data) for waiting in pool.bundles()) <= MAX_BYTES
