import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.apply import active_record
from cloudfit_orchestrator.controller.change import ensure, plan
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.difference import evacuated, scaled, settle
from cloudfit_orchestrator.controller.journal import GroupState
from cloudfit_orchestrator.controller.recover import recover
from cloudfit_orchestrator.model.errors import BadInputError, RefusedError, UnknownError
from cloudfit_orchestrator.model.record import Algorithm, Status, open_record
from tests.unit.controller.worlds import SPEC, Bench, spec

FAST = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # thousands of commits, and nothing to survive a power cut
MORE = SPEC.replace("f: 1", "f: 2").replace(
    "clouds:", "clouds:\n  - {name: porto, process: {}}\n  - {name: wien, process: {}}"
)
MOVED = SPEC.replace("ulm", "graz")
MINBFT = SPEC + "algorithm: minbft\nparameters: {checkpoint_period: 32, window: 128, max_batch_requests: 99}\n"
RESERVE = SPEC + "  - {name: faro, process: {}, reserve: true}\n"
PBFT = SPEC.replace("clouds:", "clouds:\n  - {name: porto, process: {}}") + "algorithm: pbft\n"


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cf", dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def bench(short: Path) -> Iterator[Bench]:
    b = Bench(short / "home")
    ensure(b.process(), spec())
    yield b
    b.close()


def test_it_grows_with_learners_first_and_what_is_there_stays(bench: Bench) -> None:
    before = {m.replica: m for m in bench.check_serving()}
    bench.world.log.clear()
    done = ensure(bench.process(), spec(MORE))
    after = {m.replica: m for m in bench.check_serving()}
    assert (done.changed, done.c, len(done.members)) == (True, 2, 5)
    assert done.outage_s is not None
    assert {r: after[r].incarnation for r in before} == {r: m.incarnation for r, m in before.items()}
    assert {after["r3"].cloud, after["r4"].cloud} == {"porto", "wien"}
    record = active_record(bench.process(), "ledger")
    assert (record.f, record.base, record.confirmations_needed) == (2, 1, 3)
    log = bench.world.log
    last_learner = max(i for i, entry in enumerate(log) if entry.endswith("command base"))
    keys = min(i for i, entry in enumerate(log) if entry.endswith(" prepare"))
    assert last_learner < keys, "nothing of the next configuration before all new machines follow"
    assert not ensure(bench.process(), spec(MORE)).changed


def test_it_shrinks_and_machines_go_only_after_active(bench: Bench) -> None:
    ensure(bench.process(), spec(MORE))
    bench.world.log.clear()
    done = ensure(bench.process(), spec())
    assert len(bench.check_serving()) == 3
    log = bench.world.log
    destroyed = [i for i, entry in enumerate(log) if entry.endswith(" destroy")]
    closed = [i for i, entry in enumerate(log) if entry.endswith(" close")]
    installs = [i for i, entry in enumerate(log) if entry.endswith(" install")]
    assert (len(destroyed), len(closed)) == (2, 5), "also the epochs of those that stay, before ACTIVE"
    assert max(closed) < max(installs) < min(destroyed)
    assert {n.partition("-")[2] for n in bench.world.networks()} == {"lisbon", "passau", "ulm"}
    assert set(bench.world.agents) == {"lisbon", "passau", "ulm"}
    assert done.left == ()


def test_a_replica_moves_when_its_cloud_is_not_named_any_more(bench: Bench) -> None:
    before = {m.replica: m for m in bench.check_serving()}
    bench.world.log.clear()
    ensure(bench.process(), spec(MOVED))
    assert bench.world.log.count("agent ulm install") == 2, (
        "who leaves wedges with the others, and hears that it is out"
    )
    after = {m.replica: m for m in bench.check_serving()}
    assert [after[r].cloud for r in ("r0", "r1", "r2")] == ["lisbon", "passau", "graz"]
    assert after["r2"].incarnation > before["r2"].incarnation
    assert "ulm" not in bench.world.agents


