"""Many seeds over worker processes, and what they covered: attacks with faults, branches of the protocol's rules."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from typing import Any

from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.testing.behaviours import ALL, STRONGEST
from cloudfit_orchestrator.testing.plan import Changes, draw
from cloudfit_orchestrator.testing.simulator import Report, run

CHUNK = 4  # runs handed to a worker at a time: seconds of work
MAX_FAILURES = 100  # reported; a campaign with more has one cause


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    seed: int
    n: int
    algorithm: Algorithm
    profile: str
    changes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that failed."""

    command: str
    kind: str
    fact: str


@dataclass(slots=True)
class Coverage:
    """What happened in how many runs."""

    runs: int = 0
    by_n: Counter[int] = field(default_factory=Counter)
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    events: int = 0
    answered: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (attack, fault)
    failures: list[Failure] = field(default_factory=list)

    def add(self, job: Job, report: Report, cpu_s: float) -> None:
        """Count one run."""
        self.runs += 1
        self.by_n[job.n] += 1
        self.cpu_s += cpu_s
        self.virtual_s += report.virtual_s
        self.events += report.events
        self.answered += report.answered
        self.seen.update(report.happened.keys())
        self.pairs.update(product(_of("attack", report.happened), _of("fault", report.happened)))
        if not report.ok:
            self.failures.append(Failure(report.command, report.kind, report.failures[0]))

    def merge(self, other: "Coverage") -> None:
        """Take another part of the campaign in."""
        self.runs += other.runs
        self.by_n.update(other.by_n)
        self.cpu_s += other.cpu_s
        self.virtual_s += other.virtual_s
        self.events += other.events
        self.answered += other.answered
        self.seen.update(other.seen)
        self.pairs.update(other.pairs)
        self.failures += other.failures

    def of(self, sort: str) -> dict[str, int]:
        """Runs in which each attack, fault, rule or check was seen."""
        return {name.removeprefix(sort + ":"): count for name, count in sorted(self.seen.items()) if sort + ":" in name}

    @property
    def never(self) -> list[str]:
        """Attacks that no run saw reach a correct replica."""
        return sorted({*ALL, *STRONGEST} - set(self.of("attack")))

    def document(self, real_s: float) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": self.runs,
            "runs_by_n": {str(n): count for n, count in sorted(self.by_n.items())},
            "runs_per_s": round(self.runs / real_s, 2) if real_s else 0.0,
            "runs_per_cpu_s": round(self.runs / self.cpu_s, 2) if self.cpu_s else 0.0,
            "virtual_s": round(self.virtual_s, 1),
            "events": self.events,
            "answered": self.answered,
            "attacks": self.of("attack"),
            "faults": self.of("fault"),
            "rules": self.of("rule"),
            "checks": self.of("check"),
            "attacks_never_effective": self.never,
            "pairs": {f"{attack} and {fault}": count for (attack, fault), count in sorted(self.pairs.items())},
            "failures": [{"kind": f.kind, "replay": f.command, "fact": f.fact} for f in self.failures[:MAX_FAILURES]],
        }


def _of(sort: str, happened: Iterable[str]) -> list[str]:
    return sorted({name.removeprefix(sort + ":").split(" ")[0] for name in happened if name.startswith(sort + ":")})


def jobs(
    seeds: range, ns: Iterable[int], algorithms: Iterable[Algorithm], profile: str, changes: Changes
) -> Iterator[Job]:
    """Each seed with each n and algorithm."""
    for seed, n, algorithm in product(seeds, ns, algorithms):
        yield Job(seed, n, algorithm, profile, tuple(changes.items()))


def work(chunk: list[Job]) -> Coverage:
    """Run some jobs, in this process."""
    coverage = Coverage()
    for job in chunk:
        started = time.process_time()
        report = run(draw(job.seed, job.n, job.algorithm, job.profile, dict(job.changes)))
        coverage.add(job, report, time.process_time() - started)
    return coverage


def campaign(
    wanted: Iterable[Job], *, processes: int, progress: Callable[[Coverage], None] = lambda _: None
) -> Coverage:
    """Run all jobs in so many processes; `progress` is told how far it is after each chunk."""
    total = Coverage()
    todo = list(wanted)
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    if processes <= 1:
        for chunk in chunks:
            total.merge(work(chunk))
            progress(total)
        return total
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part in pool.map(work, chunks):
            total.merge(part)
            progress(total)
    return total
