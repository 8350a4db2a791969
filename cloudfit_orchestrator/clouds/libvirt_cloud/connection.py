"""The connection to a libvirt daemon, and libvirt's error codes in our words."""

import errno
import grp
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import libvirt

from cloudfit_orchestrator.model.errors import CloudfitError, PermanentError, TemporaryError

DAEMON_START_TIMEOUT_S = 20.0  # libvirtd answers in under 1 s here; its first start probes every QEMU binary
RETRY_AFTER_S = 2.0
_RUN = Path("/run/libvirt")
_KVM, _ROOT_ONLY = Path("/dev/kvm"), 0o600
_DNSMASQ = Path("/var/lib/libvirt/dnsmasq")
_DAEMONS = (("virtlogd", "virtlogd-sock"), ("libvirtd", "libvirt-sock"))  # in the order in which they must start
_TEMPORARY = frozenset(
    {
        libvirt.VIR_ERR_OPERATION_TIMEOUT,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_RESOURCE_BUSY,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_OPERATION_ABORTED,
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
        libvirt.VIR_ERR_SYSTEM_ERROR,
    }
)
_FULL = ("No space left on device", os.strerror(errno.EDQUOT))
NOT_FOUND = frozenset(
    {
        libvirt.VIR_ERR_NO_DOMAIN,
        libvirt.VIR_ERR_NO_NETWORK,
        libvirt.VIR_ERR_NO_STORAGE_POOL,
        libvirt.VIR_ERR_NO_STORAGE_VOL,
    }
)


def _silent(_context: object, _error: object) -> None:
    """By itself libvirt prints every error to stderr unless told otherwise; ours travel as exceptions."""


libvirt.registerErrorHandler(_silent, None)


def translate(error: libvirt.libvirtError, tried: str) -> CloudfitError:
    """`error` as TemporaryError or PermanentError. `tried` names the action and its object."""
    code, text = error.get_error_code(), error.get_error_message() or str(error)
    fact = f"{tried}: libvirt says {text!r} (code {code})"
    if any(full in text for full in _FULL):
        return PermanentError(fact, next_command="free space on the host's disk, then repeat")
    if code in _TEMPORARY or "client socket is closed" in text:
        return TemporaryError(fact, next_command="cloudfit doctor", retry_after_s=RETRY_AFTER_S)
    return PermanentError(fact, next_command="cloudfit doctor")


@contextmanager
def trying(tried: str) -> Iterator[None]:
    """Run libvirt calls; their errors leave translated, with `tried` as what was tried on which object."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, tried) from error


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _init_runs() -> bool:
    return Path("/run/systemd/system").is_dir()


def ensure_daemons(run: Path = _RUN) -> None:
    """See to it that `qemu:///system` can be reached: start virtlogd and libvirtd where no init system does.

    Nothing is done if they answer. PermanentError with the next command if they do not and cannot be started here.
    """
    if os.geteuid() == 0 and not _init_runs():
        _prepare_host()
    if all(_answers(run / name) for _, name in _DAEMONS):
        return
    tried = f"reach libvirtd at {run / 'libvirt-sock'}"
    if _init_runs():
        if _answers(run / "libvirt-sock"):  # socket activation starts virtlogd when it is needed
            return
        raise PermanentError(f"{tried}: nobody answers", next_command="systemctl start libvirtd.socket")
    missing = [daemon for daemon, _ in _DAEMONS if shutil.which(daemon, path="/usr/sbin:/usr/bin:/sbin") is None]
    if missing:
        raise PermanentError(
            f"{tried}: {' and '.join(missing)} not installed",
            next_command="apt-get install libvirt-daemon-system qemu-system-x86 qemu-utils",
        )
    if os.geteuid() != 0:
        raise PermanentError(
            f"{tried}: nobody answers, and only root can start it", next_command="sudo sh -c 'virtlogd -d; libvirtd -d'"
        )
    for daemon, name in _DAEMONS:
        _start(daemon, run / name)


def _prepare_host() -> None:
    """Do what udev and the package's units would have done before libvirtd starts."""
    # With a root-only /dev/kvm libvirtd finds KVM while it probes and misses it right after, takes every cached
    # capability for stale and probes QEMU anew in each call: seconds instead of milliseconds.
    if _KVM.exists() and stat.S_IMODE(_KVM.stat().st_mode) == _ROOT_ONLY:
        try:
            group = grp.getgrnam("kvm").gr_gid
        except KeyError:
            return
        os.chown(_KVM, 0, group)
        _KVM.chmod(0o660)
    # Made by libvirtd only together with its first dnsmasq; the bridges of networks without one need it too.
    if _DNSMASQ.parent.is_dir():
        _DNSMASQ.mkdir(exist_ok=True)


def _start(daemon: str, path: Path) -> None:
    if _answers(path):
        return
    # Another process may start it at the same moment: the loser's exit code says "pidfile", so only the socket counts.
    done = subprocess.run(
        [shutil.which(daemon, path="/usr/sbin:/usr/bin:/sbin") or daemon, "-d"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=DAEMON_START_TIMEOUT_S,
    )  # fmt: skip
    deadline = time.monotonic() + DAEMON_START_TIMEOUT_S
    while not _answers(path):
        if time.monotonic() > deadline:
            raise PermanentError(
                f"started {daemon} -d (exit code {done.returncode}: {done.stderr.strip()[-300:]!r}), but nobody "
                f"answers at {path} after {DAEMON_START_TIMEOUT_S:.0f} s",
                next_command=f"{daemon} -v",
            )
        time.sleep(0.05)


def connect(uri: str) -> Any:
    """A new connection. PermanentError if the local daemon is down, TemporaryError if a remote host is unreachable."""
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        text = error.get_error_message() or str(error)
        host = urlsplit(uri).hostname
        if host:
            raise TemporaryError(
                f"connect to {uri}: {text}", next_command=f"virsh -c '{uri}' version", retry_after_s=RETRY_AFTER_S
            ) from error
        start = "systemctl start libvirtd.socket" if _init_runs() else "sudo sh -c 'virtlogd -d; libvirtd -d'"
        raise PermanentError(f"connect to {uri}: libvirtd does not answer: {text}", next_command=start) from error


class Connection:
    """A connection that is opened when first needed and again when it was lost. Any thread may use it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._open: Any = None
        self._closed = False

    @property
    def remote(self) -> bool:
        """Whether the daemon's files are on another host."""
        return bool(urlsplit(self.uri).hostname)

    @property
    def system(self) -> bool:
        """Whether it is the host's own daemon, which runs machines as another user."""
        return urlsplit(self.uri).path == "/system"

    @property
    def local_uri(self) -> str:
        """The same daemon, as named on its own host."""
        parts = urlsplit(self.uri)
        return f"{parts.scheme.partition('+')[0]}://{parts.path}"

    def get(self) -> Any:
        """The virConnect. Errors as of `connect`."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"connection to {self.uri} is closed")
            if self._open is not None and not self._alive():
                self._open = None
            if self._open is None:
                self._open = connect(self.uri)
            return self._open

    def _alive(self) -> bool:
        try:
            return bool(self._open.isAlive())
        except libvirt.libvirtError:
            return False

    def close(self) -> None:
        """Let go. Repetition is no error."""
        with self._lock:
            self._closed = True
            if self._open is not None:
                self._open.close()
                self._open = None