@pytest.mark.parametrize(
    ("text", "algorithm", "n"), [(MINBFT, Algorithm.MINBFT, 3), (PBFT, Algorithm.PBFT, 4), (SPEC + "k: 1\n", None, 4)]
)
def test_algorithm_parameters_and_k_change_alone_or_with_members(
    bench: Bench, text: str, algorithm: Algorithm | None, n: int
) -> None:
    if "k: 1" in text:
        text = text.replace("clouds:", "clouds:\n  - {name: porto, process: {}}")
    wanted = spec(text)
    ensure(bench.process(), wanted)
    assert len(bench.check_serving()) == n
    record = active_record(bench.process(), "ledger")
    assert (record.algorithm, record.k, record.parameters) == (
        algorithm or Algorithm.EBAWA,
        wanted.k,
        wanted.parameters,
    )
    assert not plan(bench.process(), wanted).pending


def test_what_no_member_has_to_agree_on_is_noted_without_a_record(bench: Bench) -> None:
    wanted = spec(SPEC + "recovery: {keep_evidence: 1}\nprotect: true\n")
    found = plan(bench.process(), wanted)
    assert [(d.what, d.by) for d in found.differences] == [("protect", "note"), ("recovery.keep_evidence", "note")]
    done = ensure(bench.process(), wanted)
    assert (done.changed, done.c, done.outage_s) == (True, 1, None)
    with pytest.raises(RefusedError, match="protected"):
        destroy(bench.process(), "ledger")


def test_plan_names_every_difference_and_writes_nothing(bench: Bench) -> None:
    text = MORE + "algorithm: minbft\nparameters: {max_batch_requests: 7}\n"
    found = plan(bench.process(), spec(text))
    assert [(d.what, d.now, d.wanted) for d in found.differences] == [
        ("f", "1", "2"),
        ("algorithm", "ebawa", "minbft"),
        ("max_batch_requests", "1024", "7"),
        ("replica r3", "-", "porto"),
        ("replica r4", "-", "wien"),
        ("clouds", "lisbon, passau, ulm", "porto, wien, lisbon, passau, ulm"),
    ]
    assert not plan(bench.process(), spec()).pending
    new = plan(bench.process(), spec(SPEC.replace("ledger", "other")))
    assert (new.exists, new.pending) == (False, True)
    assert len(bench.world.machines()) == 3
    bench.check_serving()


def test_clients_of_the_home_are_admitted_by_the_next_record(bench: Bench) -> None:
    context = bench.process()
    other = active_record(context, "ledger").clients[0]
    context.clients = (other, type(other)("second", bytes(32), b"certificate"))
    assert [(d.what, d.wanted) for d in plan(context, spec()).differences] == [("clients", "operator, second")]
    ensure(context, spec())
    assert [c.name for c in active_record(context, "ledger").clients] == ["operator", "second"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SPEC.replace("service: kv", "service: counter"), "runs service kv"),
        (SPEC.replace("ulm, process: {}", 'ulm, libvirt: {uri: "qemu:///system"}'), "cloud ulm holds replicas"),
    ],
)
def test_what_cannot_change_is_refused_in_one_sentence(bench: Bench, text: str, words: str) -> None:
    for act in (plan, ensure):
        with pytest.raises(RefusedError, match=words) as caught:
            act(bench.process(), spec(text))
        assert caught.value.next_command
    bench.check_serving()


CHANGES = {"grow": (SPEC, MORE), "shrink": (MORE, SPEC), "move": (SPEC, MOVED), "engine": (SPEC, MINBFT)}


