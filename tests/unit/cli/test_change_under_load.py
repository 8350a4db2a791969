"""A group of real processes becomes another one, again and again, while a client goes on writing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest

from cloudfit_orchestrator.cli.clients import Kv
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import LocalSites, open_context
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.controller.spec import read_spec
from tests.unit.cli.test_cli import as_json, home, run

__all__ = ["home"]

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
placement: {{max_per_cloud: 2}}
clouds:
  - {{name: lisbon, process: {{}}}}
  - {{name: passau, process: {{}}}}
  - {{name: {third}, process: {{}}}}
f: {f}
algorithm: {algorithm}
parameters: {{checkpoint_period: {period}, window: 64, max_batch_requests: {batch}}}
"""
WRITES_AT_ONCE = 8
PAUSE_S = 0.03  # between two rounds: without one the client has the machine, and what is tested waits
WRITE_TIMEOUT_S = 90.0  # of one write, on a machine that many tests share
MAX_SILENCE_S = 60.0  # a group that goes on takes a second or two; one that does not, for ever


class Writer:
    """Writes all the time, from before the first change until after the last; every key once, and one key always."""

    def __init__(self, context: Context, root: Path) -> None:
        self._context = context
        self._home = Home(root)
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self.written: dict[bytes, bytes] = {}
        self.acknowledged_s: list[float] = []
        self.failed: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with Kv(self._context, self._home, "ledger", timeout_s=WRITE_TIMEOUT_S) as kv:
                number = 0
                while not self._stop.is_set():
                    items = [(b"k%d-%d" % (number, i), b"v%d" % (number * 31 + i)) for i in range(WRITES_AT_ONCE)]
                    kv.put_many([*items, (b"last", b"%d" % number)])
                    number += 1
                    with self._news:
                        self.written |= {**dict(items), b"last": items[0][0].removeprefix(b"k").partition(b"-")[0]}
                        self.acknowledged_s.append(time.monotonic())
                        self._news.notify_all()
                    self._stop.wait(PAUSE_S)
                assert kv.get_many(list(self.written)) == list(self.written.values()), "a write was lost"
        except Exception as error:  # noqa: BLE001  shown by the test
            with self._news:
                self.failed = error
                self._news.notify_all()

    def goes_on(self, rounds: int = 3) -> None:
        """Wait for that many more acknowledged rounds."""
        with self._news:
            wanted = len(self.acknowledged_s) + rounds
            on = self._news.wait_for(lambda: self.failed or len(self.acknowledged_s) >= wanted, MAX_SILENCE_S)
        assert self.failed is None
        assert on, f"no write was acknowledged for {MAX_SILENCE_S} s"

    def longest_silence_s(self, since: float) -> float:
        """Between two acknowledged rounds, after `since`."""
        times = [t for t in self.acknowledged_s if t >= since]
        return max((b - a for a, b in pairwise(times)), default=0.0)


@pytest.fixture
def context(home: Path) -> Iterator[Context]:
    opened = open_context(Home(home), lambda _: None)
    yield opened
    assert isinstance(opened.sites, LocalSites)
    opened.sites.close()
    opened.journal.close()


CHANGES = [
    ("grow to f=2", {"f": 2}, 5, True),
    ("minbft, other batches", {"f": 2, "algorithm": "minbft", "batch": 64, "period": 8}, 5, True),
    ("pbft", {"f": 1, "algorithm": "pbft"}, 4, True),
    ("back to 3", {"f": 1}, 3, True),
    ("one moves to another cloud", {"f": 1, "third": "graz"}, 3, True),
    ("note only", {"f": 1, "third": "graz", "note": True}, 3, False),
]


def text(**wanted: object) -> str:
    note = "recovery: {keep_evidence: 1}\n" if wanted.pop("note", False) else ""
    base = {"f": 1, "algorithm": "ebawa", "period": 16, "batch": 1024, "third": "ulm"}
    return SPEC.format(**{**base, **wanted}) + note


def test_no_write_is_lost_while_a_group_changes_under_its_clients(home: Path, context: Context) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(text())
    try:
        assert as_json(run(home, "group", "apply", str(spec), "-f", "json"))["c"] == 1
        c = 1
        with Writer(context, home) as writer:
            writer.goes_on()
            for name, wanted, n, reconfigures in CHANGES:
                spec.write_text(text(**wanted))
                assert run(home, "group", "plan", str(spec)).returncode == 2, name
                began = time.monotonic()
                done = as_json(run(home, "group", "apply", str(spec), "-f", "json"))
                c += reconfigures
                assert (done["changed"], done["c"], len(done["members"])) == (True, c, n), name
                assert (done["outage_s"] is not None) == reconfigures
                writer.goes_on()
                print(f"{name}: outage {done['outage_s']} s, longest silence {writer.longest_silence_s(began):.2f} s")
                assert run(home, "group", "plan", str(spec)).returncode == 0, name
        assert writer.failed is None
        assert len(writer.written) > 100
        assert as_json(run(home, "config", "verify", "ledger", "-f", "json"))["good"]
        shown = as_json(run(home, "group", "show", "ledger", "-f", "json"))
        assert {m["machine"] for m in shown["members"]} == {"running"}
        assert len(shown["members"]) == 3
    finally:
        gone = as_json(run(home, "group", "destroy", "ledger", "-f", "json"))
    assert gone["machines"] == 3


