"""First process of the root: mounts, the state disk, then the entry module, kept running.

Loads nothing and needs no tools: mount(2) and reboot(2) through the C library. A machine that cannot get as far as its
entry says why on the console and powers off. A child that dies is started again after a bounded, growing delay: a
replica that is killed comes back within its epoch (protocol §2). There is no other supervisor and no shell.

Where nobody has a hold on the host (`trust: none`) there is a config drive, and with it a second child: the agent that
elsewhere runs on the host. The two are kept running alike.

Every module imported here delays the start of the machine (an emulated one needs 0.1 s for `pathlib` alone), hence
plain tuples and `os.path`.
"""

import ctypes
import os
import sys
import time

TYPE_CHECKING = False  # what type checkers take for true, without the cost of `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

SETTINGS = "/etc/cloudfit"
STATE_DISK = "/dev/vdb"
STATE_BEHIND_ROOT = "/dev/dm-1"  # the initramfs makes it where the first disk holds a state
STATE = "/state"
STATE_ERROR = "/run/cloudfit/state-error"  # why an optional state disk is not mounted; the entry reports it
DEVICE_TIMEOUT_S = 10.0  # the disk is found before the root is; a slow host is given this much more
AGENT = "cloudfit_orchestrator.wormhole.inside"
CHANNEL = "/run/cloudfit/channel"  # where the entry listens for an agent in the same machine
DRIVE = "/run/cloudfit/drive"  # a config drive, mounted
# As in `model.drive`, which would import too much here; a test compares them.
DRIVE_LABEL, DRIVE_FILE, DRIVE_MAGIC = "config-2", "openstack/latest/user_data", b'{"cloudfit_drive": 1,'
_ISO_VOLUME = 16 * 2048  # ECMA-119 §8.4: the primary volume descriptor; its identifier is at 40, 32 bytes
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0  # a replica that always crashes costs one start in this time
STEADY_S = 60.0  # after a run of this length the next delay is the first again

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 1, 2, 4, 8, 1024
_SAFE = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_RB_POWER_OFF = 0x4321FEDC
_NETLINK_KOBJECT_UEVENT = 15
# source, target, file system, flags, options
MOUNTS = (
    ("proc", "/proc", "proc", _SAFE, ""),
    ("sysfs", "/sys", "sysfs", _SAFE, ""),
    ("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=0755"),
    ("tmpfs", "/run", "tmpfs", _SAFE, "mode=0755,size=16m"),
    ("tmpfs", "/tmp", "tmpfs", _SAFE, "mode=1777,size=64m"),  # noqa: S108 - the mount point itself
)
STATE_MOUNT = (STATE, "ext4", _SAFE | _MS_NOATIME, "errors=remount-ro")  # without its source


