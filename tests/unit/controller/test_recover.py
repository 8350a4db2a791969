import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudfit_orchestrator.controller.apply import active_record, apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.controller.recover import Recovered, recover
from cloudfit_orchestrator.controller.survey import look
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError
from tests.unit.controller.worlds import SPEC, Bench, spec

PARTS = 8


FAST = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # thousands of commits, and nothing to survive a power cut


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cf", dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def bench(short: Path) -> Iterator[Bench]:
    b = Bench(short / "home")
    apply(b.process(), spec())
    yield b
    b.close()


def start(context: Context, **arguments: Any) -> Recovered:
    return recover(context, "ledger", "r1", **arguments)


def test_a_replica_gets_a_new_incarnation_and_the_rest_stays(bench: Bench) -> None:
    before = {m.replica: m for m in bench.check_serving()}
    result = start(bench.process())
    after = {m.replica: m for m in bench.check_serving()}
    assert (result.outcome, result.c) == ("done", 2)
    assert (result.old_incarnation, result.new_incarnation) == (before["r1"].incarnation, after["r1"].incarnation)
    assert after["r1"].incarnation > max(m.incarnation for m in before.values())
    assert {r: after[r].incarnation for r in ("r0", "r2")} == {r: before[r].incarnation for r in ("r0", "r2")}
    assert not {m.usig_key for m in after.values()} & {m.usig_key for m in before.values()}
    assert result.transfer["corrupt"] == [{"chunk": 2, "source": f"r1#{result.new_incarnation + 1}"}]
    assert result.replica_outage_s is not None
    assert result.group_outage_s is not None
    assert len(bench.world.snapshots_left()) == 1, "the evidence stays"
    others = [g for r in ("r0", "r2") for g in bench.world.guest("ledger", r)]
    assert all(("r1", 1) in g.told_ended and g.retired for g in others)


def test_the_old_machine_serves_until_the_new_one_is_up_to_date(bench: Bench) -> None:
    bench.world.log.clear()
    start(bench.process())
    log = bench.world.log
    order = [log.index(f"agent passau {op}") for op in ("command source", "command retire", "freeze", "close")]
    assert order == sorted(order)
    first_pause = log.index("passau pause")
    assert log.index("passau resume", first_pause) < log.index("agent passau freeze")


def test_no_member_speaks_in_the_old_configuration_when_the_new_one_becomes_active(bench: Bench) -> None:
    bench.world.log.clear()
    start(bench.process())
    log = bench.world.log
    for agent in ("lisbon", "ulm"):
        *_, prepared, active = (i for i, entry in enumerate(log) if entry == f"agent {agent} install")
        assert prepared < log.index(f"agent {agent} close") < active


def test_only_the_machine_of_a_suspected_replica_is_paused_while_it_is_replaced(short: Path) -> None:
    """With k = 1 a slot is decided by one faulty member and the one that is due. The batch was with these two alone:
    paused at the freeze, the due one could not hand it round, and no successor could be computed from any wedges.
    """
    for suspected in (False, True):
        bench = Bench(short / f"home-{suspected}")
        apply(bench.process(), spec())
        bench.world.log.clear()
        assert start(bench.process(), suspected=suspected).outcome == "done"
        log = bench.world.log
        since_freeze = log[log.index("agent passau freeze") :]
        assert ("passau pause" in since_freeze) is suspected
        bench.close()


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_point_and_run_again_it_ends_in_the_same_place(short: Path, part: int) -> None:
    counting = Bench(short / "count")
    apply(counting.process(), spec())
    before = counting.world.calls
    start(counting.process())
    total = counting.world.calls - before
    assert total > 100
    for call in range(1 + part, total + 1, PARTS):
        bench = Bench(short / f"h{call}")
        apply(bench.process(), spec())
        bench.die_at(call, start)
        again = start(bench.process()) if bench.process().journal.open_of("ledger") or call < total // 2 else None
        members = bench.check_serving()
        assert len(members) == 3
        assert active_record(bench.process(), "ledger").c >= 2
        assert again is None or again.outcome == "done"
        assert len(bench.world.snapshots_left()) == 1
        destroy(bench.process(), "ledger")
        bench.check_nothing_left()
        bench.close()


def test_a_lost_cloud_is_replaced_from_peers_only(bench: Bench) -> None:
    bench.world.clouds["passau"].vanish()
    bench.world.log.clear()
    result = start(bench.process())
    assert (result.outcome, result.lost) == ("done", True)
    assert not any(e.startswith("passau snapshot ") or e == "agent passau freeze" for e in bench.world.log)
    assert result.replica_outage_s is None
    bench.check_serving()


@pytest.mark.parametrize("part", range(4))
def test_a_lost_cloud_and_a_killed_controller(short: Path, part: int) -> None:
    for call in range(1 + part, 120, 4):
        bench = Bench(short / f"h{call}")
        apply(bench.process(), spec())
        bench.world.clouds["passau"].vanish()
        if bench.die_at(call, start) and (
            bench.process().journal.open_of("ledger") or active_record(bench.process(), "ledger").c == 1
        ):
            start(bench.process())
        assert len(bench.check_serving()) == 3
        bench.close()


