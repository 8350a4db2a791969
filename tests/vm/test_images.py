"""Real images, really booted: what an init and an entry see, what the root does not hold, what verity catches.

The images are built once a session (or reused from the directory in CLOUDFIT_TEST_IMAGES).
"""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.guest import init
from cloudfit_orchestrator.launcher import verity
from cloudfit_orchestrator.launcher.build import build_image
from cloudfit_orchestrator.launcher.recipe import RECIPES
from cloudfit_orchestrator.launcher.sil import list_images, verify_image
from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.model.errors import BadError, PermanentError
from cloudfit_orchestrator.model.signing import public_bytes

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

KEY = Ed25519PrivateKey.from_private_bytes(b"i" * 32)
TRUSTED = [public_bytes(KEY)]
BOOT_TIMEOUT_S = 120  # power-on to the probe's last word takes 5 s on a quiet machine without acceleration
MAX_ROOT_BYTES = 90_000_000

PROBE = """
import os, signal, time
if not os.path.exists("/run/probe"):
    open("/run/probe", "w").close()
    print("probe: first run", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
print("probe: second run", flush=True)
import errno, socket, ssl, sys, threading
import cryptography.x509, msgspec
from cloudfit_orchestrator.guest import network
print("probe: cwd", os.getcwd(), "isolated", sys.flags.isolated, "parent", os.getppid(), flush=True)
try:
    open("/etc/probe", "w")
except OSError as error:
    print("probe: root", errno.errorcode[error.errno], flush=True)
reason = "/run/cloudfit/state-error"
state = "error " + open(reason).read() if os.path.exists(reason) else "mounted"
print("probe: state", state, flush=True)
if state == "mounted":
    with open("/state/boots", "a") as file:
        file.write("x")
        file.flush()
        os.fsync(file.fileno())
    print("probe: boots", os.path.getsize("/state/boots"), flush=True)
network.up("lo")
for _ in range(2):
    network.configure("eth0", "10.0.2.15", 24, "10.0.2.2")
with socket.create_connection(("10.0.2.100", 7), timeout=20) as connection:
    connection.sendall(b"ping")
    print("probe: echo", connection.recv(4).decode(), flush=True)
with open("/proc/net/route") as routes:
    print("probe: gateway", [f.split()[2] for f in routes if f.split()[1] == "00000000"], flush=True)
for bad in (("nosuch0", "10.0.0.1", 24, None), ("eth0", "10.0.0.1", 24, "192.0.2.1")):
    try:
        network.configure(*bad)
    except OSError as error:
        print("probe: refused", bad[0], errno.errorcode[error.errno], flush=True)
print("probe: ports", sorted(os.path.basename(p) for p in os.listdir("/sys/class/virtio-ports")), flush=True)
print("probe: done", flush=True)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Images:
    store: Path
    recipe: Path
    probe: Path


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Images:
    """An image whose entry is the probe above, in a store that all workers share (the store has a lock)."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    store = Path(os.environ.get("CLOUDFIT_TEST_IMAGES", shared / "images"))
    recipe = tmp_path_factory.mktemp("recipe")
    site = recipe / "overlay/usr/lib/python3/dist-packages"
    site.mkdir(parents=True)
    (site / "boot_probe.py").write_text(
        "def main():\n" + re.sub("(?m)^", "    ", PROBE) + "\nif __name__ == '__main__':\n    main()\n"
    )
    (recipe / "recipe.toml").write_text(
        f'name = "probe"\nbase = "{RECIPES / "base.toml"}"\nrole = "recovery"\nadversary = false\n'
        'entry = "boot_probe"\nstate_disk = "optional"\nrooms = ["model"]\noverlay = "overlay"\n'
        'files = ["guest/__init__.py", "guest/init.py", "guest/network.py"]\n'
    )
    return Images(store, recipe, build_image(recipe, store, KEY, print).directory)


def command_line(image: Path) -> str:
    payload = json.loads((image / "manifest.json").read_bytes())["payload"]
    return json.loads(base64.b64decode(payload))["predicate"]["command_line"]


