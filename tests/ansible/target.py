"""A Debian 12 hypervisor host to apply the collection to: systemd, sshd, libvirtd, in a QEMU machine or a container.

The disk is built once from the machine's own apt sources and kept; every run works on an overlay of it. The packages
that the role installs lie in the target's apt cache and not in its system, because the target has no way out to a
mirror. QEMU is started directly, with its user network: no bridge and no libvirtd of this host are needed.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path("/var/tmp/cloudfit-ansible-target")
BUILD_TIMEOUT_S = 1800.0  # 2 minutes on an idle machine
BOOT_TIMEOUT_S = 600.0  # 40 s on an idle machine without hardware virtualization
STOP_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 20.0  # a second or two where it works
MEMORY_MIB, CPUS, DISK_GIB = 1536, 2, 4
# What a hypervisor host has before the role comes. Certificates, because installing them runs openssl 140 times.
BASE = (
    "ca-certificates",
    "dbus", "e2fsprogs", "init", "iproute2", "kmod", "libvirt-clients", "libvirt-daemon-system",
    "linux-image-cloud-amd64", "openssh-server", "polkitd", "python3", "python3-apt", "qemu-system-x86", "udev",
)  # fmt: skip
# What it brings; the test for `defaults/main.yml` sees that none is missing here.
ROLE_PACKAGES = ("libvirt-daemon-system", "ovmf", "python3-libvirt", "python3-venv", "qemu-system-x86")
_NETWORK = """\
[Match]
Name=en* eth*
[Network]
DHCP=yes
"""
# Runs in the fresh tree ($1) as root. Whatever would slow the boot down without being tested is masked.
_CUSTOMIZE = r"""
set -eu
tree=$1
chroot "$tree" apt-get -q -y --no-install-recommends --download-only install ROLE_PACKAGES
mkdir -p "$tree/root/.ssh" "$tree/etc/systemd/network"
cp WORK/client.pub "$tree/root/.ssh/authorized_keys"
chmod 700 "$tree/root/.ssh"
cp WORK/wired.network "$tree/etc/systemd/network/"
chroot "$tree" systemctl enable systemd-networkd ssh
chroot "$tree" systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_reap.service man-db.timer \
    systemd-networkd-wait-online.service libvirt-guests.service getty@tty1.service
