import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.journal import GroupState, Journal
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    j = Journal(tmp_path / "journal.sqlite")
    j.put_group("g", GroupState.APPLYING, "{}")
    yield j
    j.close()


def test_the_file_is_private(journal: Journal, tmp_path: Path) -> None:
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}


def test_a_step_acts_once_with_the_intent_that_was_durable_first(journal: Journal, tmp_path: Path) -> None:
    seen: list[str] = []

    def act(intent: dict[str, str]) -> dict[str, str]:
        seen.append(intent["name"])
        if len(seen) == 1:
            raise OSError("died in the middle")
        return {"id": intent["name"] + "-id"}

    def run(proposal: str) -> dict[str, str]:
        other = Journal(tmp_path / "journal.sqlite")
        try:
            operation = other.open_operation("apply", "g", "", {})
            return operation.step("create", act, lambda: {"name": proposal})
        finally:
            other.close()

    with pytest.raises(OSError, match="middle"):
        run("first")
    assert run("second") == {"id": "first-id"}
    assert run("third") == {"id": "first-id"}
    assert seen == ["first", "first"]


def test_one_operation_a_group(journal: Journal) -> None:
    one = journal.open_operation("recover", "g", "r1", {"x": 1})
    assert journal.open_operation("recover", "g", "r1", {"x": 2}).arguments == {"x": 1}
    with pytest.raises(RefusedError, match="recover r1 was begun") as caught:
        journal.open_operation("destroy", "g", "", {})
    assert caught.value.next_command == "cloudfit recovery start g r1"
    one.close({"y": 1}, state="put-off")
    assert journal.closed("recover", "g", "r1") == [("put-off", {"y": 1})]
    assert journal.open_operation("destroy", "g", "", {}).id != one.id


def test_numbers_are_never_used_twice_even_after_the_group_is_gone(journal: Journal) -> None:
    operation = journal.open_operation("apply", "g", "", {})
    row = journal.plan_machine(operation, "r0", "replica", "c", lambda _: ("10.0.0.1", 1))
    assert journal.plan_machine(operation, "r0", "replica", "c", lambda _: ("10.0.0.9", 9)) == row
    assert journal.next_c("g") == 1
    journal.put_group("g", GroupState.GONE)
    journal.put_group("g", GroupState.APPLYING, "{}")
    operation.close()
    again = journal.open_operation("apply", "g", "", {})
    taken: set[str] = set()
    later = journal.plan_machine(again, "r0", "replica", "c", lambda t: (taken.update(t), ("10.0.0.2", 1))[1])
    assert later.incarnation == row.incarnation + 1
    assert taken == {"10.0.0.1:1"}
    assert journal.next_c("g") == 2


def test_networks_are_chosen_free_and_remembered(journal: Journal) -> None:
    pool = "10.84.0.0/22"
    assert journal.plan_network("a", "", pool, ["10.84.0.0/24"]) == "10.84.1.0/24"
    assert journal.plan_network("a", "", pool, []) == "10.84.1.0/24"
    assert journal.plan_network("b", "10.84.2.0/24", pool, []) == "10.84.2.0/24"
    assert journal.plan_network("c", "", pool, ["10.84.0.0/24"]) == "10.84.3.0/24"
    with pytest.raises(PermanentError, match="no /24"):
        journal.plan_network("d", "", pool, ["10.84.0.0/24"])
    journal.forget_network("a")
    assert journal.plan_network("d", "", pool, ["10.84.0.0/24"]) == "10.84.1.0/24"


def test_the_deployment_is_named_once(journal: Journal, tmp_path: Path) -> None:
    other = Journal(tmp_path / "journal.sqlite")
    assert other.deployment == journal.deployment
    other.close()
