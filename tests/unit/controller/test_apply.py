import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.apply import active_record, apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.model.errors import (
    BadError,
    BadInputError,
    RefusedError,
    TemporaryError,
    UnknownError,
)
from tests.unit.controller.worlds import SPEC, Bench, spec

FAST = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"  # thousands of commits, and nothing to survive a power cut


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cf", dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def bench(short: Path) -> Iterator[Bench]:
    b = Bench(short / "home")
    yield b
    b.close()


def points_of(root: Path, act_name: str) -> int:
    b = Bench(root)
    if act_name == "apply":
        apply(b.process(), spec())
        calls = b.world.calls
    else:
        apply(b.process(), spec())
        before = b.world.calls
        destroy(b.process(), "ledger")
        calls = b.world.calls - before
    b.close()
    return calls


def test_apply_makes_a_serving_group_and_a_second_one_changes_nothing(bench: Bench) -> None:
    first = apply(bench.process(), spec())
    assert (first.changed, first.c) == (True, 1)
    members = bench.check_serving()
    assert [m.replica for m in members] == ["r0", "r1", "r2"]
    assert [m.cloud for m in members] == ["lisbon", "passau", "ulm"]
    assert len({m.address for m in members}) == 3
    second = apply(bench.process(), spec())
    assert (second.changed, second.members) == (False, first.members)
    bench.check_serving()


def test_the_record_admits_the_client_and_is_built_on_nothing(bench: Bench) -> None:
    context = bench.process()
    apply(context, spec())
    record = active_record(context, "ledger")
    assert record.base is None
    assert [c.name for c in record.clients] == ["operator"]
    assert len(record.confirmations) >= record.confirmations_needed == 2


def test_destroy_leaves_nothing_and_numbers_are_never_used_twice(bench: Bench) -> None:
    first = apply(bench.process(), spec())
    gone = destroy(bench.process(), "ledger")
    assert (gone.changed, gone.machines) == (True, 3)
    bench.check_nothing_left()
    assert not destroy(bench.process(), "ledger").changed
    again = apply(bench.process(), spec())
    assert again.c > first.c
    assert not {m.incarnation for m in again.members} & {m.incarnation for m in first.members}
    bench.check_serving()


@pytest.mark.parametrize("part", range(8))
def test_apply_killed_at_every_point_and_run_again_ends_in_the_same_place(short: Path, part: int) -> None:
    total = points_of(short / "count", "apply")
    assert total > 60
    for call in range(1 + part, total + 1, 8):
        bench = Bench(short / f"h{call}")
        bench.die_at(call, lambda x: apply(x, spec()))
        apply(bench.process(), spec())
        assert len(bench.check_serving()) == 3
        bench.close()


@pytest.mark.parametrize("part", range(4))
def test_apply_killed_at_every_point_then_destroyed_leaves_nothing(short: Path, part: int) -> None:
    total = points_of(short / "count", "apply")
    for call in range(1 + part, total + 1, 4):
        bench = Bench(short / f"h{call}")
        bench.die_at(call, lambda x: apply(x, spec()))
        destroy(bench.process(), "ledger")
        bench.check_nothing_left()
        bench.close()


@pytest.mark.parametrize("part", range(4))
def test_destroy_killed_at_every_point_and_run_again_leaves_nothing(short: Path, part: int) -> None:
    total = points_of(short / "count", "destroy")
    assert total > 25
    for call in range(1 + part, total + 1, 4):
        bench = Bench(short / f"h{call}")
        apply(bench.process(), spec())
        bench.die_at(call, lambda x: destroy(x, "ledger"))
        destroy(bench.process(), "ledger")
        bench.check_nothing_left()
        bench.close()


def test_killed_twice_it_still_ends_well(bench: Bench) -> None:
    for call in (30, 25, 7):
        bench.die_at(call, lambda x: apply(x, spec()))
    apply(bench.process(), spec())
    bench.check_serving()


def test_an_agent_that_lost_its_keys_makes_a_new_attempt_on_the_same_base(bench: Bench) -> None:
    calls = 0
    while not any("installed" in entry for entry in bench.world.log):
        calls += 1
        bench.die_at(calls + 30, lambda x: apply(x, spec()))
    bench.world.agents["passau"].restart()
    apply(bench.process(), spec())
    members = bench.check_serving()
    assert len(members) == 3
    context = bench.process()
    assert active_record(context, "ledger").c > 1


def test_a_temporary_fault_ends_the_run_with_its_words_and_the_next_run_finishes(bench: Bench) -> None:
    bench.world.fail_at(20, TemporaryError("cloud ulm: quota exceeded", next_command="wait"))
    with pytest.raises(TemporaryError, match="quota exceeded"):
        apply(bench.process(), spec())
    apply(bench.process(), spec())
    bench.check_serving()


def test_too_few_confirmations_is_unknown_not_bad(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudfit_orchestrator.controller.configure.CONFIRM_TIMEOUT_S", 0.3)
    world = bench.world
    bench.die_at(30, lambda x: apply(x, spec()))
    for name in ("lisbon", "passau", "ulm"):
        bench.sites.agent(next(c for c in spec().clouds if c.name == name), start=True).mute = {"r0", "r1"}
    with pytest.raises(UnknownError, match="confirmations of c=1: 1 equal ones of 2 needed"):
        apply(bench.process(), spec())
    assert bench.process().store.active("ledger") is None
    for agent in world.agents.values():
        agent.mute = set()
    apply(bench.process(), spec())
    bench.check_serving()


def test_a_bad_image_is_refused_before_anything_is_made(bench: Bench) -> None:
    def verify(reference: str) -> None:
        raise BadError(f"image {reference}: kernel differs")

    bench.images._verify = verify
    with pytest.raises(BadError, match="kernel"):
        apply(bench.process(), spec())
    bench.check_nothing_left()


def test_what_cannot_be_done_is_said_before_anything_is_made(bench: Bench) -> None:
    openstack = SPEC.replace("ulm, process: {}", "ulm, openstack: {cloud: a, flavor: b, network: c}")
    with pytest.raises(BadInputError, match="'ulm' has no agent: nobody measures"):
        spec(openstack)
    bench.check_nothing_left()
    apply(bench.process(), spec())
    with pytest.raises(RefusedError, match="exists with another spec"):
        apply(bench.process(), spec(SPEC.replace("service: kv", "service: counter")))


def test_a_protected_group_is_only_destroyed_on_purpose(bench: Bench) -> None:
    apply(bench.process(), spec(SPEC + "protect: true\n"))
    with pytest.raises(RefusedError, match="protected"):
        destroy(bench.process(), "ledger")
    assert destroy(bench.process(), "ledger", unprotect=True).machines == 3
    bench.check_nothing_left()


def test_two_groups_share_clouds_and_one_leaves_the_other_alone(bench: Bench) -> None:
    apply(bench.process(), spec())
    apply(bench.process(), spec(SPEC.replace("ledger", "other")))
    destroy(bench.process(), "ledger")
    bench.check_serving("other")
    destroy(bench.process(), "other")
    bench.check_nothing_left()