echo target >"$tree/etc/hostname"
echo '127.0.0.1 localhost target' >"$tree/etc/hosts"
echo '/dev/vda / ext4 defaults 0 1' >"$tree/etc/fstab"
cp "$tree"/boot/vmlinuz-* WORK/vmlinuz
cp "$tree"/boot/initrd.img-* WORK/initrd
cp "$tree/etc/ssh/ssh_host_ed25519_key.pub" WORK/host.pub
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A running target."""

    port: int
    key: Path
    known_hosts: Path
    console: Path
    sockets: Path  # directory of the connection that all of ssh share: each of its own takes seconds over there

    @property
    def ssh_options(self) -> list[str]:
        """For ssh and scp; the port is not among them, because these two spell it differently."""
        return [
            "-i", str(self.key), "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "StrictHostKeyChecking=yes",
            "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=60", "-o", "ControlMaster=auto",
            "-o", f"ControlPath={self.sockets}/%C", "-o", "ControlPersist=yes",
        ]  # fmt: skip

    def run(self, command: str, *, check: bool = True, timeout_s: float = 300.0) -> str:
        """Run a shell line as root over there; its output."""
        ssh = ["ssh", *self.ssh_options, "-p", str(self.port), "root@127.0.0.1", command]
        done = subprocess.run(ssh, capture_output=True, text=True, check=False, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{command!r}: {done.returncode}: {done.stderr}{done.stdout}"
        return done.stdout

    def copy(self, *files: Path, to: str) -> None:
        """Copy files into a directory over there."""
        scp = ["scp", *self.ssh_options, "-P", str(self.port), "-q", *map(str, files), f"root@127.0.0.1:{to}"]
        subprocess.run(scp, check=True, timeout=300)

    def hang_up(self) -> None:
        """End the shared connection, if there is one."""
        ssh = ["ssh", *self.ssh_options, "-p", str(self.port), "-O", "exit", "root@127.0.0.1"]
        subprocess.run(ssh, capture_output=True, check=False, timeout=60)


def built() -> Path:
    """The directory with disk, kernel, initrd and keys, made once a machine and recipe. Needs root."""
    recipe = repr((BASE, ROLE_PACKAGES, _CUSTOMIZE, _NETWORK, DISK_GIB, _sources()))
    place = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _build(place)
    return place


def _build(place: Path) -> None:
    missing = [name for name in ("mmdebstrap", "mkfs.ext4", "ssh-keygen") if shutil.which(name, path=_PATH) is None]
    assert not missing, f"{missing} are not installed; run: make setup, and apt-get install openssh-client"
    work = place.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / "client"], check=True)
    (work / "wired.network").write_text(_NETWORK)
    hook = work / "customize"
    hook.write_text(
        "#!/bin/sh\n" + _CUSTOMIZE.replace("ROLE_PACKAGES", " ".join(ROLE_PACKAGES)).replace("WORK", str(work))
    )
    hook.chmod(0o755)
    tree = work / "tree"
    with (work / "build.log").open("wb") as log:
        done = subprocess.run(
            [
                "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory",
                # What apt has downloaded stays: lists and packages are the target's only mirror.
                "--skip=cleanup/apt", "--aptopt=APT::Install-Recommends false",
                "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io",
                f"--include={','.join(BASE)}", f'--customize-hook={hook} "$1"', "bookworm", tree,
                *_sources(),
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=BUILD_TIMEOUT_S,
        )  # fmt: skip
    assert done.returncode == 0, f"mmdebstrap failed; see {work / 'build.log'}"
    disk = work / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_GIB << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, disk], check=True, timeout=BUILD_TIMEOUT_S)
    shutil.rmtree(tree)
    work.rename(place)


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _sources() -> list[str]:
    """The machine's own sources of Debian 12, as one-line entries."""
    columns = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CODENAME)"
    command = ["apt-get", "indextargets", "--format", columns, "Created-By: Packages", "Origin: Debian"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {tuple(line.split()) for line in done.stdout.splitlines() if len(line.split()) == 4}
    entries = sorted({f"deb {uri} {suite} {part}" for uri, suite, part, name in rows if name.startswith("bookworm")})
    assert entries, "apt knows no packages of Debian 12 on this machine; run: apt-get update"
    return entries


@contextlib.contextmanager
def running(work: Path) -> Iterator[Target]:
    """A target on a fresh overlay in the directory `work`; gone at the end.

    A machine where KVM works, else a container of systemd-nspawn, which boots the same disk at the speed of this host;
    CLOUDFIT_ANSIBLE_TARGET=machine or container decides otherwise.
    """
    place = built()
    accelerators = _accelerators(place)
    kind = os.environ.get("CLOUDFIT_ANSIBLE_TARGET") or ("machine" if "kvm" in accelerators else "container")
    assert kind in ("machine", "container"), f"CLOUDFIT_ANSIBLE_TARGET is {kind!r}: machine or container"
    port = _free_port()
    known = work / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(place / 'host.pub').read_text()}")
    with tempfile.TemporaryDirectory(prefix="cf-") as sockets:  # a socket's path may have few characters
        target = Target(port, place / "client", known, work / "console.log", Path(sockets))
        with (
            _machine(place, work, port, accelerators) if kind == "machine" else _container(place, work, port) as process
        ):
            try:
                _wait_booted(target, process)
                yield target
            finally:
                target.hang_up()