def test_scale_grows_and_shrinks_by_name(home: Path) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(text())
    try:
        as_json(run(home, "group", "apply", str(spec), "-f", "json"))
        assert run(home, "kv", "put", "ledger", "colour", "blue").returncode == 0
        refused = run(home, "group", "scale", "ledger", "--f", "1", "--k", "1")
        assert refused.returncode == 1
        assert "4 replicas do not fit on 3 clouds" in refused.stderr
        assert len(as_json(run(home, "group", "scale", "ledger", "--f", "2", "-f", "json"))["members"]) == 5
        assert run(home, "kv", "get", "ledger", "colour").stdout == "blue\n"
        assert run(home, "group", "plan", str(spec)).returncode == 2, "the file says f: 1"
        assert len(as_json(run(home, "group", "apply", str(spec), "-f", "json"))["members"]) == 3
        assert run(home, "kv", "get", "ledger", "colour").stdout == "blue\n"
    finally:
        run(home, "group", "destroy", "ledger")


def kill_at(home: Path, stage: str, *arguments: str) -> None:
    """Run the command and kill -9 it as soon as it says that it reached `stage`."""
    command = [sys.executable, "-m", "cloudfit_orchestrator.cli", *arguments]
    environment = {**os.environ, "CLOUDFIT_HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as p:
        assert p.stderr is not None
        seen = []
        for line in p.stderr:
            seen.append(line)
            if json.loads(line)["stage"] == stage:
                break
        else:
            raise AssertionError(f"it ended before {stage}: {seen}")
        p.kill()


def test_killed_for_good_in_each_stage_the_same_command_finishes_it(home: Path, context: Context) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(text())
    try:
        as_json(run(home, "group", "apply", str(spec), "-f", "json"))
        with Writer(context, home) as writer:
            f = 1
            for stage in ("create", "precopy", "prepare", "confirm", "activate", "ready"):
                f = 3 - f if stage not in {"create", "precopy"} else 2
                spec.write_text(text(f=f))
                kill_at(home, stage, "group", "apply", str(spec))
                if stage in {"create", "precopy"}:
                    writer.goes_on()
                done = as_json(run(home, "group", "apply", str(spec), "-f", "json"))
                assert len(done["members"]) == 2 * f + 1, stage
                writer.goes_on()
                assert as_json(run(home, "orphans", "list", "-f", "json"))["orphans"] == [], stage
                assert len(as_json(run(home, "group", "show", "ledger", "-f", "json"))["members"]) == 2 * f + 1, stage
                if stage == "create":
                    spec.write_text(text())
                    as_json(run(home, "group", "apply", str(spec), "-f", "json"))
        assert writer.failed is None
    finally:
        gone = as_json(run(home, "group", "destroy", "ledger", "-f", "json"))
    assert gone["machines"] == 2 * f + 1


def test_wedged_and_left_another_spec_goes_on_with_new_members(home: Path, context: Context) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(text())
    try:
        as_json(run(home, "group", "apply", str(spec), "-f", "json"))
        with Writer(context, home) as writer:
            writer.goes_on()
            spec.write_text(text(algorithm="minbft"))
            kill_at(home, "prepare", "group", "apply", str(spec))
            spec.write_text(text(f=2))
            done = as_json(run(home, "group", "apply", str(spec), "-f", "json"))
            assert (done["c"], len(done["members"])) == (3, 5), "c=2 was given up: its successor stands on c=1 too"
            writer.goes_on()
        assert writer.failed is None
        log = as_json(run(home, "config", "log", "ledger", "-f", "json"))["records"]
        assert [(r["c"], r["base"], r["status"]) for r in log[2:]] == [
            (2, 1, "PREPARED"),
            (3, 1, "PREPARED"),
            (3, 1, "ACTIVE"),
        ]
    finally:
        run(home, "group", "destroy", "ledger")


def test_with_a_dead_replica_the_group_still_grows_and_recovers_it_then(home: Path, context: Context) -> None:
    spec = home / "ledger.yaml"
    spec.write_text(text())
    try:
        as_json(run(home, "group", "apply", str(spec), "-f", "json"))
        with Writer(context, home) as writer:
            writer.goes_on(100)  # more than a learner could follow from the beginning
            machines = context.sites.cloud(read_spec(spec).cloud_of("r1")).machines(context.journal.deployment)
            os.kill(next(m.reference["pid"] for m in machines if m.owner.replica == "r1"), signal.SIGKILL)
            spec.write_text(text(f=2))
            assert len(as_json(run(home, "group", "apply", str(spec), "-f", "json"))["members"]) == 5
            writer.goes_on()
            assert as_json(run(home, "recovery", "start", "ledger", "r1", "-f", "json"))["outcome"] == "done"
            writer.goes_on()
        assert writer.failed is None
        shown = as_json(run(home, "group", "show", "ledger", "-f", "json"))
        assert {(m["machine"], m["epoch"]) for m in shown["members"]} == {("running", "open")}
    finally:
        run(home, "group", "destroy", "ledger")
