import pytest

from cloudfit_orchestrator.recovery.machine import (
    ENDS,
    FIRST,
    TABLE,
    Circumstances,
    Event,
    Stage,
    next_stage,
    plan,
)

DUE, SUSPECTED = Circumstances(), Circumstances(suspected=True)


def test_the_plan_of_a_due_replica() -> None:
    assert [s.value for s in plan(DUE)] == [
        "launch", "snapshot", "extract", "precopy", "retire", "freeze", "judge", "close",
        "prepare", "confirm", "activate", "ready", "clean",
        "done",
    ]  # fmt: skip


def test_the_new_machine_is_up_to_date_before_the_old_one_is_frozen() -> None:
    stages = plan(DUE)
    assert stages.index(Stage.PRECOPY) < stages.index(Stage.FREEZE)
    assert next_stage(Stage.EXTRACT, Event.INCOMPLETE, DUE) is Stage.PRECOPY


def test_the_old_epoch_is_closed_before_prepared_is_written() -> None:
    stages = plan(DUE)
    assert stages.index(Stage.CLOSE) < stages.index(Stage.PREPARE)


def test_a_lost_machine_is_replaced_from_peers_only() -> None:
    stages = plan(Circumstances(lost=True))
    assert not {Stage.SNAPSHOT, Stage.EXTRACT, Stage.FREEZE, Stage.CLOSE} & set(stages)
    assert stages[-1] is Stage.DONE


def test_a_missing_vote_puts_off_who_was_only_due() -> None:
    assert next_stage(Stage.JUDGE, Event.INCOMPLETE, DUE) is Stage.THAW
    assert next_stage(Stage.THAW, Event.OK, DUE) is Stage.PUT_OFF


@pytest.mark.parametrize("circumstances", [SUSPECTED, Circumstances(put_off_before=True)])
def test_a_missing_vote_closes_who_is_suspected_or_was_put_off(circumstances: Circumstances) -> None:
    assert next_stage(Stage.JUDGE, Event.INCOMPLETE, circumstances) is Stage.CLOSE


def test_after_prepared_there_is_no_way_back_but_another_record_on_the_same_base() -> None:
    reachable, fresh = set(), {Stage.PREPARE}
    while fresh:
        reachable |= fresh
        fresh = {to for (at, _), to in TABLE.items() if at in reachable} - reachable
    assert not reachable & {Stage.THAW, Stage.PUT_OFF, Stage.GIVEN_UP, Stage.FREEZE}


def test_every_stage_is_reachable_and_only_ends_end() -> None:
    assert {at for at, _ in TABLE} | ENDS == set(Stage)
    assert {FIRST} | set(TABLE.values()) == set(Stage)
    assert not {at for at, _ in TABLE} & ENDS
    assert {event for _, event in TABLE} == set(Event)


def test_an_event_that_cannot_happen_is_refused() -> None:
    with pytest.raises(KeyError):
        next_stage(Stage.LAUNCH, Event.INCOMPLETE, DUE)
