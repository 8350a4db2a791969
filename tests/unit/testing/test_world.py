"""The simulated world keeps its own rules: what a disk may lose, what a network may do, what the wormhole refuses."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.messages import StateQuery, encode
from cloudfit_orchestrator.bft.pbft.messages import Phase, Vote
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.model.ui import ui_bytes
from cloudfit_orchestrator.testing.crypto import KeyRing, Keys, RealKeys
from cloudfit_orchestrator.testing.disk import SimDisk
from cloudfit_orchestrator.testing.exporter import SimExporter
from cloudfit_orchestrator.testing.network import Network, Schedule, Weather
from cloudfit_orchestrator.testing.plan import Trouble, draw
from cloudfit_orchestrator.testing.simulator import Simulation
from cloudfit_orchestrator.testing.wormhole import SimWormhole
from cloudfit_orchestrator.wormhole.refusal import Refusal


@given(st.lists(st.sampled_from(["append", "sync", "rewrite"]), max_size=20), st.integers(0, 1000))
def test_a_crash_never_loses_what_was_synced_and_never_tears_a_record(steps: list[str], seed: int) -> None:
    disk = SimDisk()
    written: list[bytes] = []
    durable = 0
    possible: list[list[bytes]] = []
    for i, step in enumerate(steps):
        if step == "append":
            disk.append(b"%d" % i)
            written.append(b"%d" % i)
        elif step == "sync":
            disk.sync()
            durable = len(written)
        else:
            disk.rewrite((b"new %d" % i,))
            old = [written[:j] for j in range(durable, len(written) + 1)]
            if i == len(steps) - 1:
                possible = old
            else:
                disk.sync()
            written = [b"new %d" % i]
            durable = 1
    possible += [written[:j] for j in range(durable, len(written) + 1)]
    disk.crash(random.Random(seed))
    assert disk.records in possible
    assert not disk.dirty


def test_a_crash_can_lose_and_can_keep_what_was_not_synced() -> None:
    seen = set()
    for seed in range(50):
        disk = SimDisk()
        disk.append(b"a")
        disk.sync()
        disk.append(b"b")
        disk.append(b"c")
        disk.crash(random.Random(seed))
        seen.add(tuple(disk.records))
    assert seen == {(b"a",), (b"a", b"b"), (b"a", b"b", b"c")}


def sent_over(weather: Weather, *, frames: int = 400, parted: bool = False) -> list[int]:
    schedule = Schedule()
    network = Network(schedule, random.Random, weather)
    if parted:
        network.part("a alone", ["a"])
    arrived: list[int] = []
    for i in range(frames):
        network.send("a", "b", lambda i=i: arrived.append(i))
    schedule.run(100, lambda: False)
    assert network.in_flight == 0
    return arrived


def test_the_network_drops_duplicates_and_reorders_as_told() -> None:
    assert len(sent_over(Weather(drop=0.5))) in range(150, 250)
    assert max(Counter(sent_over(Weather(duplicate=0.5))).values()) == 2
    calm = sent_over(Weather(jitter_s=0.01))
    assert sorted(calm) == list(range(400))
    assert calm != sorted(calm)
    assert sent_over(Weather(), parted=True) == []


def test_a_partition_loses_what_is_on_its_way_and_heals() -> None:
    schedule = Schedule()
    network = Network(schedule, random.Random, Weather())
    arrived: list[str] = []
    network.send("a", "b", lambda: arrived.append("before"))
    network.part("a alone", ["a"])
    network.send("b", "c", lambda: arrived.append("inside"))
    schedule.run(1, lambda: False)
    network.heal()
    network.send("a", "b", lambda: arrived.append("after"))
    schedule.run(2, lambda: False)
    assert arrived == ["inside", "after"]


def test_events_of_one_moment_keep_their_order() -> None:
    schedule = Schedule()
    order: list[int] = []
    for i in range(10):
        schedule.after(1.0, lambda i=i: order.append(i))
    assert schedule.run(2, lambda: len(order) == 4)
    assert order == [0, 1, 2, 3]
    assert schedule.now_s() == 1.0


@pytest.mark.parametrize("keys", [KeyRing(), RealKeys()])
def test_signatures_hold_for_their_key_and_message_only(keys: Keys) -> None:
    rng = random.Random(1)
    one, two = keys.generate(rng), keys.generate(rng)
    signature = one.sign(b"message")
    assert (len(signature), len(one.public)) == (64, 32)
    assert keys.verify(one.public, b"message", signature)
    assert not keys.verify(two.public, b"message", signature)
    assert not keys.verify(one.public, b"massage", signature)
    assert not keys.verify(b"\0" * 32, b"message", signature)


def test_the_wormhole_is_the_agents_and_signs_with_the_simulations_keys() -> None:
    keys = KeyRing()
    wormhole = SimWormhole(group="g", replica="r1", keys=keys, controller_keys=[], rng=random.Random(1))
    usig_key, kss_key = wormhole.prepare(1)
    assert (usig_key, kss_key) == wormhole.prepare(1)
    with pytest.raises(Refusal) as refused:
        wormhole.open_session(1)
    assert refused.value.code is ErrorCode.NOT_ACTIVE
    wormhole._epochs[1].activate()
    session, next_cv, recent = wormhole.open_session(1)
    assert (next_cv, recent) == (1, [])
    certificate = wormhole.create_ui(session, 1, 1, bytes(32))
    assert keys.verify(usig_key, ui_bytes("g", "r1", 1, 1, bytes(32)), certificate)
    assert len(wormhole.sign(1, Kind.REQ, LAYOUT[Kind.REQ].pack(3))) == 64
    with pytest.raises(Refusal):
        wormhole.create_ui(session, 1, 3, bytes(32))
    with pytest.raises(Refusal):
        wormhole.end_epoch(1)
    wormhole.greet()
    with pytest.raises(Refusal) as refused:
        wormhole.create_ui(session, 1, 2, bytes(32))
    assert refused.value.code is ErrorCode.STALE_SESSION
    end = wormhole.close(1)
    assert end is not None
    assert end.cv_end == 1
    with pytest.raises(Refusal):
        wormhole.sign(1, Kind.REQ, LAYOUT[Kind.REQ].pack(3))


def test_an_exporter_answers_only_questions_for_states() -> None:
    """A faulty member repeated votes of PBFT to it, which a run took for a failure of the core."""
    disk = SimDisk()
    store = StateStore()
    disk.snapshots[1, 4] = store.snapshot()
    exporter = SimExporter("r0#x2", "sound", random.Random(1))
    exporter.attach(disk)
    vote = Vote(1, "r0", Phase.COMMIT, 0, 1, bytes(32), bytes(64))
    for frame in (encode(vote), b"", b"nonsense"):
        assert exporter.answer(frame) == []
    assert len(exporter.answer(encode(StateQuery(b"")))) == 1


def test_a_lost_disk_is_empty() -> None:
    disk = SimDisk()
    disk.append(b"synced")
    disk.sync()
    disk.append(b"not synced")
    disk.snapshots[1, 4] = StateStore().snapshot()
    disk.lose()
    assert (disk.records, dict(disk.found_snapshots()), disk.dirty) == ([], {}, False)


LEASE_ENDS = Trouble("lapse", 1, 0.0, ("r0",))


def test_a_fault_of_a_new_machine_outlasts_the_old_one_and_an_old_ones_does_not() -> None:
    for lapses_anew in (True, False):
        world = Simulation(draw(1, 4, Algorithm.PBFT, "calm"), KeyRing())
        world.in_trouble = True
        old, *rest = world.group
        if not lapses_anew:
            world.troubles._lapse(LEASE_ENDS)
        new = world.launch("r0")
        world.group.append(new)
        if lapses_anew:
            world.troubles._lapse(LEASE_ENDS)
        assert world.troubles.faulty == {"r0"}
        world.troubles._switched(old, new, [new, *rest])
        assert world.troubles.faulty == ({"r0"} if lapses_anew else set())


def test_a_reconfiguration_waits_until_all_but_faulty_members_serve_in_the_last_one() -> None:
    world = Simulation(draw(1, 4, Algorithm.PBFT, "calm"), KeyRing())
    for machine in world.group:
        machine.start()
    world.controller.reconfigure(world.group)
    assert world.schedule.run(10.0, lambda: world.controller.active is not None)
    assert world.controller.unready == {"r0", "r1", "r2", "r3"}
    replace = Trouble("replace", 1, 0.0, ("r0",))
    world.troubles._waiting += 1
    assert world.troubles._again(replace)
    assert world.schedule.run(20.0, lambda: world.controller.unready == {"r2"})
    assert world.troubles._again(replace)
    world.troubles.faulty.add("r2")
    assert not world.troubles._again(replace)
