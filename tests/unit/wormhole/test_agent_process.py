"""The real agent process, driven through its controller socket by the controller's client."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import threading

import pytest

from cloudfit_orchestrator.controller.agents import (
    GuestRef,
    MeasurementError,
    NoEpochError,
    NotAdmittedError,
    libvirt_machine,
    process_machine,
)
from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    SESSION,
    UI_CERT,
    ErrorCode,
    FrameKind,
)
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError, TemporaryError
from cloudfit_orchestrator.model.image import Manifest, Part, Role, manifest_digest, open_launch, seal_manifest
from cloudfit_orchestrator.model.signing import Ed25519Verifier, private_bytes
from cloudfit_orchestrator.model.ui import epoch_end_bytes, ui_bytes
from tests.unit.wormhole.house import R0
from tests.unit.wormhole.world import DIGEST, GROUP


def test_from_admission_to_epoch_end_through_the_real_process(house, client, guest):
    launch = house.admit(client, guest)
    certificate = open_launch(launch, [base64.b64decode(client.status()["key"])])
    assert (certificate.isolated, certificate.image) == (False, "sha256:" + "0" * 64)
    assert (certificate.group, certificate.replica, certificate.incarnation) == (GROUP, "r0", 1)
    guest.accept()
    assert json.loads(guest.greet()[2])["replica"] == "r0"
    member = house.open_epoch(client, guest, launch)
    session, following = SESSION.unpack(guest.ask(FrameKind.OPEN_SESSION, EPOCH.pack(1))[1])
    assert following == 1
    cv, ui = UI_CERT.unpack(guest.ask(FrameKind.CREATE_UI, CREATE_UI.pack(session, 1, 1, DIGEST))[1])
    assert Ed25519Verifier().verify(member.usig_key, ui_bytes(GROUP, "r0", 1, cv, DIGEST), ui)

    assert client.freeze(R0, 1) == 1
    kind, body = guest.ask(FrameKind.CREATE_UI, CREATE_UI.pack(session, 1, 2, DIGEST))
    assert (kind, int.from_bytes(body[:2], "big")) == (FrameKind.ERROR, ErrorCode.FROZEN)
    assert client.thaw(R0, 1) == 1
    end = client.close_epoch(R0, 1)
    assert end == client.close_epoch(R0, 1)
    assert (end.cv_end, end.last_digest, end.last_certificate) == (1, DIGEST, ui)
    assert Ed25519Verifier().verify(member.usig_key, epoch_end_bytes(GROUP, end), end.signature)

    status = client.status()
    assert status["guests"][0]["epochs"] == [{"c": 1, "state": "ended", "cv": 1}]
    assert status["guests"][0]["greeted"] is True
    assert status["groups"] == {GROUP: {"active": 1, "prepared": None}}
    client.evict(R0)
    client.evict(R0)
    with pytest.raises(EOFError):
        guest.read()
    with pytest.raises(NotAdmittedError):
        client.close_epoch(R0, 1)


def test_admit_is_safe_to_repeat_and_refuses_a_second_machine(house, client, guest):
    launch = house.admit(client, guest)
    assert house.admit(client, guest) == launch
    with pytest.raises(RefusedError, match="is admitted as machine"):
        house.admit(client, guest, machine=process_machine(os.getppid(), guest.path))
    with pytest.raises(RefusedError, match="cannot be ledger/r1#2"):
        house.admit(client, guest, ref=GuestRef(GROUP, "r1", 2))


def manifest_of(role, *, adversary=False, parts=()):
    return Manifest("x", role, adversary, command_line="", verity_root="", parts=parts, packages=(), lineage="x")


def test_an_adversary_image_is_refused_unless_allowed(house, client, guest):
    part = Part("kernel", "vmlinuz", 0, 1, hashlib.sha256(b"x").hexdigest())
    manifest = Manifest(
        "bad", Role.REPLICA, adversary=True, command_line="", verity_root="", parts=(part,), packages=(), lineage="x"
    )
    envelope = seal_manifest(manifest, house.image_key)
    with pytest.raises(RefusedError, match="adversary variant"):
        house.admit(client, guest, manifest=envelope)
    launch = house.admit(client, guest, manifest=envelope, allow_adversary=True)
    assert open_launch(launch, [base64.b64decode(client.status()["key"])]).image == manifest_digest(envelope)


def test_a_manifest_that_no_trusted_key_signed_or_of_another_role_is_a_failed_measurement(house, client, guest):
    manifest = Manifest(
        "x", Role.RECOVERY, adversary=False, command_line="", verity_root="", parts=(), packages=(), lineage="x"
    )
    with pytest.raises(MeasurementError, match="none of which is trusted"):
        house.admit(client, guest, manifest=seal_manifest(manifest, house.controller))
    with pytest.raises(MeasurementError, match="is for a recovery machine"):
        house.admit(client, guest, manifest=seal_manifest(manifest, house.image_key))
    envelope = bytearray(seal_manifest(manifest, house.image_key))
    envelope[20] ^= 1
    with pytest.raises(MeasurementError):
        house.admit(client, guest, manifest=bytes(envelope))
    with pytest.raises(MeasurementError, match="malformed"):
        house.admit(client, guest, manifest=b"", machine=libvirt_machine("test:///default", "x"))
    assert client.status()["guests"] == []


def test_a_restart_of_the_agent_ends_all_its_epochs(house, client, guest):
    """Also the controller's client survives it: its idle connection is replaced."""
    launch = house.admit(client, guest)
    guest.accept()
    guest.greet()
    house.open_epoch(client, guest, launch)
    key = client.status()["key"]
    house.stop(signal.SIGKILL)
    house.start()
    with pytest.raises(NotAdmittedError):
        client.freeze(R0, 1)
    assert house.admit(client, guest) != launch
    assert client.status()["key"] == key
    with pytest.raises(NoEpochError):
        client.close_epoch(R0, 1)
    guest.accept()
    guest.greet()
    kind, body = guest.ask(FrameKind.CREATE_UI, CREATE_UI.pack(1, 1, 1, DIGEST))
    assert (kind, int.from_bytes(body[:2], "big")) == (FrameKind.ERROR, ErrorCode.NO_EPOCH)


