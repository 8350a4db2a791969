"""`bench ordering`: a group under closed-loop load, round by round, in turn with a peer; see `run` for the report."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cloudfit_orchestrator.bench import etcd
from cloudfit_orchestrator.bench.generator import TIMEOUT_S, Load
from cloudfit_orchestrator.bench.group import CONNECT_S, Group, Launching, Options
from cloudfit_orchestrator.bench.latencies import added, percentile_ms
from cloudfit_orchestrator.bench.processes import (
    Worker,
    busy_s,
    cpu_s,
    free_ports,
    machine_facts,
    real_disk,
    rss_mb,
)
from cloudfit_orchestrator.bench.wan import Proxies, Wan, bound_ms, launch_target, rotation_ms
from cloudfit_orchestrator.controller.ports import Progress
from cloudfit_orchestrator.model.errors import BadInputError

MAX_CLIENTS = 4096  # callers; a client's window is 4,096 numbers, half of it usable
MAX_PROCESSES = 64
MAX_DURATION_S = 3600.0
LEAD_S = 0.05  # from the order to the first call
SEED = 1

# Figures of which the median over the rounds is told.
AVERAGED = (
    "ops_s",
    "p50_ms",
    "p99_ms",
    "cpu_ms_per_op",
    "msgs_per_op",
    "bytes_per_op",
    "fsyncs_per_s",
    "ops_per_bundle",
)
_AVERAGED_PEER = ("ops_s", "p50_ms", "p99_ms", "cpu_ms_per_op", "generator_cpu_share")

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is measured. `sweep`: numbers of callers, one point each; `wan`: as `Wan.parse` takes it."""

    algorithm: str = "ebawa"
    n: int = 3
    sweep: tuple[int, ...] = (64,)
    processes: int | None = None  # None: one, or one a region
    payload: int = 100
    keys: int = 10_000
    reads: int = 0
    duration_s: float = 10.0
    warmup_s: float = 2.0
    repeat: int = 1
    against: str | None = None
    wan: str | None = None
    stop_slowest: bool = False
    profile: bool = False

    def check(self) -> "Wan | None":
        """The regions. Raises BadInputError for what cannot be measured."""
        wan = Wan.parse(self.wan, self.n) if self.wan else None
        rules = [
            (bool(self.sweep) and all(1 <= c <= MAX_CLIENTS for c in self.sweep), f"1 to {MAX_CLIENTS} clients"),
            (self.processes is None or 1 <= self.processes <= MAX_PROCESSES, f"1 to {MAX_PROCESSES} processes"),
            (0.5 <= self.duration_s <= MAX_DURATION_S, f"a duration of 0.5 to {MAX_DURATION_S:.0f} s"),
            (0 <= self.warmup_s <= MAX_DURATION_S, "a warm-up that is not negative"),
            (1 <= self.repeat <= 100, "1 to 100 rounds"),
            (0 <= self.reads <= 100, "0 to 100 percent of reads"),
            (1 <= self.keys <= 10**7, "1 to 10,000,000 keys"),
            (0 <= self.payload <= etcd.MAX_PAYLOAD, f"values of 0 to {etcd.MAX_PAYLOAD} bytes"),
            (self.against in (None, "etcd"), "--against etcd"),
            (not (self.against and wan), "--against or --wan: etcd has one address a member for all regions"),
            (not self.stop_slowest or wan is not None, "--stop-slowest with --wan, which says who is far away"),
            (wan is None or min(self.sweep) >= self.generators(wan), "in each region and process one client at least"),
            (wan is None or self.generators(wan) >= len(wan.regions), "with --wan one process a region at least"),
        ]
        for holds, allowed in rules:
            if not holds:
                raise BadInputError(f"this cannot be measured; allowed: {allowed}", next_command="see --help")
        return wan

    def generators(self, wan: "Wan | None") -> int:
        """How many client processes there are."""
        return self.processes or (len(wan.regions) if wan else 1)


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen between two instants of one round."""

    seconds: float
    answers: list[dict[str, Any]]  # of the generators that took part
    cpu: dict[str, float]  # seconds, by process
    machine_cpu_s: float  # of the whole machine
    before: Any  # what `sample` gave
    after: Any


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` as equal as can be."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def drive(
    workers: Sequence[Worker],
    clients: int,
    parameters: Parameters,
    processes: dict[str, int],
    sample: Callable[[], Any],
    *,
    seed: int,
    stopped: int | None = None,
    profile: bool = False,
) -> Window:
    """One round. `sample` is called at both ends of what is counted; `stopped`: a process that stands still in the
    second half. Raises UnknownError.
    """
    begin_s = time.monotonic() + LEAD_S + parameters.warmup_s
    end_s = begin_s + parameters.duration_s
    middle_s = (begin_s + end_s) / 2
    marks = (begin_s, end_s) if stopped is None else (begin_s, middle_s, end_s)
    asked = []
    for i, (worker, callers) in enumerate(zip(workers, shares(clients, len(workers)), strict=True)):
        if callers:
            load = Load(callers, marks, parameters.payload, parameters.keys, parameters.reads, seed * 1000 + i, profile)
            worker.tell(load.order())
            asked.append(worker)
    _until(begin_s)
    began_s = time.monotonic()
    cpu, machine_cpu_s = {name: cpu_s(pid) for name, pid in processes.items()}, busy_s()
    before = sample()  # takes a while: behind the clocks at both ends
    try:
        if stopped is not None:
            _until(middle_s)
            os.kill(stopped, signal.SIGSTOP)
        _until(end_s)
    finally:
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
    cpu = {name: cpu_s(pid) - cpu[name] for name, pid in processes.items()}
    machine_cpu_s, seconds = busy_s() - machine_cpu_s, time.monotonic() - began_s
    after = sample()
    answers = [worker.answer(TIMEOUT_S + CONNECT_S)["figures"] for worker in asked]
    return Window(seconds, answers, cpu, machine_cpu_s, before, after)


def _until(instant_s: float) -> None:
    time.sleep(max(0.0, instant_s - time.monotonic()))


def load_figures(phases: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Throughput and latency of phases that together took `seconds` (each of several processes: once)."""
    operations = sum(phase["operations"] for phase in phases)
    bars = added(phase["latencies_us"] for phase in phases)
    return {
        "operations": operations,
        "ops_s": round(operations / seconds, 1),
        "p50_ms": percentile_ms(bars, 50),
        "p99_ms": percentile_ms(bars, 99),
    }


