"""A guest that boots in two seconds: Debian's cloud kernel, busybox, and a shell that listens on the wormhole's port.

It stands in for a real image where only the driver is under test: `GuestShell.run` executes a line in the guest.
"""

import fcntl
import hashlib
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.image import Manifest, Part, Role

CACHE = Path("/var/tmp/cloudfit-tiny-guest")
BOOT_TIMEOUT_S = 120.0  # 2 s on an idle machine; tests share two cores
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console")
END = "--end-of-answer-"
INIT = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /state /run
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules.order); do insmod /modules/$m; done
while [ -z "$port" ]; do
  for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name 2>/dev/null)" = "{PORT_NAME}" ] && port=/dev/${{p##*/}}; done
done
exec 3<>$port
while true; do
  while read -r line <&3; do
    ( eval "$line" ) >/run/out 2>&1 </dev/null; code=$?
    cat /run/out >&3; echo "{END}$code" >&3
  done
  usleep 20000
done
"""


def _kernel_package() -> str:
    text = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"], check=True, capture_output=True, text=True
    ).stdout
    return next(
        word
        for line in text.splitlines()
        for word in line.split()
        if word.startswith("linux-image-") and word != "linux-image-cloud-amd64"
    )


def extract_package(package: str, work: Path, tree: Path) -> None:
    """Lay Debian's `package` into `tree`, from apt's archives if it is there, else downloaded to `work`."""
    cached = sorted(Path("/var/cache/apt/archives").glob(f"{package}_*.deb"))
    if not cached:
        subprocess.run(["apt-get", "download", "-q", package], check=True, cwd=work, capture_output=True)
        cached = sorted(work.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg", "-x", str(cached[-1]), str(tree)], check=True)


def _order(modules: Path) -> list[Path]:
    """Files of MODULES with what they need, dependencies first."""
    by_name = {p.stem: p for p in modules.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        needs = subprocess.run(
            ["modinfo", "-F", "depends", str(by_name[name])], check=True, capture_output=True, text=True
        ).stdout.strip()
        for need in filter(None, needs.split(",")):
            if need in by_name:
                add(need)
        if by_name[name] not in order:
            order.append(by_name[name])

    for name in MODULES:
        add(name)
    return order


def _build(target: Path, init: str) -> None:
    work = target.with_suffix(".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tree, root = work / "tree", work / "root"
    extract_package(_kernel_package(), work, tree)
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    order = _order(tree / "lib/modules")
    for module in order:
        shutil.copy(module, root / "modules")
    (root / "modules.order").write_text("\n".join(m.name for m in order))
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    names = "\n".join(["."] + [str(p.relative_to(root)) for p in sorted(root.rglob("*"))])
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=root, check=True, capture_output=True
    ).stdout
    (work / "initramfs").write_bytes(packed)
    shutil.copy(next((tree / "boot").glob("vmlinuz-*")), work / "vmlinuz")
    (work / "root.img").write_bytes(b"tiny root".ljust(1 << 20, b"\0"))
    for name in ("vmlinuz", "initramfs", "root.img"):
        (work / name).chmod(0o644)
    shutil.rmtree(tree)
    shutil.rmtree(root)
    work.rename(target)


def tiny_image(init: str = INIT) -> Path:
    """The image directory, built once a machine and `init` script; safe under parallel tests."""
    target = CACHE / hashlib.sha256(init.encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    CACHE.chmod(CACHE.stat().st_mode | stat.S_IXOTH)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(target, init)
    return target


def tiny_manifest(image: Path) -> Manifest:
    """An unsigned manifest over the image's files."""

    def part(name: str, file: str) -> Part:
        data = (image / file).read_bytes()
        return Part(name, file, 0, len(data), hashlib.sha256(data).hexdigest())

    return Manifest(
        name="tiny",
        role=Role.REPLICA,
        adversary=False,
        command_line="console=ttyS0 quiet panic=-1 random.trust_cpu=on",
        verity_root="",
        parts=(part("kernel", "vmlinuz"), part("initramfs", "initramfs"), part("root", "root.img")),
        packages=(),
        lineage="test",
    )


class GuestShell:
    """The guest's shell at the far end of the channel."""

    def __init__(self, channel: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(channel))
        self._rest = b""

    def run(self, line: str, timeout_s: float = BOOT_TIMEOUT_S) -> tuple[int, str]:
        """Exit code and output of `line`. The first call waits for the guest to boot."""
        self._socket.sendall(line.encode() + b"\n")
        deadline = time.monotonic() + timeout_s
        while END.encode() not in self._rest or b"\n" not in self._rest.split(END.encode(), 1)[1]:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = self._socket.recv(65536)
            assert data, "the guest closed its channel"
            self._rest += data
        answer, rest = self._rest.split(END.encode(), 1)
        code, self._rest = rest.split(b"\n", 1)
        return int(code), answer.decode()

    def check(self, line: str, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """Output of a line that must succeed."""
        code, output = self.run(line, timeout_s)
        assert code == 0, f"{line!r} failed in the guest with {code}: {output}"
        return output

    def close(self) -> None:
        self._socket.close()