def test_reports_come_by_long_poll_while_other_calls_go_on(house, client, guest):
    house.admit(client, guest)
    guest.accept()
    guest.greet()
    found = []
    waiting = threading.Thread(target=lambda: found.append(client.reports(0, wait_s=30)))
    waiting.start()
    client.status()
    assert guest.ask(FrameKind.REPORT, b'{"topic": "ready", "c": 1}') == (FrameKind.OK, b"")
    waiting.join(20)
    ((reports, following),) = found
    assert [(r.guest, r.topic, r.body) for r in reports] == [(R0, "ready", {"c": 1})]
    assert client.reports(following) == ([], following)


def test_commands_reach_the_guest(house, client, guest):
    house.admit(client, guest)
    client.command(R0, {"op": "forget", "peer_id": "r2#5"})
    guest.accept()
    guest.greet()
    kind, request, body = guest.read()
    assert (kind, request, json.loads(body)) == (FrameKind.COMMAND, 0, {"op": "forget", "peer_id": "r2#5"})


def test_many_threads_share_a_client(house, client, guest):
    house.admit(client, guest)
    keys = []
    threads = [threading.Thread(target=lambda c=c: keys.append((c, client.prepare(R0, c)))) for c in [*range(1, 9)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(keys) == 16
    assert len(set(keys)) == 8


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        (b"\xff\n", "no such request"),
        (b"[]\n", "no such request"),
        (b'{"id": 1, "op": "fly"}\n', "no such request"),
        (b"[" * 100000 + b"\n", "no such request"),
        (b'{"id": 1, "op": "prepare", "group": "g", "replica": "r", "incarnation": "1"}\n', "'incarnation' is no int"),
        (b'{"id": 1, "op": "prepare", "group": "g", "replica": "r", "incarnation": 0, "c": 1}\n', "out of range"),
        (b'{"id": 1, "op": "install", "group": "g", "envelope": "%"}\n', "'envelope' is no base64"),
        (b'{"id": 1, "op": "command", "group": "g", "replica": "r", "incarnation": 1, "body": 5}\n', "is no dict"),
    ],
)
def test_a_bad_request_is_answered_and_the_agent_goes_on(house, client, line, fact):
    with socket.socket(socket.AF_UNIX) as raw, raw.makefile("rb") as lines:
        raw.connect(str(house.socket))
        raw.sendall(line)
        answer = json.loads(lines.readline())
        assert (answer["ok"], answer["code"]) == (False, "bad-input")
        assert fact in answer["error"]
        raw.sendall(b'{"id": 2, "op": "status"}\n')
        assert json.loads(lines.readline())["agent"] == "a1"


