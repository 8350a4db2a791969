"""The agent inside a guest (`trust: none`): who may give it orders, what it remembers, and what it refuses."""

import asyncio
import base64
import contextlib
import json
import shutil
import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.controller.agents import AgentClient, GuestRef, MeasurementError
from cloudfit_orchestrator.controller.secrets import TlsDialer
from cloudfit_orchestrator.model.drive import MAGIC, Drive, control_certificate, derived_key, guest_seed
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError, TemporaryError
from cloudfit_orchestrator.model.image import Role, open_launch
from cloudfit_orchestrator.model.record import Algorithm, seal_record
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.wormhole import inside
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.inside import MEMORY, InsideAgent
from cloudfit_orchestrator.wormhole.tls import Credentials
from tests.unit.wormhole.world import GROUP, active_envelope, member, record_of, short_folder

HOME_SECRET = bytes(range(32))
CONTROLLER = Ed25519PrivateKey.generate()
ORDERS = derived_key(HOME_SECRET, "controller")
WHO = Identity(GROUP, "r1", 2)
REF = GuestRef(GROUP, "r1", 2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def drive(**change):
    made = Drive(
        group=GROUP,
        replica="r1",
        incarnation=2,
        role=Role.REPLICA,
        image="sha256:" + "0" * 64,
        seed=guest_seed(HOME_SECRET, "dep", GROUP, "r1", "2", "replica", "op"),
        controller=control_certificate(ORDERS, "controller"),
        controller_keys=(public_bytes(CONTROLLER),),
        control_port=0,
        lease_s=1000.0,
        welcome={"network": {"address": "127.0.0.1", "prefix": 8}, "port": 7000, "options": {}},
    )
    return replace(made, **change)


def dialer(d, *, key=ORDERS, seed=None):
    """To the agent of that drive; `seed`: of the drive that the controller believes it to have."""
    expected = control_certificate(derived_key(seed or d.seed, "control"), f"{GROUP}/r1#2")
    credentials = Credentials(key, control_certificate(key, "controller"))
    return TlsDialer("127.0.0.1", d.control_port, credentials, expected)


def answers(d):
    try:
        socket.create_connection(("127.0.0.1", d.control_port), 10).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def running(d, state):
    """The agent of that drive, in a thread of its own."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(inside.run(d, state, str(state / "ch"), stop),))
    thread.start()
    try:
        while not answers(d):
            assert thread.is_alive()
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture
def state():
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def served(state):
    d = drive(control_port=free_port())
    with running(d, state):
        yield d


def started(state, d=None):
    """An agent without its socket: what it is after a start."""
    agent = InsideAgent(d or drive(), state)
    agent._serve = lambda *_: None
    agent.start("/nowhere")
    agent._channels[agent.identity] = (Quiet(), None)
    return agent


class Quiet:
    """A channel that nobody is at."""

    def push_records(self):
        pass

    def push_command(self, command):
        pass


def records(agent, c=1, base=None, algorithm=Algorithm.PBFT, f=0):
    """PREPARED(c) and ACTIVE(c) with the agent's guest as the only member."""
    epoch = agent.prepare(agent.identity, c)
    guest = agent.table.get(agent.identity)
    prepared = seal_record(replace(record_of(c, base, [member(guest, epoch)], f=f), algorithm=algorithm), CONTROLLER)
    confirm = lambda replica, c, body: epoch.sign(Kind.CONFIRM, body)  # noqa: E731
    return prepared, lambda: active_envelope(prepared, confirm, CONTROLLER, count=f + 1)


def test_a_drive_is_read_as_it_was_written_and_nothing_else_is():
    d = drive()
    assert Drive.decode(d.encode()) == d
    assert d.encode().startswith(MAGIC)
    assert d.encode() == drive().encode()
    assert "seed" not in repr(d)
    for spoilt in (b"", b"#cloud-config\n", d.encode()[:-1], d.encode().replace(b'"r1"', b"7", 1)[:60]):
        with pytest.raises(BadInputError):
            Drive.decode(spoilt)


def test_every_name_of_a_machine_makes_another_seed():
    names = ["dep", "ledger", "r1", "2", "replica", "op"]
    seeds = {guest_seed(HOME_SECRET, *names), guest_seed(bytes(32), *names)}
    seeds |= {guest_seed(HOME_SECRET, *names[:i], names[i] + "x", *names[i + 1 :]) for i in range(len(names))}
    seeds.add(guest_seed(HOME_SECRET, "depl", "edger", *names[2:]))  # no two lists of names are one string
    assert len(seeds) == 9


def test_the_controller_gives_orders_and_is_told_that_nothing_was_measured(served):
    with AgentClient(dialer(served)) as client:
        launch = client.admit(
            REF, role=Role.REPLICA, machine={"driver": "inside"}, manifest=b"", lease_s=5.0, welcome={}
        )
        certificate = open_launch(launch, [public_bytes(derived_key(served.seed, "identity"))])
        assert (certificate.measured, certificate.isolated, certificate.image) == (False, False, served.image)
        assert client.prepare(REF, 1) == client.prepare(REF, 1)
        with pytest.raises(MeasurementError):
            client.admit(REF, role=Role.RECOVERY, machine={"driver": "inside"}, manifest=b"", lease_s=5.0, welcome={})
        with pytest.raises(RefusedError, match="runs in"):
            client.evict(REF)


def asked_through(context, port):
    """What comes back to somebody who speaks TLS his own way; nothing if the door stays shut."""
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as tls:
            tls.sendall(b'{"id": 1, "op": "status"}\n')
            return tls.recv(1000)
    except (ssl.SSLError, ConnectionError):  # with TLS 1.3 the refusal comes after the client's own handshake
        return b""


def test_nobody_else_gives_orders(served):
    """Another key under the right name, no certificate at all, an older TLS, no TLS."""
    stranger = Ed25519PrivateKey.generate()
    with AgentClient(dialer(served, key=stranger)) as client, pytest.raises(TemporaryError):
        client.status()
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (bare, old):
        assert asked_through(context, served.control_port) == b""
    with socket.create_connection(("127.0.0.1", served.control_port), 10) as plain:
        plain.sendall(b'{"id": 1, "op": "status"}\n')
        assert b"guests" not in plain.recv(1000)
    with AgentClient(dialer(served)) as client:
        assert client.status()["guests"]


def test_handshakes_that_never_end_do_not_keep_the_controller_out(served):
    """They are of one address; the oldest of whoever has most gives way, which is hardly ever the controller's."""
    with contextlib.ExitStack() as stack:
        for _ in range(3 * inside.MAX_HANDSHAKES):
            plain = stack.enter_context(
                socket.create_connection(("127.0.0.1", served.control_port), 10, ("127.0.0.3", 0))
            )
            plain.sendall(b"\x16\x03\x01")
        with AgentClient(dialer(served)) as client:
            assert client.status()["counters"]["control-crowded"] >= inside.MAX_HANDSHAKES


def test_a_guest_with_another_drive_is_not_believed_to_be_ours(state):
    """Tampered with, or that of an older incarnation: the cloud shows a machine that has not our seed."""
    ours = drive(control_port=free_port())
    for seed in (bytes(32), guest_seed(HOME_SECRET, "dep", GROUP, "r1", "1", "replica", "op0")):
        with running(replace(ours, seed=seed), state):
            client = AgentClient(dialer(ours))
            with pytest.raises(BadError, match="not the guest that was booted from our drive"):
                client.status()


def test_a_restart_finds_the_same_keys_records_and_commands(state):
    agent = started(state)
    prepared, active = records(agent)
    agent.install(GROUP, prepared)
    envelope = active()
    agent.install(GROUP, envelope)
    agent.prepare(WHO, 2)
    agent.command(WHO, {"op": "learn"})
    before = agent.table.get(WHO)
    again = started(state).table.get(WHO)
    assert again.launch == before.launch
    assert again.ca.certificate == before.ca.certificate
    assert {c: (e.state, e.kss_key, e.usig_key) for c, e in again.epochs.items()} == {
        c: (e.state, e.kss_key, e.usig_key) for c, e in before.epochs.items()
    }
    assert again.epoch(1).state == "open"
    assert [json.loads(command) for command in again.commands] == [{"op": "learn"}]
    assert len({again.epoch(c).kss_key for c in (1, 2)} | {again.epoch(c).usig_key for c in (1, 2)}) == 4


@pytest.mark.parametrize("lose", ["unlink", "spoil", "cut"])
def test_who_loses_its_memory_loses_its_keys(state, lose):
    """It is another one then: neither its peers nor the record know it, and it cannot contradict what it has said."""
    agent = started(state)
    prepared, active = records(agent)
    agent.install(GROUP, prepared)
    envelope, before = active(), agent.table.get(WHO)
    agent.install(GROUP, envelope)
    memory = state / MEMORY
    if lose == "unlink":
        memory.unlink()
    else:
        memory.write_bytes(b"\0" * 100 if lose == "spoil" else memory.read_bytes()[:-7])
    fresh = started(state)
    again = fresh.table.get(WHO)
    assert again.ca.certificate != before.ca.certificate
    assert again.epochs == {}
    with pytest.raises(RefusedError, match="made no keys"):
        fresh.install(GROUP, envelope)
    assert fresh.prepare(WHO, 1).kss_key != before.epoch(1).kss_key
    with pytest.raises(RefusedError, match="other keys"):
        fresh.install(GROUP, envelope)


def test_neither_the_drive_nor_the_disk_alone_gives_the_keys(state):
    agent = started(state)
    key = agent.prepare(WHO, 1).kss_key
    kept = json.loads((state / MEMORY).read_text())["secret"]
    secret = base64.b64decode(kept)
    assert key not in {public_bytes(derived_key(s, "kss/1")) for s in (drive().seed, secret)}
    assert key == public_bytes(derived_key(drive().seed + secret, "kss/1"))


@pytest.mark.parametrize("algorithm", [Algorithm.EBAWA, Algorithm.MINBFT])
def test_no_configuration_that_believes_counters_is_taken(state, algorithm):
    agent = started(state)
    prepared, _ = records(agent, algorithm=algorithm)
    with pytest.raises(RefusedError, match="needs a wormhole at the hypervisor"):
        agent.install(GROUP, prepared)
    assert agent.table.records(GROUP).prepared is None


def test_a_disk_that_takes_nothing_is_a_temporary_error(state):
    agent = started(state)
    agent._path = Path("/proc/nowhere/agent.json")
    with pytest.raises(TemporaryError):
        agent.prepare(WHO, 1)


def test_a_recovery_machine_looks_at_no_memory_and_gets_no_keys(state):
    (state / MEMORY).write_text('{"secret": "x"}')
    agent = started(state, drive(role=Role.RECOVERY))
    with pytest.raises(RefusedError, match="gets no keys"):
        agent.prepare(WHO, 1)
    agent.command(WHO, {"op": "learn"})
    assert (state / MEMORY).read_text() == '{"secret": "x"}'
