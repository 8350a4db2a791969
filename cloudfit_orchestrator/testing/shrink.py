"""Makes a failed run small: leaves out troubles and attacks, operations, clients and time, while it still fails alike.

Delta debugging (Zeller and Hildebrandt, TSE'02) over the names of a plan, then over its numbers. "Alike" is the same
kind of failure: what a smaller run fails of otherwise is another finding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudfit_orchestrator.testing.plan import Plan, draw
from cloudfit_orchestrator.testing.simulator import Report, run

MAX_RUNS = 400  # of one shrinking: minutes
NUMBERS = {"trouble_s": 0.25, "operations": 1, "busy": 1, "clients": 1, "keys": 1}  # and the least worth trying


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest run found."""

    plan: Plan
    report: Report
    runs: int


class _Spent(Exception):  # noqa: N818  no error: the end of a search
    """MAX_RUNS were made."""


class Shrinker:
    """One search."""

    def __init__(self, plan: Plan, execute: Callable[[Plan], Report] = run) -> None:
        """`plan` fails when executed."""
        self._execute = execute
        self._runs = 0
        self._plan = plan
        self._report = execute(plan)
        self._kind = self._report.kind

    def shrink(self) -> Shrunk:
        """The smallest run that fails alike. The plan itself if it does not fail at all."""
        try:
            while self._kind and (self._fewer_names() | self._smaller_numbers()):
                pass  # what one pass took away may let the next take more
        except _Spent:
            pass
        return Shrunk(self._plan, self._report, self._runs)

    def _fails(self, plan: Plan) -> bool:
        if self._runs >= MAX_RUNS:
            raise _Spent
        self._runs += 1
        report = self._execute(plan)
        if report.kind != self._kind:
            return False
        self._plan, self._report = plan, report
        return True

    def _fewer_names(self) -> bool:
        before = self._plan.names
        size = max(1, len(before) // 2)
        while self._plan.names and size:
            if not any(self._fails(self._without(part)) for part in _parts(self._plan.names, size)):
                size //= 2
        return len(self._plan.names) < len(before)

    def _without(self, names: list[str]) -> Plan:
        return self._whole(self._plan.changes).without([*self._plan.left_out, *names])

    def _whole(self, changes: dict[str, float]) -> Plan:
        plan = self._plan
        return draw(plan.seed, plan.n, plan.algorithm, plan.name, changes)

    def _smaller_numbers(self) -> bool:
        shrunk = False
        for name, least in NUMBERS.items():
            while (value := getattr(self._plan.profile, name)) > least:
                smaller = max(least, type(value)(value / 2))
                whole = self._whole({**self._plan.changes, name: smaller})
                if not self._fails(whole.without(set(whole.names) & set(self._plan.left_out))):
                    break
                shrunk = True
        return shrunk


def _parts(names: list[str], size: int) -> Iterator[list[str]]:
    for i in range(0, len(names), size):
        yield names[i : i + size]