def test_a_line_beyond_the_limit_closes_the_connection(house, client):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(house.socket))
        with contextlib.suppress(OSError):
            raw.sendall(b"x" * (5 << 20))
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""
    assert client.status()["counters"]["control-oversize"] == 1


@pytest.mark.parametrize("machine", [{"driver": "magic"}, {"driver": "process", "pid": 0, "socket": "/x"}, {}])
def test_a_bad_machine_is_bad_input(house, client, guest, machine):
    with pytest.raises(BadInputError):
        house.admit(client, guest, machine=machine)


def test_a_bad_record_is_bad_and_changes_nothing(house, client, guest):
    house.admit(client, guest)
    with pytest.raises(BadError, match="malformed"):
        client.install(GROUP, b"{}")
    assert client.status()["groups"] == {}


def test_socket_and_identity_are_0600_and_the_socket_goes_with_the_process(house, client):
    client.status()
    assert stat.S_IMODE(house.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE((house.folder / "a" / "identity").stat().st_mode) == 0o600
    assert house.stop() == 0
    assert not house.socket.exists()
    with pytest.raises(TemporaryError, match="cannot be reached"):
        client.status()


def test_sigterm_ends_it_cleanly_while_a_controller_waits_and_a_guest_talks(house, client, guest):
    house.admit(client, guest)
    guest.accept()
    guest.greet()
    errors = []

    def wait():
        try:
            client.reports(0, wait_s=50)
        except TemporaryError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    client.status()
    assert house.stop() == 0
    waiting.join(20)
    assert len(errors) == 1
    assert "Traceback" not in house.log.read_text()


def test_two_agents_cannot_have_one_socket(house):
    second = subprocess.run(house.arguments(name="a2"), capture_output=True, timeout=30, check=False)
    assert second.returncode == 1
    assert b"serves" in second.stderr
    lock = os.open(f"{house.socket}.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_a_start_that_cannot_be_is_refused_with_the_reason(house):
    readable = house.folder / "readable"
    readable.write_bytes(base64.b64encode(bytes(32)))
    readable.chmod(0o644)
    for change, fact in (
        ({"identity": readable}, b"chmod 600"),
        ({"controller-key": house.folder / "none"}, b"No such file"),
        ({"controller-key": house.log}, b"base64"),
        ({"socket": house.folder / ("x" * 120)}, b"107 bytes"),
    ):
        done = subprocess.run(house.arguments(**change), capture_output=True, timeout=30, check=False)
        assert done.returncode == 1, change
        assert fact in done.stderr


def test_log_is_json_lines_without_key_material(house, client, guest):
    launch = house.admit(client, guest)
    guest.accept()
    guest.greet()
    house.open_epoch(client, guest, launch)
    guest.stream.sendall(b"\xff" * 100)
    while guest.read()[0] != FrameKind.ERROR:
        pass
    client.close_epoch(R0, 1)
    identity = (house.folder / "a" / "identity").read_text().strip()
    text = house.log.read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert entries[0]["message"] == "started"
    assert any(entry.get("reason") == "frame" for entry in entries)
    assert identity not in text
    assert private_bytes(house.controller).hex() not in text
    assert '"op": "close"' in text