def boot(image: Path, console: Path, *, until: str, state: Path | None = None, append: str | None = None) -> str:
    """Boot `image` as it is, without the SIL, until the console shows `until` or the machine ends; the console."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-cpu", "max", "-m", "256", "-nodefaults",
        "-display", "none", "-no-reboot", "-serial", f"file:{console}",
        "-kernel", image / "vmlinuz", "-initrd", image / "initramfs", "-append", append or command_line(image),
        "-drive", f"file={image / 'root.img'},format=raw,if=virtio,readonly=on",
        "-netdev", "user,id=n,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat", "-device", "virtio-net-pci,netdev=n",
        "-device", "virtio-serial-pci", "-chardev", "null,id=c",
        "-device", "virtserialport,chardev=c,name=org.cloudfit.wormhole.0",
    ]  # fmt: skip
    if state is not None:
        command += ["-drive", f"file={state},format=raw,if=virtio"]
    console.touch()
    with subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL) as machine:
        try:
            deadline = time.monotonic() + BOOT_TIMEOUT_S
            while time.monotonic() < deadline and machine.poll() is None and until not in read(console):
                time.sleep(0.05)  # a file offers nothing to wait on
        finally:
            machine.kill()
    return read(console)


def read(console: Path) -> str:
    return console.read_text(errors="replace").replace("\r", "")


def make_state(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-F", path)
    return path


def test_an_image_boots_into_its_entry_and_restarts_it(images, tmp_path):
    state = make_state(tmp_path / "state")
    for boots in (1, 2):
        text = boot(images.probe, tmp_path / f"console{boots}", until="probe: done", state=state)
        assert "probe: done" in text, text
        said = dict(re.findall(r"^probe: (\w+) (.*)$", text, re.MULTILINE))
        since_boot_ms = int(re.search(r"^cloudfit: init (\d+)$", text, re.MULTILINE)[1])
        print(f"init {since_boot_ms} ms after the kernel's start")
        assert since_boot_ms < 30_000, "5 s on a quiet machine, far less than this on any"
        assert "cloudfit: init: entry was killed by signal 9; next start in 0.1 s" in text
        assert said["cwd"] == "/ isolated 1 parent 1"
        assert said["root"] == "EROFS"
        assert said["state"] == "mounted"
        assert said["boots"] == str(boots)
        assert said["echo"] == "ping"
        assert said["gateway"] == "['0202000A']"
        assert re.findall(r"^probe: refused (.*)$", text, re.MULTILINE) == ["nosuch0 ENODEV", "eth0 ENETUNREACH"]
        assert len(json.loads(said["ports"].replace("'", '"'))) == 1


def test_a_device_that_comes_late_is_waited_for_by_the_kernel_s_announcement(tmp_path):
    path = tmp_path / "device"

    def announce() -> None:
        path.touch()
        Path("/sys/class/mem/null/uevent").write_text("change")  # asks the kernel to repeat an announcement

    timer = threading.Timer(0.3, announce)
    timer.start()
    began = time.monotonic()
    assert init.wait_for_device(str(path), 60)
    assert time.monotonic() - began < 30
    timer.join()


def test_a_missing_optional_state_disk_is_told_to_the_entry(images, tmp_path):
    text = boot(images.probe, tmp_path / "console", until="probe: done")
    assert "probe: state error no disk /dev/vdb within 10 s" in text, text


def test_a_required_state_disk_that_does_not_mount_ends_the_machine(images, tmp_path):
    recipe = tmp_path / "recipe"
    shutil.copytree(images.recipe, recipe)
    text = (recipe / "recipe.toml").read_text()
    (recipe / "recipe.toml").write_text(text.replace('"probe"', '"required"').replace("optional", "required"))
    image = build_image(recipe, images.store, KEY, print).directory
    garbage = tmp_path / "state"
    garbage.write_bytes(os.urandom(4 << 20))
    console = boot(image, tmp_path / "console", until="never said", state=garbage)
    assert "cloudfit: init: state disk: [Errno 22]" in console, console
    assert "powering off" in console
    assert "probe" not in console


@pytest.mark.parametrize("part", ["root", "verity"])
def test_verity_stops_an_altered_root_where_the_sil_is_bypassed(images, tmp_path, part):
    manifest = verify_image(images.probe, TRUSTED)
    image = tmp_path / images.probe.name
    shutil.copytree(images.probe, image)
    # bytes that erofs itself never looks at: the padding before its superblock, and the hash of that block
    offset = 0 if part == "root" else manifest.part("verity").offset + 2 * verity.BLOCK
    with (image / "root.img").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(BadError, match=f"refused: {part}: "):
        verify_image(image, TRUSTED)
    console = boot(image, tmp_path / "console", until="never said")
    assert "cloudfit: init" not in console, console
    assert "dm-verity device corrupted" in console or "cannot mount the root" in console, console


def test_a_machine_without_verity_parameters_does_not_start(images, tmp_path):
    console = boot(images.probe, tmp_path / "console", until="never said", append="console=ttyS0 quiet panic=-1")
    assert "cloudfit: initramfs: the command line has no cloudfit.verity" in console
    assert "cloudfit: init " not in console


def test_the_root_holds_python_and_nothing_to_break_in_with(images, tmp_path):
    root = tmp_path / "root"
    manifest = verify_image(images.probe, TRUSTED)
    assert manifest.part("root").size <= MAX_ROOT_BYTES
    run("fsck.erofs", f"--extract={root}", images.probe / "root.img")
    assert sorted(p.name for p in (root / "usr/bin").iterdir()) == ["python3", "python3.11"]
    assert list((root / "usr/sbin").iterdir()) == []
    names = {p.name for p in root.rglob("*")}
    assert not names & {"sh", "bash", "dash", "busybox", "apt", "apt-get", "dpkg", "perl", "ssh", "sshd", "systemd"}
    assert not [p for p in root.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o6000]
    interpreters = [
        p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.read_bytes()[:11] == b"#!/bin/bash"
    ]
    assert not [p for p in interpreters if os.access(root / p, os.X_OK)]


def test_veritysetup_agrees_with_the_manifest(images):
    manifest = verify_image(images.probe, TRUSTED)
    image = images.probe / "root.img"
    run("veritysetup", "verify", f"--hash-offset={manifest.part('root').size}", image, image, manifest.verity_root)


def test_two_builds_give_the_same_digest(images, tmp_path):
    """The second one cold, but for the downloads, in another place and as another file system may order it."""
    store = tmp_path / "store"
    (store / ".cache").mkdir(parents=True)
    shutil.copytree(images.store / ".cache/blobs", store / ".cache/blobs")
    began = time.monotonic()
    again = build_image(images.recipe, store, KEY, print)
    print(f"built in {time.monotonic() - began:.1f} s without prepared trees")
    assert again.directory.name == images.probe.name


def test_ctrl_c_at_any_point_leaves_the_store_as_it_was(images):
    before = {i.directory for i in list_images(images.store, TRUSTED)}
    lines: list[str] = []
    build_image(images.recipe, images.store, KEY, lines.append)
    for number in range(len(lines) - 1):  # the last line is said when all is done
        left = iter(range(number))

        def interrupt(_line: str, left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_image(images.recipe, images.store, KEY, interrupt)
    assert {i.directory for i in list_images(images.store, TRUSTED)} >= before
    verify_image(images.probe, TRUSTED)


@pytest.mark.parametrize("size_mib", [1, 24, 90, 230])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(images, tmp_path, size_mib):
    store = tmp_path / "small"
    store.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", store)
    try:
        with pytest.raises(PermanentError, match=r"disk full while building image probe: .* MiB free") as caught:
            build_image(images.recipe, store, KEY, print)
        assert caught.value.next_command == f"df -h {store}"
        assert [p.name for p in store.iterdir() if not p.name.startswith((".cache", ".lock", "names"))] == []
        assert list_images(store, TRUSTED) == []
    finally:
        run("umount", store)


@pytest.mark.parametrize("name", ["replica", "recovery", "adversary"])
def test_the_shipped_images_build_and_verify(images, name):
    built = build_image(name, images.store, KEY, print)
    manifest = verify_image(built.directory, TRUSTED, allow_adversary=True)
    assert manifest.name == name
    assert manifest.part("root").size <= MAX_ROOT_BYTES