@contextlib.contextmanager
def _machine(place: Path, work: Path, port: int, accelerators: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    overlay = work / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", place / "disk.raw", overlay], check=True
    )
    command = [
        "qemu-system-x86_64", *accelerators, "-cpu", "max", "-machine", "q35", "-nodefaults", "-display", "none",
        "-m", str(MEMORY_MIB), "-smp", str(CPUS), "-serial", "stdio",
        "-kernel", place / "vmlinuz", "-initrd", place / "initrd",
        "-append", "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 random.trust_cpu=on mitigations=off",
        "-drive", f"file={overlay},if=virtio,cache=unsafe",
        "-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22", "-device", "virtio-net-pci,netdev=n",
        "-device", "virtio-rng-pci",
    ]  # fmt: skip
    with _started(command, work) as process:
        yield process


@contextlib.contextmanager
def _container(place: Path, work: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Its mounts are in a name space of its own, and go with it; its network has no way out but the forwarded port."""
    hint = "systemd-nspawn is not installed; run: apt-get install systemd-container, or CLOUDFIT_ANSIBLE_TARGET=machine"
    assert shutil.which("systemd-nspawn", path=_PATH) is not None, hint
    name = f"cloudfit-{port}"
    for part in ("below", "above", "scratch", "root"):
        (work / part).mkdir()
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-ec",
        _CONTAINER,
        name,
        place / "disk.raw",
        work,
    ]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_started(command, work))
        init = _child(process)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", port)))
        forward = ["nsenter", "--target", str(init), "--net", sys.executable, "-c", _FORWARD, str(listener.fileno())]
        forwarder = subprocess.Popen(forward, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
        stack.callback(_stop, forwarder)
        yield process


# $0: name, $1: disk, $2: directory for the overlay.
_CONTAINER = """
cd "$2"
mount -o loop,ro,noload "$1" below
mount -t overlay -o lowerdir=below,upperdir=above,workdir=scratch overlay root
: >root/etc/fstab
echo 'cgroup_controllers = []' >>root/etc/libvirt/qemu.conf  # a container may make none of them
exec systemd-nspawn --quiet --register=no --keep-unit --boot --private-network --machine="$0" --directory=root
"""
# In the container's network: hands the listening socket's connections, which is this host's, on to its sshd.
_FORWARD = """
import socket, sys, threading
def copy(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        a.close()
        b.close()
with socket.socket(fileno=int(sys.argv[1])) as listener:
    while True:
        near = listener.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", 22))
        except OSError:
            near.close()
            continue
        for pair in ((near, far), (far, near)):
            threading.Thread(target=copy, args=pair, daemon=True).start()
"""


@contextlib.contextmanager
def _started(command: list[Any], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (work / "console.log").open("wb") as console:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


def _child(process: subprocess.Popen[bytes]) -> int:
    """The first process of the container that `process` has become, or is about to."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while True:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                return int(child)
        assert process.poll() is None, "the container ended; see console.log"
        assert time.monotonic() < deadline, "the container has no init"
        time.sleep(0.2)


def _accelerators(place: Path) -> list[str]:
    """QEMU's options: KVM if the target's kernel ends by it as it must without an init; /dev/kvm says little."""
    probe = [
        "qemu-system-x86_64", "-accel", "kvm", "-cpu", "max", "-machine", "q35", "-nodefaults", "-display", "none",
        "-m", "512", "-kernel", place / "vmlinuz", "-append", "panic=-1", "-no-reboot",
    ]  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run(probe, capture_output=True, check=False, timeout=PROBE_TIMEOUT_S).returncode == 0:
            return ["-accel", "kvm"]
    return ["-accel", "tcg,thread=multi"]


def _wait_booted(target: Target, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while True:
        assert process.poll() is None, f"the target ended: {target.console.read_text(errors='replace')[-2000:]}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            state = target.run("systemctl is-system-running", check=False, timeout_s=90.0).strip()
            if state in ("running", "degraded"):
                return
        assert time.monotonic() < deadline, f"the target has not booted after {BOOT_TIMEOUT_S:.0f} s: {target.console}"
        time.sleep(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
