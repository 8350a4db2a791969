"""`bench ordering --group`: a group that serves already, of processes; of real machines see docs/performance.md."""

import re
from pathlib import Path

import pytest

from cloudfit_orchestrator.bench.standing import host_process
from cloudfit_orchestrator.clouds.base import Machine, MachineState, Ownership
from cloudfit_orchestrator.model.image import Role
from tests.unit.cli.test_cli import as_json, home, run

__all__ = ["home"]

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, process: {}}
  - {name: passau, process: {}}
  - {name: ulm, process: {}}
"""
QUICKLY = ("bench", "ordering", "--group", "ledger", "--duration", "0.5", "--warmup", "0.2", "-f", "json")


def test_a_group_that_serves_is_measured_and_serves_on(home: Path) -> None:
    (home / "ledger.yaml").write_text(SPEC)
    try:
        as_json(run(home, "group", "apply", str(home / "ledger.yaml"), "-f", "json"))
        found = as_json(run(home, *QUICKLY, "--sweep", "1,8", "--keys", "10", "--payload", "12"))
        assert (found["good"], found["errors"]) == (True, 0)
        assert [p["clients"] for p in found["points"]] == [1, 8]
        asked = found["parameters"]
        assert (asked["group"], asked["algorithm"], asked["n"]) == ("ledger", "ebawa", 3)
        for point in found["points"]:
            assert point["ops_s"] > 0
            assert 0 < point["p50_ms"] <= point["p99_ms"]
            assert set(point["cpu_ms_per_op_by_process"]) == {"r0", "r1", "r2", "load0"}
            assert point["cpu_ms_per_op"] > 0
            assert point["msgs_per_op"] is None, "members tell nobody"
        # The operator's request numbers go on where the load has left them.
        assert run(home, "kv", "put", "ledger", "colour", "blue").returncode == 0
        assert run(home, "kv", "get", "ledger", "colour").stdout == "blue\n"
        assert run(home, "kv", "get", "ledger", "key-00000000").stdout == "key-00000000\n"
        table = run(home, *QUICKLY[:-2], "--clients", "2")
        assert re.search(r"^group +2 ", table.stdout, re.MULTILINE)
    finally:
        run(home, "group", "destroy", "ledger")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "group ledger has no ACTIVE configuration"),
        (("--against", "etcd"), "--against cannot be had with --group"),
        (("--wan", "a-b:1ms,a-c:1ms,b-c:1ms", "--stop-slowest"), "--wan, --stop-slowest cannot be had with --group"),
        (("--processes", "4"), "--processes cannot be had with --group"),
        (("-n", "3", "--algorithm", "ebawa"), "--algorithm, -n cannot be had with --group"),
    ],
)
def test_what_cannot_be_measured_is_said(home: Path, more: tuple[str, ...], told: str) -> None:
    done = run(home, *QUICKLY, *more)
    assert done.returncode == 1
    assert told in done.stderr
    assert not done.stdout


def test_the_process_of_a_machine_of_libvirts_is_found_by_its_uuid(tmp_path: Path) -> None:
    owner = Ownership("d", "ledger", "r0", 1, Role.REPLICA, "op1")
    machine = Machine("6a1e-77", owner, MachineState.RUNNING, tmp_path, tmp_path, None, reference={"driver": "libvirt"})
    for pid, words in ((7, "qemu -name x -uuid 6a1e-778 -S"), (8, "qemu -name y -uuid 6a1e-77 -S"), (9, "sh")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(words.replace(" ", "\0").encode() + b"\0")
    assert host_process(machine, tmp_path) == 8
    (tmp_path / "8/cmdline").unlink()
    assert host_process(machine, tmp_path) is None
