"""`bench state`: what a checkpoint costs by size of state, when the same number of keys changed since the last one."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cloudfit_orchestrator.bench.group import unhurried
from cloudfit_orchestrator.bench.processes import machine_facts, real_disk, rss_mb
from cloudfit_orchestrator.bench.profiles import new_profile, top
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.controller.ports import Progress
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.model.errors import BadInputError

MIN_SIZE, MAX_SIZE = 10**6, 4 * 10**9  # bytes; a bucket of a larger state than 4 GB would be full
MEMORY_FACTOR = 4  # times its size a state may take as Python objects, with the copies of a checkpoint
FLAT = 2.0  # a cost that grows by less from the smallest to the largest state counts as flat
TOP = 8  # functions of a profile
KEPT = 3  # snapshots that a replica keeps: the newest certified, stable and own one
SEED = 1
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
STEPS = ("change", "root", "snapshot", "save")

Report = Callable[[Progress], None]


def parse_size(text: str) -> int:
    """`10MB`, `1GB` in bytes, units of ten. Raises BadInputError."""
    number, unit = text[:-2], text[-2:].upper()
    size = int(number) * _UNITS[unit] if unit in _UNITS and number.isascii() and number.isdigit() else 0
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise BadInputError(f"{text!r} is no size from 1MB to 4GB", next_command="--sizes 10MB,100MB,1GB")
    return size


def key_of(number: int) -> bytes:
    """Key `number`."""
    return b"key-%012d" % number


class State:
    """A state of `size` bytes, keys and values, of `entry` bytes each, and its snapshots on disk."""

    def __init__(self, size: int, value: int, directory: Path) -> None:
        """Filled, and saved once: the first checkpoint writes everything. `value`: bytes."""
        self.keys = max(1, size // (len(key_of(0)) + value))
        self._value = value
        self._random = random.Random(SEED)
        self._store = StateStore()
        for number in range(self.keys):
            self._store.put(key_of(number), self._random.randbytes(value))
        self._files = SnapshotFiles(directory)
        self._slot = 0
        self.snapshot()
        self.save()

    def change(self, count: int) -> None:
        """Set `count` different keys."""
        for number in self._random.sample(range(self.keys), min(count, self.keys)):
            self._store.put(key_of(number), self._random.randbytes(self._value))

    def root(self) -> None:
        """The digest."""
        self._store.root()

    def snapshot(self) -> None:
        """The unchanging state."""
        self._snapshot = self._store.snapshot()

    def save(self) -> int:
        """Persist it and drop old ones, as a replica does in a thread of its own. Returns bytes of chunks written."""
        self._slot += 1
        written = self._files.save(1, self._slot, self._snapshot)
        self._files.keep_only([(1, slot) for slot in range(max(1, self._slot - KEPT + 1), self._slot + 1)])
        return written


def checkpoint(state: State, changed: int) -> dict[str, float]:
    """One checkpoint, step by step: wall-clock and CPU time (`…_cpu_ms`, all threads), and what was written."""
    figures: dict[str, float] = {}
    steps: list[tuple[str, Callable[[], int | None]]] = [
        ("change", lambda: state.change(changed)),
        ("root", state.root),
        ("snapshot", state.snapshot),
        ("save", state.save),
    ]
    written = 0
    for name, step in steps:
        wall_s, process_s = time.perf_counter(), time.process_time()
        written = step() or written
        figures[f"{name}_ms"] = 1000 * (time.perf_counter() - wall_s)
        figures[f"{name}_cpu_ms"] = 1000 * (time.process_time() - process_s)
    figures["written_mb"] = written / 1e6
    figures["checkpoint_ms"] = figures["root_ms"] + figures["snapshot_ms"]
    figures["checkpoint_cpu_ms"] = figures["root_cpu_ms"] + figures["snapshot_cpu_ms"]
    return figures


def profiled(state: State, changed: int) -> list[dict[str, Any]]:
    """The functions that one more checkpoint spent most CPU time in, itself each, most first."""
    profile = new_profile()
    profile.runcall(checkpoint, state, changed)
    return top(profile, TOP)


def run(
    sizes: Sequence[int], changed: int, *, value: int, repeat: int, directory: Path, report: Report
) -> dict[str, Any]:
    """Measure every size, smallest first. Raises BadInputError.

    `points`: medians over `repeat` checkpoints, each after `changed` changed keys. `change` is the puts themselves,
    which copy what they share with the last snapshot; `checkpoint` is digest and snapshot, which the replica waits for;
    `save` is what its other thread writes to disk, with fsync. `growth` of a cost: CPU time at the largest size
    over that at the smallest; `flat` where it is below 2. `profile`: of the largest size, by own CPU time.
    """
    if not sizes or changed < 1 or repeat < 1 or not 0 <= value <= 10**5:
        raise BadInputError("bench state needs a size, at least one changed key and round, values up to 100,000 bytes")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if max(sizes) * MEMORY_FACTOR > memory:
        raise BadInputError(
            f"a state of {max(sizes)} bytes takes about {MEMORY_FACTOR} times as much, {memory} bytes are free",
            next_command="smaller --sizes",
        )
    real_disk(directory)
    machine, points, profile = machine_facts(directory), [], []
    for size in sorted(sizes):
        report(Progress("bench", "size", "state", f"{size / 1e6:.0f} MB"))
        root = Path(tempfile.mkdtemp(prefix="cfbench-state", dir=directory))
        try:
            state = State(size, value, root)
            rounds = [checkpoint(state, changed) for _ in range(repeat)]
            points.append(
                {
                    "size_mb": size / 1e6,
                    "keys": state.keys,
                    **{name: round(median(r[name] for r in rounds), 3) for name in rounds[0]},
                    "rss_mb": rss_mb(os.getpid()),
                }
            )
            profile = profiled(state, changed) if size == max(sizes) else []
        finally:
            with unhurried():
                shutil.rmtree(root)
    growth = {name: growth_of([p[f"{name}_cpu_ms"] for p in points]) for name in ("change", "checkpoint", "save")}
    return {
        "bench": "state",
        "machine": machine,
        "parameters": {"sizes": sorted(sizes), "changed": changed, "value": value, "repeat": repeat},
        "points": points,
        "growth": growth,
        "flat": {name: factor < FLAT for name, factor in growth.items()},
        "profile": profile,
    }


def growth_of(costs: Sequence[float]) -> float:
    """The last over the first."""
    return round(costs[-1] / max(costs[0], 1e-6), 2)