def calls_of(root: Path, first: str, then: str) -> int:
    b = Bench(root)
    ensure(b.process(), spec(first))
    before = b.world.calls
    ensure(b.process(), spec(then))
    b.close()
    return b.world.calls - before


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_every_point_and_run_again_it_ends_in_the_same_place(short: Path, name: str, part: int) -> None:
    first, then = CHANGES[name]
    total = calls_of(short / "count", first, then)
    assert total > 30
    for call in range(1 + part, total + 1, 4):
        bench = Bench(short / f"h{call}")
        ensure(bench.process(), spec(first))
        bench.die_at(call, lambda x: ensure(x, spec(then)))
        ensure(bench.process(), spec(then))
        assert len(bench.check_serving()) == spec(then).n
        assert not plan(bench.process(), spec(then)).pending
        used = {m.cloud for m in bench.check_serving()}
        assert set(bench.world.agents) == used
        assert {n.partition("-")[2] for n in bench.world.networks()} == used
        bench.close()


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", ["grow", "move"])
def test_killed_at_every_point_the_old_spec_takes_it_back(short: Path, name: str, part: int) -> None:
    first, then = CHANGES[name]
    total = calls_of(short / "count", first, then)
    for call in range(1 + part, total + 1, 4):
        bench = Bench(short / f"h{call}")
        before = {m.incarnation for m in ensure(bench.process(), spec(first)).members}
        bench.die_at(call, lambda x: ensure(x, spec(then)))
        wedged = any(
            open_record(e.envelope, [bench.world.controller_key]).c == 2 for e in bench.process().store.log("ledger")
        )
        ensure(bench.process(), spec(first))
        members = bench.check_serving()
        assert [(m.replica, m.cloud) for m in members] == list(spec(first).placement)
        if not wedged:
            assert {m.incarnation for m in members} == before, "nothing has changed"
        assert set(bench.world.agents) == {m.cloud for m in members}
        bench.close()


@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_point_then_destroyed_leaves_nothing(short: Path, part: int) -> None:
    total = calls_of(short / "count", SPEC, MOVED)
    for call in range(1 + part, total + 1, 4):
        bench = Bench(short / f"h{call}")
        ensure(bench.process(), spec())
        bench.die_at(call, lambda x: ensure(x, spec(MOVED)))
        destroy(bench.process(), "ledger")
        bench.check_nothing_left()
        bench.close()


def test_new_machines_that_never_catch_up_wedge_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.change.PRECOPY_TIMEOUT_S", 0.2)
    monkeypatch.setattr("cloudfit_orchestrator.testing.cloud.FakeAgent._learn", lambda *_: None)
    with pytest.raises(UnknownError, match=r"r3, r4 to catch up; configuration 1 serves on"):
        ensure(bench.process(), spec(MORE))
    context = bench.process()
    assert all(open_record(e.envelope, context.trusted).c == 1 for e in context.store.log("ledger"))
    group = context.journal.group("ledger")
    assert group is not None
    assert group.state is GroupState.CHANGING
    with pytest.raises(RefusedError, match="change"):
        recover(bench.process(), "ledger", "r0")
    ensure(bench.process(), spec())
    assert len(bench.check_serving()) == 3
    assert not any(g.learners for r in ("r0", "r1", "r2") for g in bench.world.guest("ledger", r)), "forgotten again"


def test_unconfirmed_after_the_wedge_another_record_on_the_same_base_follows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.configure.CONFIRM_TIMEOUT_S", 0.3)
    bench.world.agents["ulm"].mute = {"r2"}
    bench.world.agents["passau"].mute = {"r1"}
    with pytest.raises(UnknownError, match="1 equal ones of 2 needed"):
        ensure(bench.process(), spec(MINBFT))
    found = plan(bench.process(), spec())
    assert ("configuration", "1, ended by 2") in [(d.what, d.now) for d in found.differences]
    for agent in bench.world.agents.values():
        agent.mute = set()
    ensure(bench.process(), spec())
    bench.check_serving()
    context = bench.process()
    records = [open_record(e.envelope, context.trusted) for e in context.store.log("ledger")]
    assert [(r.c, r.base, r.status) for r in records[2:]] == [
        (2, 1, Status.PREPARED),
        (3, 1, Status.PREPARED),
        (3, 1, Status.ACTIVE),
    ]


def test_too_many_out_is_refused_before_anything_is_made(bench: Bench) -> None:
    bench.world.clouds["ulm"].reachable = False
    bench.world.clouds["passau"].reachable = False
    with pytest.raises(RefusedError, match=r"2 of 3 replicas of ledger are out \(r1, r2\)"):
        ensure(bench.process(), spec(MINBFT))
    assert len(bench.world.machines()) == 3
    assert bench.process().journal.open_of("ledger") is None


def test_a_member_whose_machine_died_stays_a_member_and_is_not_waited_for(bench: Bench) -> None:
    dead = next(m for m in bench.world.machines() if m.owner.replica == "r1")
    bench.world.clouds["passau"].destroy(dead)
    done = ensure(bench.process(), spec(MORE))
    assert (done.c, len(done.members)) == (2, 5)
    assert recover(bench.process(), "ledger", "r1").outcome == "done"
    assert len(bench.check_serving()) == 5


