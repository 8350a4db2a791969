"""The whole instrument, briefly: real replicas, agent, etcd, load generators. Needs the Debian package etcd-server."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "cloudfit_orchestrator.cli", "bench", "ordering", "-f", "json"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, as it holds unix sockets, and on a disk."""
    with tempfile.TemporaryDirectory(prefix="cf", dir="/var/tmp") as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == [], "something was left behind"


def processes_in(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.fsencode(directory) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # gone meanwhile
                continue
    return found


def bench(directory: Path, *arguments: str) -> dict:
    command = [*COMMAND, "--directory", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert processes_in(directory) == []
    return json.loads(done.stdout)


def test_a_group_beside_etcd(directory: Path) -> None:
    found = bench(
        directory, "--clients", "8", "--processes", "2", "--duration", "1", "--warmup", "0.5", "--repeat", "2",
        "--reads", "30", "--keys", "10", "--against", "etcd", "--profile",
    )  # fmt: skip
    assert (found["schema"], found["bench"], found["good"], found["errors"]) == (1, "ordering", True, 0)
    assert found["machine"]["file_system"] not in ("tmpfs", "unknown")
    assert len(found["rounds"]) == 2
    for figures in (found, found["peer"]):
        assert figures["ops_s"] > 0
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
        assert figures["cpu_ms_per_op"] > 0
    assert found["ratio"] == pytest.approx(found["ops_s"] / found["peer"]["ops_s"], rel=0.01)
    assert set(found["cpu_ms_per_op_by_process"]) == {"r0", "r1", "r2", "agent", "load0", "load1"}
    assert all(share > 0 for share in found["cpu_ms_per_op_by_process"].values())
    assert found["msgs_per_op"] > 0
    assert found["bytes_per_op"] > 100  # each put's value travels to two replicas
    assert found["fsyncs_per_s"] > 0
    assert all(start > 10 and end > 10 for start, end in found["rss_mb"].values())
    assert set(found["profile"]) == {"r0", "r1", "r2", "load0", "load1"}
    assert any("runtime.py" in row["function"] for row in found["profile"]["r0"])
    assert all(row["own_ms"] <= row["total_ms"] + 0.01 for rows in found["profile"].values() for row in rows)
    for one in found["rounds"]:  # all that callers were answered, replicas have executed, and nobody lied
        slots = {status["slot"] for status in one["ours"]["status"].values()}
        assert min(slots) > 0
        assert all(not client["lies"] and not client["deadlines"] for client in one["ours"]["clients"])


def test_delays_between_regions_show_in_the_latency(directory: Path) -> None:
    found = bench(
        directory, "--wan", "a-b:20ms,a-c:35ms,b-c:50ms", "--clients", "3", "--duration", "2", "--warmup", "1",
    )  # fmt: skip
    regions = found["regions"]
    assert set(regions) == {"a", "b", "c"}
    for figures in regions.values():
        assert figures["bound_ms"] <= figures["p50_ms"] < 5 * figures["rotation_ms"]
    assert regions["c"]["bound_ms"] > regions["a"]["bound_ms"]


def test_ctrl_c_leaves_nothing_behind(directory: Path) -> None:
    with (directory / "err").open("wb") as errors:
        process = subprocess.Popen(
            [*COMMAND, "--directory", str(directory), "--duration", "60"], stderr=errors, stdout=subprocess.DEVNULL
        )
    try:
        deadline_s = time.monotonic() + 60
        while b"round 1" not in (directory / "err").read_bytes():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert len(processes_in(directory)) >= 5, "replicas, agent and the command itself"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert processes_in(directory) == []
    assert b"what the measurement made is gone" in (directory / "err").read_bytes()
    (directory / "err").unlink()


def test_a_directory_in_memory_is_refused() -> None:
    done = subprocess.run([*COMMAND, "--directory", "/dev/shm"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is no disk" in done.stderr


def test_without_etcd_the_command_to_install_it_is_named(directory: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--directory", str(directory), "--against", "etcd"],
        capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(directory)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "apt-get install" in done.stderr