def say(text: str) -> None:
    """One line on the console."""
    print(f"cloudfit: {text}", flush=True)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """One mount. Raises OSError naming the target."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{source} ({kind}) on {target}")


def power_off(reason: str) -> "NoReturn":
    """Say why, write out what is left and end the machine."""
    say(f"init: {reason}; powering off")
    os.sync()
    if os.getpid() == 1:  # never the machine of somebody who only imports this
        ctypes.CDLL(None).reboot(_RB_POWER_OFF)
    sys.exit(1)


def wait_for_device(path: str, timeout_s: float) -> bool:
    """True as soon as `path` exists: the kernel announces each device after it has made its node."""
    if os.path.exists(path):  # noqa: PTH110 - see the module's head
        return True
    import select  # noqa: PLC0415 - needed only where the disk comes late
    import socket  # noqa: PLC0415

    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, 1))  # before the next look, so that no announcement is missed
        while not os.path.exists(path):  # noqa: PTH110
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([events], [], [], left)[0]:
                return os.path.exists(path)  # noqa: PTH110
            events.recv(8192)
    return True


def mount_state(*, required: bool) -> None:
    """Mount the state disk; without one power off, or leave the reason in STATE_ERROR if it is optional."""
    disk = STATE_BEHIND_ROOT if os.path.exists(STATE_BEHIND_ROOT) else STATE_DISK  # noqa: PTH110
    try:
        if not wait_for_device(disk, DEVICE_TIMEOUT_S):
            raise FileNotFoundError(f"no disk {disk} within {DEVICE_TIMEOUT_S:g} s")
        mount(disk, *STATE_MOUNT)
    except OSError as error:
        if required:
            power_off(f"state disk: {error}")
        say(f"init: state disk: {error}")
        with open(STATE_ERROR, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(str(error))


def find_drive(devices: str = "/dev", blocks: str = "/sys/block") -> str | None:
    """The device of a config drive, by its label; None if there is none."""
    for name in sorted(os.listdir(blocks)):  # noqa: PTH208
        if name.startswith(("vda", "vdb", "dm-", "loop", "ram")):
            continue
        try:
            with open(f"{devices}/{name}", "rb") as disk:  # noqa: PTH123
                disk.seek(_ISO_VOLUME)
                volume = disk.read(72)
        except OSError:  # an empty CD-ROM drive, or one that is not ready
            continue
        if volume[1:6] == b"CD001" and volume[40:72].decode("ascii", "replace").rstrip(" ") == DRIVE_LABEL:
            return f"{devices}/{name}"
    return None


def mount_drive() -> str | None:
    """The file of a config drive that is meant for us, mounted; None if there is no such drive."""
    device = find_drive()
    if device is None and os.path.isdir("/sys/class/scsi_host") and os.listdir("/sys/class/scsi_host"):  # noqa: PTH112, PTH208
        wait_for_device("/dev/sr0", DEVICE_TIMEOUT_S)  # SCSI disks are found beside everything else
        device = find_drive()
    if device is None:
        return None
    path = f"{DRIVE}/{DRIVE_FILE}"
    try:
        os.mkdir(DRIVE, 0o700)  # noqa: PTH102
        mount(device, DRIVE, "iso9660", _SAFE | _MS_RDONLY, "")
        with open(path, "rb") as file:  # noqa: PTH123
            mine = file.read(len(DRIVE_MAGIC)) == DRIVE_MAGIC
    except OSError as error:
        say(f"init: config drive {device}: {error}")
        return None
    return path if mine else None


def next_delay(delay_s: float, ran_s: float) -> float:
    """The delay before the next start, after a run of `ran_s` that was itself started after `delay_s`."""
    return FIRST_DELAY_S if ran_s >= STEADY_S else min(max(delay_s * 2, FIRST_DELAY_S), LONGEST_DELAY_S)


def supervise(*programs: "Callable[[], int]", rounds: int | None = None) -> None:
    """Start the children, and each again whenever it ends, reaping whatever else ends; for ever, or `rounds` times."""
    delays = [0.0] * len(programs)
    began = [0.0] * len(programs)
    children: dict[int, int] = {}

    def begin(number: int) -> None:
        began[number] = time.monotonic()
        children[programs[number]()] = number

    for number in range(len(programs)):
        begin(number)
    while rounds is None or rounds > 0:
        pid, status = os.wait()
        ended = children.pop(pid, None)
        if ended is None:
            continue  # an orphan that init inherited
        delays[ended] = next_delay(delays[ended], time.monotonic() - began[ended])
        code = os.waitstatus_to_exitcode(status)
        what = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        name = "entry" if ended == 0 else "agent"
        say(f"init: {name} {what}; next start in {delays[ended]:g} s")
        rounds = None if rounds is None else rounds - 1
        time.sleep(delays[ended])  # the back-off itself: nothing is waited for
        if rounds is None or rounds > 0:
            begin(ended)


def start_module(module: str, *arguments: str) -> int:
    """Start `python3 -I -m module`; its process id."""
    environment = {"PATH": "/usr/bin", "HOME": "/", "LANG": "C.UTF-8"}
    return os.posix_spawn(sys.executable, [sys.executable, "-I", "-m", module, *arguments], environment)


def setting(name: str) -> str:
    """One of the image's own settings."""
    with open(f"{SETTINGS}/{name}", encoding="utf-8") as file:  # noqa: PTH123
        return file.read().strip()


def main() -> "NoReturn":
    """Run as process 1."""
    say(f"init {time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000}")
    try:
        for each in MOUNTS:
            mount(*each)
        os.mkdir(os.path.dirname(STATE_ERROR))  # noqa: PTH102, PTH120
        entry, state = setting("entry"), setting("state")
    except OSError as error:
        power_off(str(error))
    mount_state(required=state == "required")
    drive = mount_drive()
    if drive is None:
        supervise(lambda: start_module(entry))
    else:
        supervise(
            lambda: start_module(entry, "--channel", CHANNEL, "--own-network"),
            lambda: start_module(AGENT, "--drive", drive, "--channel", CHANNEL, "--state", STATE),
        )
    power_off("supervision ended")