def test_the_fault_budget_is_refused_before_anything_is_made(bench: Bench) -> None:
    bench.world.clouds["ulm"].reachable = False
    machines = len(bench.world.machines())
    with pytest.raises(RefusedError, match=r"2 of 3 replicas out \(r1, r2\)"):
        start(bench.process())
    assert len(bench.world.machines()) == machines
    assert bench.process().journal.open_of("ledger") is None


def test_with_f_2_a_member_that_cannot_be_reached_stays_a_member_without_keys(short: Path) -> None:
    text = SPEC.replace("f: 1", "f: 2").replace(
        "clouds:", "clouds:\n  - {name: porto, process: {}}\n  - {name: wien, process: {}}"
    )
    bench = Bench(short / "h")
    apply(bench.process(), spec(text))
    record = active_record(bench.process(), "ledger")
    gone = next(m for m in record.members if m.replica == "r4")
    bench.world.clouds[gone.cloud].reachable = False
    assert start(bench.process()).outcome == "done"
    after = active_record(bench.process(), "ledger")
    assert after.c == 2
    assert after.member("r4").incarnation == gone.incarnation
    assert after.member("r4").kss_key != gone.kss_key
    bench.close()


def lose_another_at_judge(bench: Bench, **arguments: Any) -> Recovered:
    """r2's cloud goes away after r1 was frozen, so that r1's vote is needed."""
    agent = bench.world.agents["passau"]
    freeze = agent.freeze

    def frozen(*a: Any) -> int:
        bench.world.clouds["ulm"].reachable = False
        return freeze(*a)

    agent.freeze = frozen
    return start(bench.process(), **arguments)


def test_a_due_replica_whose_vote_is_needed_is_thawed_and_put_off(bench: Bench) -> None:
    before = bench.check_serving()
    result = lose_another_at_judge(bench)
    assert result.outcome == "put-off"
    bench.world.clouds["ulm"].reachable = True
    assert bench.check_serving() == before
    guest = next(g for g in bench.world.guest("ledger", "r1") if g.ref.incarnation == result.old_incarnation)
    assert (guest.frozen, guest.closed) == (set(), set())
    assert bench.world.snapshots_left() == []


def test_a_suspected_replica_is_closed_all_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.configure.CONFIRM_TIMEOUT_S", 0.3)
    result = lose_another_at_judge(bench, suspected=True)
    assert result.outcome == "done", "f+k+1 = 2 confirmations come from r0 and the new r1"
    assert result.suspected
    bench.world.clouds["ulm"].reachable = True
    old = [g for g in bench.world.guest("ledger", "r1") if g.ref.incarnation == result.old_incarnation]
    assert old == []


def test_an_unreadable_old_disk_does_not_stop_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.recover.EXTRACT_TIMEOUT_S", 0.2)
    bench.world.agents["passau"].extract_fails = True
    result = start(bench.process())
    assert (result.outcome, result.transfer) == ("done", {})
    bench.check_serving()


def test_a_machine_that_never_catches_up_is_given_up_and_nothing_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.recover.EXTRACT_TIMEOUT_S", 0.2)
    monkeypatch.setattr("cloudfit_orchestrator.controller.recover.PRECOPY_TIMEOUT_S", 0.2)
    before = bench.check_serving()
    agent = bench.world.agents["passau"]
    agent.extract_fails = True
    agent._learn = lambda _: None
    assert start(bench.process()).outcome == "given-up"
    assert bench.check_serving() == before
    assert bench.world.snapshots_left() == []


def test_evidence_is_kept_as_the_spec_says(short: Path) -> None:
    bench = Bench(short / "h")
    apply(bench.process(), spec(SPEC + "recovery: {keep_evidence: 2}\n"))
    for _ in range(3):
        start(bench.process())
    assert len(bench.world.snapshots_left()) == 2
    destroy(bench.process(), "ledger")
    bench.check_nothing_left()
    bench.close()


def test_another_operation_in_between_is_refused_with_the_command_that_finishes(bench: Bench) -> None:
    bench.die_at(60, start)
    with pytest.raises(RefusedError) as caught:
        recover(bench.process(), "ledger", "r0")
    assert caught.value.next_command == "cloudfit recovery start ledger r1"
    with pytest.raises(PermanentError, match="no group nobody"):
        recover(bench.process(), "nobody", "r0")


def test_show_keeps_three_axes_apart(bench: Bench) -> None:
    context = bench.process()
    record = active_record(context, "ledger")
    assert {(s.machine, s.reachable, s.verified, s.epoch) for s in look(context, spec(), record)} == {
        ("running", "yes", "good", "open")
    }
    bench.world.clouds["ulm"].reachable = False
    bench.world.clouds["passau"].vanish()
    seen = {s.replica: (s.machine, s.reachable, s.verified) for s in look(context, spec(), record)}
    assert seen["r2"] == ("unknown", "unknown", "unknown")
    assert seen["r1"] == ("missing", "unknown", "unknown")
    assert seen["r0"] == ("running", "yes", "good")