def test_a_smaller_group_does_not_begin_with_more_than_f_out(bench: Bench) -> None:
    ensure(bench.process(), spec(MORE))
    bench.world.clouds["ulm"].reachable = False
    bench.world.clouds["passau"].reachable = False
    with pytest.raises(RefusedError, match="r1, r2 would be out from the start, f=1 allows 1 of 3"):
        ensure(bench.process(), spec())
    assert bench.process().journal.open_of("ledger") is None


def test_a_lost_cloud_is_left_and_cleared_when_it_is_back(bench: Bench) -> None:
    lost = next(m for m in bench.check_serving() if m.cloud == "ulm")
    bench.world.clouds["ulm"].reachable = False
    done = ensure(bench.process(), spec(MOVED))
    assert done.left == (f"r2#{lost.incarnation}",)
    assert [m.cloud for m in done.members] == ["lisbon", "passau", "graz"]
    assert [d.what for d in plan(bench.process(), spec(MOVED)).differences] == ["clouds", f"machine {done.left[0]}"]
    bench.world.clouds["ulm"].reachable = True
    assert ensure(bench.process(), spec(MOVED)).left == ()
    bench.check_serving()
    assert not plan(bench.process(), spec(MOVED)).pending


def test_recovery_goes_on_after_a_change(bench: Bench) -> None:
    ensure(bench.process(), spec(MORE))
    assert recover(bench.process(), "ledger", "r4").outcome == "done"
    assert len(bench.check_serving()) == 5


def test_as_few_replicas_move_as_may_be() -> None:
    wanted = spec(MORE)
    here = {"r0": "ulm", "r1": "wien", "r2": "berlin"}
    assert dict(settle(wanted, here).placement) == {
        "r0": "ulm", "r1": "wien", "r2": "porto", "r3": "lisbon", "r4": "passau",
    }  # fmt: skip
    crowded = settle(wanted, {f"r{i}": "ulm" for i in range(5)})
    assert sorted(c for _, c in crowded.placement) == ["lisbon", "passau", "porto", "ulm", "wien"]


def test_scale_needs_clouds_enough_for_the_loss_of_one() -> None:
    assert scaled(spec(), 2, 0).n == 5
    with pytest.raises(BadInputError, match="4 replicas do not fit on 3 clouds with at most f=1 on each"):
        scaled(spec(), 1, 1)
    with pytest.raises(BadInputError, match="the limit is"):
        scaled(spec(), 40, 0)


def test_a_reserve_holds_nothing_until_a_cloud_is_lost(bench: Bench) -> None:
    ensure(bench.process(), spec(RESERVE))
    assert {m.cloud for m in bench.check_serving()} == {"lisbon", "passau", "ulm"}
    assert "faro" not in bench.world.agents
    before = {m.replica: m.incarnation for m in bench.check_serving()}
    bench.world.clouds["passau"].reachable = False
    now = spec(RESERVE)
    done = ensure(bench.process(), evacuated(now, "passau"))
    assert {m.replica: m.cloud for m in done.members} == {"r0": "lisbon", "r1": "faro", "r2": "ulm"}
    assert done.left == (f"r1#{before['r1']}",)
    assert {m.replica: m.incarnation for m in done.members if m.replica != "r1"} == {
        "r0": before["r0"],
        "r2": before["r2"],
    }
    swapped = RESERVE.replace("{name: passau, process: {}}", "{name: passau, process: {}, reserve: true}").replace(
        "{name: faro, process: {}, reserve: true}", "{name: faro, process: {}}"
    )
    assert not [d for d in plan(bench.process(), spec(swapped)).differences if d.by == "configuration"]


def test_what_cannot_be_evacuated_is_refused() -> None:
    with pytest.raises(BadInputError, match="no cloud of ledger is a reserve"):
        evacuated(spec(), "passau")
    with pytest.raises(BadInputError, match="has no cloud porto"):
        evacuated(spec(RESERVE), "porto")
    with pytest.raises(BadInputError, match="is a reserve of ledger"):
        evacuated(spec(RESERVE), "faro")
