import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cloudfit_orchestrator.clouds.base import MachineState, OrphanKind
from cloudfit_orchestrator.clouds.process import ISOLATES_NOTHING, MARK, ProcessCloud, _environment, _process
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError
from tests.unit.clouds.specs import NETWORK, owner, spec

REPLICA = """
import socket, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
listener = socket.socket(socket.AF_UNIX)
listener.bind(args["--channel"])
listener.listen()
while True:
    peer, _ = listener.accept()
    word = peer.recv(100)
    open(args["--state"] + "/word", "ab").write(word)
    peer.sendall(word.upper())
    peer.close()
"""


@pytest.fixture
def cloud():
    home = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))
    script = home / "replica.py"
    script.write_text(REPLICA)
    cloud = ProcessCloud(home=home, command=[sys.executable, str(script)])
    yield cloud
    for deployment in ("dep", "other"):
        cloud.sweep(deployment, cloud.orphans(deployment, []))
    shutil.rmtree(home)


def say(machine, word, deadline_s=20.0):
    end = time.monotonic() + deadline_s
    while True:
        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.settimeout(deadline_s)
                peer.connect(str(machine.channel))
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < end, machine.console.read_text()
                time.sleep(0.02)
                continue
            peer.sendall(word)
            return peer.recv(100)


def test_create_is_idempotent_and_another_specification_is_refused(cloud, tmp_path):
    machine = cloud.create(spec(tmp_path))
    assert machine.state is MachineState.RUNNING
    assert say(machine, b"hello") == b"HELLO"
    assert machine.reference["pid"] == int(machine.id.split(".")[0])
    assert cloud.create(spec(tmp_path, owner(operation="op-2"))) == machine
    with pytest.raises(RefusedError, match="another specification"):
        cloud.create(spec(tmp_path, memory_mib=256))


def test_pause_snapshot_resume_and_the_snapshot_stays_as_it_was(cloud, tmp_path):
    machine = cloud.create(spec(tmp_path))
    say(machine, b"one")
    with pytest.raises(PermanentError, match="is running"):
        cloud.snapshot(machine, "op")
    machine = cloud.pause(machine)
    assert machine.state is MachineState.PAUSED
    assert cloud.pause(machine).state is MachineState.PAUSED
    taken = cloud.snapshot(machine, "op")
    machine = cloud.resume(machine)
    assert say(machine, b"two") == b"TWO"
    assert cloud.snapshot(machine, "op") == taken
    assert (taken.path / "word").read_bytes() == b"one"
    reader = cloud.create(spec(tmp_path, owner(replica="r2"), disk=None, attach=taken))
    say(reader, b"three")
    assert (taken.path / "word").read_bytes() == b"one"
    late = cloud.create(spec(tmp_path, owner(replica="r3"), disk=None))
    late = cloud.attach(late, taken)
    assert cloud.attach(late, taken) == late
    assert (late.state_disk / "word").read_bytes() == b"one"
    with pytest.raises(RefusedError):
        cloud.attach(machine, taken)
    cloud.destroy(machine)
    assert cloud.snapshots("dep") == [taken]
    cloud.delete_snapshot(taken)
    cloud.delete_snapshot(taken)
    assert cloud.snapshots("dep") == []


def test_a_killed_process_is_stopped_and_starts_again_on_its_state(cloud, tmp_path):
    machine = cloud.create(spec(tmp_path))
    say(machine, b"one")
    os.kill(machine.reference["pid"], signal.SIGKILL)
    end = time.monotonic() + 10
    while cloud.find(owner()).state is not MachineState.STOPPED:
        assert time.monotonic() < end
    with pytest.raises(PermanentError, match="does not run"):
        cloud.pause(machine)
    again = cloud.start(machine)
    assert again.id != machine.id
    say(again, b"two")
    assert (again.state_disk / "word").read_bytes() == b"onetwo"


def test_a_reused_pid_is_not_taken_for_the_machine(cloud, tmp_path):
    machine = cloud.stop(cloud.create(spec(tmp_path)))
    path = machine.state_disk.parent / "owner.json"
    record = cloud._record(path)
    cloud._write(path, json.dumps({**record, "pid": os.getpid(), "start": 1}))
    assert cloud.find(owner()).state is MachineState.STOPPED
    cloud.destroy(machine)  # and we are still here


def test_a_process_whose_pid_was_never_noted_is_found_by_its_mark(cloud, tmp_path):
    machine = cloud.create(spec(tmp_path))
    path = machine.state_disk.parent / "owner.json"
    record = cloud._record(path)
    del record["pid"], record["start"]
    cloud._write(path, json.dumps(record))
    assert cloud.find(owner()).reference["pid"] == machine.reference["pid"]
    cloud.destroy(machine)
    assert _process(machine.reference["pid"]) is None


def test_the_mark_of_a_process_in_the_middle_of_execve_is_waited_for():
    for number in range(100):  # of two in five the environment is empty at once
        where = f"/nowhere/{number}"
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"], {MARK: where})
        try:
            assert f"{MARK}={where}".encode() in _environment(Path(f"/proc/{pid}"))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_destroy_leaves_nothing_and_orphans_are_what_nobody_knows(cloud, tmp_path):
    cloud.ensure_network("dep", NETWORK)
    cloud.ensure_network("dep", NETWORK)
    one, two = (cloud.create(spec(tmp_path, owner(replica=r))) for r in ("r1", "r2"))
    other = cloud.create(spec(tmp_path, owner(deployment="other")))
    found = cloud.orphans("dep", [one.owner], networks=["lisbon"])
    assert [(o.kind, o.owner) for o in found] == [(OrphanKind.MACHINE, two.owner)]
    cloud.sweep("dep", cloud.orphans("dep", []))
    assert list((cloud._home / "machines/dep").iterdir()) == []
    assert cloud.find(other.owner).state is MachineState.RUNNING
    with pytest.raises(RefusedError, match="not touched"):
        cloud.sweep("dep", cloud.orphans("other", []))
    cloud.destroy(one)


def test_a_strangers_directory_is_refused_and_kept(cloud, tmp_path):
    stranger = cloud._directory(owner())
    stranger.mkdir(parents=True)
    (stranger / "precious").write_text("x")
    with pytest.raises(RefusedError, match="does not carry"):
        cloud.create(spec(tmp_path))
    assert (stranger / "precious").exists()
    shutil.rmtree(stranger)


def test_a_creation_that_died_before_its_tags_were_in_place_is_done_again(cloud, tmp_path):
    place = cloud._directory(owner())
    place.mkdir(parents=True)
    (place / f".{'0a' * 16}.new").write_text('{"tags": ')
    assert cloud.find(owner()) is None
    machine = cloud.create(spec(tmp_path))
    assert say(machine, b"word") == b"WORD"
    assert not list(place.glob(".*.new"))


def test_it_says_loudly_that_it_isolates_nothing(cloud):
    assert cloud.facts().warning == ISOLATES_NOTHING
    assert not cloud.facts().isolated
