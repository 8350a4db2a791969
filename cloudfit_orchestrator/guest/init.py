"""First process of the root: mounts, the state disk, then the entry module, kept running.

Loads nothing and needs no tools: mount(2) and reboot(2) through the C library. A machine that cannot get as far as its
entry says why on the console and powers off. A child that dies is started again after a bounded, growing delay: a
replica that is killed comes back within its epoch (protocol §2). There is no other supervisor and no shell.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

SETTINGS = Path("/etc/cloudfit")
STATE_DISK = Path("/dev/vdb")
STATE = Path("/state")
STATE_ERROR = Path("/run/cloudfit/state-error")  # why an optional state disk is not mounted; the entry reports it
DEVICE_TIMEOUT_S = 10.0  # the disk is found before the root is; a slow host is given this much more
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0  # a replica that always crashes costs one start in this time
STEADY_S = 60.0  # after a run of this length the next delay is the first again

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_RB_POWER_OFF = 0x4321FEDC
_UEVENTS = 15  # NETLINK_KOBJECT_UEVENT
_SAFE = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC


@dataclass(frozen=True, slots=True)
class Mount:
    """One call of mount(2)."""

    source: str
    target: Path
    kind: str
    flags: int
    options: str = ""


MOUNTS = (
    Mount("proc", Path("/proc"), "proc", _SAFE),
    Mount("sysfs", Path("/sys"), "sysfs", _SAFE),
    Mount("devtmpfs", Path("/dev"), "devtmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=0755"),
    Mount("tmpfs", Path("/run"), "tmpfs", _SAFE, "mode=0755,size=16m"),
    Mount("tmpfs", Path("/tmp"), "tmpfs", _SAFE, "mode=1777,size=64m"),  # noqa: S108 - the mount point itself
)
STATE_MOUNT = Mount(str(STATE_DISK), STATE, "ext4", _SAFE | _MS_NOATIME, "errors=remount-ro")


def say(text: str) -> None:
    """One line on the console."""
    print(f"cloudfit: {text}", flush=True)


def mount(what: Mount) -> None:
    """One mount. Raises OSError naming the target."""
    libc = ctypes.CDLL(None, use_errno=True)
    strings = (what.source.encode(), os.fsencode(what.target), what.kind.encode())
    if libc.mount(*strings, ctypes.c_ulong(what.flags), what.options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{what.source} ({what.kind}) on {what.target}")


def power_off(reason: str) -> NoReturn:
    """Say why, write out what is left and end the machine."""
    say(f"init: {reason}; powering off")
    os.sync()
    ctypes.CDLL(None).reboot(_RB_POWER_OFF)
    sys.exit(1)  # only where this is not a machine


def wait_for_device(path: Path, timeout_s: float) -> bool:
    """True as soon as `path` exists: the kernel announces each device after it has made its node."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _UEVENTS) as events:
        events.bind((0, 1))  # before the first look, so that no announcement is missed
        while not path.exists():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([events], [], [], left)[0]:
                return path.exists()
            events.recv(8192)
    return True


def mount_state(*, required: bool) -> None:
    """Mount the state disk; without one power off, or leave the reason in STATE_ERROR if it is optional."""
    try:
        if not wait_for_device(STATE_DISK, DEVICE_TIMEOUT_S):
            raise FileNotFoundError(f"no disk {STATE_DISK} within {DEVICE_TIMEOUT_S:g} s")
        mount(STATE_MOUNT)
    except OSError as error:
        if required:
            power_off(f"state disk: {error}")
        say(f"init: state disk: {error}")
        STATE_ERROR.write_text(str(error))


def next_delay(delay_s: float, ran_s: float) -> float:
    """The delay before the next start, after a run of `ran_s` that was itself started after `delay_s`."""
    return FIRST_DELAY_S if ran_s >= STEADY_S else min(max(delay_s * 2, FIRST_DELAY_S), LONGEST_DELAY_S)


def supervise(start: Callable[[], int], *, rounds: int | None = None) -> None:
    """Start the child and start it again whenever it ends, reaping whatever else ends; for ever, or `rounds` times."""
    delay_s = 0.0
    while rounds is None or rounds > 0:
        began = time.monotonic()
        child = start()
        pid, status = os.wait()
        while pid != child:  # an orphan that init inherited
            pid, status = os.wait()
        delay_s = next_delay(delay_s, time.monotonic() - began)
        code = os.waitstatus_to_exitcode(status)
        what = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        say(f"init: entry {what}; next start in {delay_s:g} s")
        rounds = None if rounds is None else rounds - 1
        time.sleep(delay_s)  # the back-off itself: nothing is waited for


def start_entry(entry: str) -> int:
    """Start `python3 -I -m entry`; its process id."""
    environment = {"PATH": "/usr/bin", "HOME": "/", "LANG": "C.UTF-8"}
    arguments = [sys.executable, "-I", "-m", entry]
    return os.posix_spawn(sys.executable, arguments, environment, setsigdef=signal.valid_signals())


def main() -> NoReturn:
    """Run as process 1."""
    say(f"init {time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000}")
    try:
        for each in MOUNTS:
            mount(each)
        STATE_ERROR.parent.mkdir()
        entry = (SETTINGS / "entry").read_text().strip()
        required = (SETTINGS / "state").read_text().strip() == "required"
    except OSError as error:
        power_off(str(error))
    mount_state(required=required)
    supervise(lambda: start_entry(entry))
    power_off("supervision ended")