def common_figures(window: Window, parameters: Parameters, servers: Sequence[str]) -> dict[str, Any]:
    """What is told of ours and of a peer alike. `servers` of the window's processes serve, the others do not."""
    phases = [phase for answer in window.answers for phase in answer["phases"]]
    figures = load_figures(phases, parameters.duration_s)
    operations = max(1, figures["operations"])
    generators = sum(s for name, s in window.cpu.items() if name.startswith("load"))
    return {
        **figures,
        "errors": sum(answer["errors"] for answer in window.answers),
        "first_error": next((a["first_error"] for a in window.answers if a["first_error"]), ""),
        "cpu_ms_per_op": round(1000 * sum(window.cpu[name] for name in servers) / operations, 4),
        "cpu_ms_per_op_by_process": {name: round(1000 * s / operations, 4) for name, s in window.cpu.items()},
        "window_s": round(window.seconds, 3),
        "generator_cpu_share": round(generators / window.seconds, 3),
        "others_cpu_share": round(
            max(0.0, window.machine_cpu_s - sum(window.cpu.values())) / window.seconds / (os.cpu_count() or 1), 3
        ),
    }


class _Bench:
    """One run: what stands for all of its rounds."""

    def __init__(self, parameters: Parameters, directory: Path, report: Report) -> None:
        self._p = parameters
        self._wan = parameters.check()
        self._directory = directory
        self._report = report
        self._proxies: Proxies | None = None
        self._seed = SEED

    def _say(self, stage: str, message: str) -> None:
        self._report(Progress("bench", stage, "ordering", message))

    def run(self) -> dict[str, Any]:
        real_disk(self._directory)
        machine = machine_facts(self._directory)
        if self._p.against:
            etcd.binary()  # told before anything is started
        with ExitStack() as stack:
            self._open(stack)
            points = [self._point(clients) for clients in self._p.sweep]
        errors = sum(p["errors"] + p.get("peer", {}).get("errors", 0) for p in points)
        parameters = {**asdict(self._p), "sweep": list(self._p.sweep), "processes": self._p.generators(self._wan)}
        doc = {"bench": "ordering", "good": errors == 0, "errors": errors, "machine": machine, "parameters": parameters}
        single = points[0] if len(points) == 1 else {}
        return {**doc, **single, "errors": errors, "points": points}

    def _open(self, stack: ExitStack) -> None:
        launching: Launching | None = None
        if self._wan is not None:
            proxies = Proxies(self._wan, free_ports(Proxies.ports_needed(self._wan)))
            proxy = stack.enter_context(
                Worker("delay proxy", "cloudfit_orchestrator.bench.proxy", {"routes": proxies.routes})
            )
            proxy.answer(CONNECT_S)
            self._proxies, self._proxy_pid = proxies, proxy.pid
            launching = partial(launch_target, proxy)
        count = self._p.generators(self._wan)
        self._say("start", f"a group of {self._p.n} replicas, {count} load generators")
        routes = self._proxies.replicas if self._proxies else None
        options = Options(self._p.n, self._p.algorithm, count, routes)
        self._group = stack.enter_context(Group(options, self._directory, self._report, launching))
        self._ours = [stack.enter_context(self._generator(i)) for i in range(count)]
        self._theirs: list[Worker] = []
        if self._p.against:
            self._say("start", f"etcd {etcd.version()}, {etcd.MEMBERS} members")
            self._etcd = stack.enter_context(etcd.Etcd(self._directory))
            callers = -(-max(self._p.sweep) // count)
            self._theirs = [stack.enter_context(self._etcd.generator(i, callers)) for i in range(count)]
        for worker in (*self._ours, *self._theirs):
            worker.answer(CONNECT_S)

    def _generator(self, number: int) -> Worker:
        """EBAWA spreads clients over the replicas; MinBFT's leader is the nearest to all that are not far away."""
        if self._wan is not None and self._proxies is not None:
            region = self._wan.regions[number % len(self._wan.regions)]
            return self._group.generator(number, f"r{self._wan.nearest[region]}", self._proxies.clients[region])
        return self._group.generator(number, f"r{number % self._p.n}" if self._p.algorithm == "ebawa" else "r0")

    def _point(self, clients: int) -> dict[str, Any]:
        """All rounds of one number of callers: ours, theirs, ours, theirs …; medians over the rounds."""
        rounds = []
        for i in range(self._p.repeat):
            self._say("round", f"{clients} clients, round {i + 1} of {self._p.repeat}")
            seen = {"ours": self._our_round(clients)}
            if self._p.against:
                seen["peer"] = self._their_round(clients)
            rounds.append(seen)
        ours = [r["ours"] for r in rounds]
        point: dict[str, Any] = {"clients": clients, **medians(ours, AVERAGED)}
        point["cpu_ms_per_op_by_process"] = medians(
            [o["cpu_ms_per_op_by_process"] for o in ours], tuple(ours[0]["cpu_ms_per_op_by_process"])
        )
        point["rss_mb"] = {r: [ours[0]["rss_mb"][r][0], ours[-1]["rss_mb"][r][1]] for r in ours[0]["rss_mb"]}
        point["errors"] = sum(o["errors"] for o in ours)
        if self._p.against:
            theirs = [r["peer"] for r in rounds]
            about = {"name": "etcd", "version": etcd.version(), "terms": etcd.TERMS}
            errors = sum(t["errors"] for t in theirs)
            point["peer"] = {**about, **medians(theirs, _AVERAGED_PEER), "errors": errors}
            point["ratio"] = round(point["ops_s"] / point["peer"]["ops_s"], 4) if point["peer"]["ops_s"] else None
        if self._wan is not None:
            point["regions"] = self._regions(ours)
        if self._p.profile:
            point["profile"] = self._profile(clients)
        return {**point, "rounds": rounds}

    def _profile(self, clients: int) -> dict[str, Any]:
        """One more round, whose figures nobody should believe: by replica and load generator, as `profiles.top`."""
        self._say("profile", f"{clients} clients, one profiled round")
        group = self._group
        began: list[bool] = []

        def sample() -> dict[str, Any]:
            if began:
                return group.end_profiles()
            began.append(True)
            group.begin_profiles()
            return {}

        window = drive(self._ours, clients, self._p, {}, sample, seed=self._next_seed(), profile=True)
        return {**window.after, **{f"load{i}": answer["profile"] for i, answer in enumerate(window.answers)}}

    def _our_round(self, clients: int) -> dict[str, Any]:
        group, replicas = self._group, dict(self._group.replicas)
        processes = {**replicas, "agent": group.agent, **{f"load{i}": w.pid for i, w in enumerate(self._ours)}}
        if self._wan is not None:
            processes["proxy"] = self._proxy_pid
        stopped = replicas[self._wan.farthest] if self._wan is not None and self._p.stop_slowest else None

        def sample() -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
            return group.figures(), {name: rss_mb(pid) for name, pid in replicas.items()}

        window = drive(self._ours, clients, self._p, processes, sample, seed=self._next_seed(), stopped=stopped)
        found = common_figures(window, self._p, list(replicas))
        operations = max(1, found["operations"])
        figures = [answer["client"] for answer in window.answers]
        (before, rss_before), (after, rss_after) = window.before, window.after

        def grown(figure: str) -> int:
            return sum(int(after[r][figure]) - int(before[r][figure]) for r in replicas)

        found |= {
            "msgs_per_op": round(grown("sent_messages") / operations, 3),
            "bytes_per_op": round(grown("sent_bytes") / operations, 1),
            "fsyncs_per_s": round(grown("log_syncs") / window.seconds, 1),
            "ops_per_bundle": round(
                sum(c["answered"] for c in figures) / max(1, sum(c["bundles"] for c in figures)), 1
            ),
            "rss_mb": {r: [rss_before[r], rss_after[r]] for r in replicas},
            "status": {r: after[r]["status"] for r in replicas},
            "clients": figures,
        }
        if self._wan is not None:
            found["regions"] = self._by_region(window)
        return found

    def _their_round(self, clients: int) -> dict[str, Any]:
        members = dict(self._etcd.members)
        processes = {**members, **{f"load{i}": w.pid for i, w in enumerate(self._theirs)}}
        window = drive(self._theirs, clients, self._p, processes, lambda: None, seed=self._next_seed())
        return common_figures(window, self._p, list(members))

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed

    def _by_region(self, window: Window) -> dict[str, Any]:
        """Throughput and latency of the clients in each region; with a stopped replica also of each half."""
        assert self._wan is not None
        regions: dict[str, Any] = {}
        for at, region in enumerate(self._wan.regions):
            mine = [a["phases"] for i, a in enumerate(window.answers) if i % len(self._wan.regions) == at]
            regions[region] = load_figures([phase for phases in mine for phase in phases], self._p.duration_s)
            if self._p.stop_slowest:
                half_s = self._p.duration_s / 2
                for name, half in (("all_run", 0), ("slowest_stopped", 1)):
                    regions[region][name] = load_figures([phases[half] for phases in mine], half_s)
        return regions

    def _regions(self, ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
        assert self._wan is not None
        found: dict[str, Any] = {}
        for region in self._wan.regions:
            seen = [o["regions"][region] for o in ours]
            found[region] = medians(seen, ("ops_s", "p50_ms", "p99_ms"))
            found[region]["bound_ms"] = bound_ms(self._wan, region, self._p.algorithm)
            if self._p.algorithm == "ebawa":
                found[region]["rotation_ms"] = rotation_ms(self._wan, region)
            for half in ("all_run", "slowest_stopped") if self._p.stop_slowest else ():
                found[region][half] = medians([s[half] for s in seen], ("ops_s", "p50_ms", "p99_ms"))
        return found


def medians(rounds: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The median of each figure over the rounds that have it."""
    found: dict[str, Any] = {}
    for name in names:
        values = [r[name] for r in rounds if r[name] is not None]
        found[name] = round(median(values), 4) if values else None
    return found


def run(parameters: Parameters, directory: Path, report: Report) -> dict[str, Any]:
    """Measure, and leave nothing behind. Raises CloudfitError if it cannot be measured; failed operations are counted.

    The report: `machine`, `parameters`, `points`: one for each number of callers, with medians over its `rounds` (each
    `ours` and `peer`), `good` and `errors`. With one point its figures stand at the top too. `cpu_ms_per_op` is of all
    replicas together, user and system, load generators and agent apart in `cpu_ms_per_op_by_process`. `msgs_per_op` and
    `bytes_per_op` are bodies handed to the transport between replicas, before TLS. `fsyncs_per_s` are log rounds of all
    replicas, each one fdatasync. `ops_per_bundle`: as many of the callers' requests travelled together; at all of one
    process's callers the group has one batch of it at a time, and more processes show how it overlaps them.
    `others_cpu_share` is what others than the round's processes used of the machine's cores. `profile`: if asked for,
    of one round more, `profiles.top` of each replica's event loop and of each load generator.
    """
    return _Bench(parameters, directory, report).run()
