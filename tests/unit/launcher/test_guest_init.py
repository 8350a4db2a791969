"""The guest's init, as far as it can be run where it is not process 1 (booted for real in tests/vm)."""

import os
import sys
import time

import pytest

from cloudfit_orchestrator.guest import init


def spawn(program: str) -> int:
    return os.posix_spawn(sys.executable, [sys.executable, "-c", program], dict(os.environ))


def test_the_delay_grows_to_its_bound_and_shrinks_after_a_steady_run():
    delays, delay = [], 0.0
    for _ in range(9):
        delay = init.next_delay(delay, ran_s=0.01)
        delays.append(delay)
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == init.LONGEST_DELAY_S
    assert init.next_delay(delay, ran_s=init.STEADY_S) == init.FIRST_DELAY_S


def test_a_child_that_dies_is_started_again(capfd):
    programs = iter(["import os; os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
    init.supervise(lambda: spawn(next(programs)), rounds=2)
    said = capfd.readouterr().out.splitlines()
    assert said == [
        "cloudfit: init: entry was killed by signal 9; next start in 0.1 s",
        "cloudfit: init: entry ended with code 3; next start in 0.2 s",
    ]


def test_orphans_are_reaped_without_a_restart():
    starts = []

    def start() -> int:
        starts.append(spawn("pass"))  # what init inherited
        return spawn("import time; time.sleep(0.5)")

    init.supervise(start, rounds=1)
    assert len(starts) == 1
    with pytest.raises(ChildProcessError):
        os.waitpid(starts[0], 0)


def test_a_device_that_never_comes_is_given_up_after_its_time():
    began = time.monotonic()
    assert not init.wait_for_device("/nowhere/device", 0.2)
    assert time.monotonic() - began >= 0.2
    assert init.wait_for_device("/dev/null", 0)


def test_an_optional_state_disk_leaves_its_reason(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(init, "DEVICE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(init, "STATE_DISK", str(tmp_path / "none"))
    monkeypatch.setattr(init, "STATE_ERROR", str(tmp_path / "reason"))
    init.mount_state(required=False)
    assert (tmp_path / "reason").read_text().startswith("no disk")
    with pytest.raises(SystemExit):
        init.mount_state(required=True)
    assert "powering off" in capfd.readouterr().out


@pytest.mark.parametrize("behind_root", [True, False])
def test_the_state_behind_the_root_is_taken_where_the_initramfs_found_one(monkeypatch, tmp_path, behind_root):
    mounted = []
    one, two = tmp_path / "dm-1", tmp_path / "vdb"
    two.touch()
    if behind_root:
        one.touch()
    monkeypatch.setattr(init, "STATE_BEHIND_ROOT", str(one))
    monkeypatch.setattr(init, "STATE_DISK", str(two))
    monkeypatch.setattr(init, "mount", lambda *how: mounted.append(how[:3]))
    init.mount_state(required=True)
    assert mounted == [(str(one if behind_root else two), "/state", "ext4")]
