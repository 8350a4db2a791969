"""An agent in this process and guests that talk to it over real unix sockets."""

import asyncio
import json
import os
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.model.channel import (
    CREATE_UI,
    EPOCH,
    MAX_GUEST_FRAME,
    RECENT,
    RECENT_ITEM,
    RESYNC,
    UI_CERT,
    ErrorCode,
    FrameKind,
    frame,
)
from cloudfit_orchestrator.model.errors import BadError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Role, seal_manifest
from cloudfit_orchestrator.wormhole.agent import MachineRef
from cloudfit_orchestrator.wormhole.measure import Measured
from tests.unit.wormhole.world import DIGEST, GROUP, identity, world

R0, R1 = identity("r0", 1), identity("r1", 2)


def run(scenario, **how):
    """Run a scenario with a world and a deadline."""

    async def bounded():
        async with asyncio.timeout(60), world(**how) as w:
            await scenario(w)

    asyncio.run(bounded())


async def until(condition):
    """Let the loop turn until a condition of the agent's own counters holds."""
    while not condition():  # noqa: ASYNC110  bounded by the scenario's deadline
        await asyncio.sleep(0.001)


def counters(w):
    return w.agent.status()["counters"]


def create(session, cv, c=1):
    return CREATE_UI.pack(session, c, cv, DIGEST)


def test_welcome_says_who_the_guest_is_and_the_controllers_words_cannot_change_it():
    async def scenario(w):
        guest = await w.admit(R0)
        kind, request, body = await guest.greet(123)
        assert (kind, request) == (FrameKind.WELCOME, 123)
        assert json.loads(body) == {
            "group": GROUP,
            "replica": "r0",
            "incarnation": 1,
            "role": "replica",
            "network": {},
            "port": 7000,
            "options": {"x": 1},
        }

    run(scenario)


def test_active_then_prepared_then_commands_are_pushed_after_welcome_and_again_to_a_restarted_guest():
    async def scenario(w):
        guest = await w.admit(R0)
        await w.admit(R1)
        _, active = w.activate(1)
        prepared, _ = w.seal(2, 1)
        w.agent.install(GROUP, prepared)
        w.agent.command(R0, {"op": "learn"})
        pushed = [(18, b'{"op": "learn"}')]
        for round_ in range(2):
            assert (await guest.greet(round_ + 1))[0] == FrameKind.WELCOME
            for expected in [(17, active), (17, prepared), *pushed]:
                kind, request, body = await guest.read()
                assert (kind, request, body) == (expected[0], 0, expected[1])
            pushed.append((18, b'{"op": "forget"}'))
            if round_ == 0:
                w.agent.command(R0, {"op": "forget"})
                assert await guest.read() == (FrameKind.COMMAND, 0, b'{"op": "forget"}')

    run(scenario)


def test_a_record_is_pushed_once_to_a_process_of_the_guest():
    async def scenario(w):
        guest = await w.admit(R0)
        _, active = w.activate(1)
        await guest.greet()
        assert await guest.read() == (FrameKind.RECORD, 0, active)
        prepared, _ = w.seal(2, 1)
        w.agent.install(GROUP, prepared)
        w.agent.install(GROUP, prepared)
        assert await guest.read() == (FrameKind.RECORD, 0, prepared)
        await guest.ask(FrameKind.REPORT, b'{"topic": "x"}')
        assert guest._inbox == []

    run(scenario)


def test_pipelined_calls_are_answered_in_order_in_one_round_trip():
    async def scenario(w):
        guest = await w.admit(R0)
        w.activate()
        await guest.greet()
        session = await guest.session()
        calls = b"".join(frame(FrameKind.CREATE_UI, 100 + cv, create(session, cv)) for cv in range(1, 65))
        guest.writer.write(calls)
        answers = [await guest.read() for _ in range(65)]
        answers = [a for a in answers if a[0] != FrameKind.RECORD]
        assert [request for _, request, _ in answers] == list(range(101, 165))
        assert [UI_CERT.unpack(body)[0] for _, _, body in answers] == list(range(1, 65))

    run(scenario)


def test_a_guest_killed_in_the_middle_of_create_ui_burns_no_counter():
    """The process dies with half a frame in the port; its successor greets on the same stream."""

    async def scenario(w):
        guest = await w.admit(R0)
        w.activate()
        await guest.greet()
        session = await guest.session()
        assert (await guest.ask(FrameKind.CREATE_UI, create(session, 1)))[0] == FrameKind.UI_CERT
        whole = frame(FrameKind.CREATE_UI, 50, create(session, 2))
        for cut in range(len(whole)):
            guest.writer.write(whole[:cut])
            assert (await guest.greet(1000 + cut))[0] == FrameKind.WELCOME
        session = await guest.session()
        _, recent = await guest.ask(FrameKind.RECENT, RECENT.pack(session, 1))
        assert [cv for cv, _, _ in RECENT_ITEM.iter_unpack(recent)] == [1]
        kind, body = await guest.ask(FrameKind.CREATE_UI, create(session, 2))
        assert (kind, UI_CERT.unpack(body)[0]) == (FrameKind.UI_CERT, 2)

    run(scenario)


def test_a_crash_after_create_ui_loses_no_certificate():
    async def scenario(w):
        guest = await w.admit(R0)
        w.activate()
        await guest.greet()
        session = await guest.session()
        guest.writer.write(frame(FrameKind.CREATE_UI, 9, create(session, 1)))
        guest.writer.close()  # the answer is never read
        await guest.accept()
        await guest.greet(2)
        assert (await guest.ask(FrameKind.CREATE_UI, create(session, 2)))[1][:2] == ErrorCode.STALE_SESSION.to_bytes(2)
        session = await guest.session()
        _, recent = await guest.ask(FrameKind.RECENT, RECENT.pack(session, 1))
        assert [(cv, digest) for cv, digest, _ in RECENT_ITEM.iter_unpack(recent)] in ([(1, DIGEST)], [])

    run(scenario)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("frame", (1 << 30).to_bytes(4, "big")),
        ("frame", (MAX_GUEST_FRAME + 1).to_bytes(4, "big")),
        ("frame", b"\0\0\0\4xxxxx"),
        ("kind", frame(99, 1)),
        ("kind", frame(FrameKind.RECORD, 1, b"{}")),
        ("request", frame(FrameKind.ISSUE, 0)),
        ("version", frame(FrameKind.HELLO, 1, b"\2")),
        ("body-size", frame(FrameKind.CREATE_UI, 1, bytes(55))),
        ("body-size", frame(FrameKind.SIGN, 1, b"")),
        ("statement-kind", frame(FrameKind.SIGN, 1, bytes(8) + b"\x63" + bytes(40))),
        ("report", frame(FrameKind.REPORT, 1, b"[" * 60000)),
        ("public-key", frame(FrameKind.ISSUE, 1, b"\x30\x82")),
    ],
)
def test_malformed_input_drops_the_connection_with_a_counted_reason(reason, data):
    async def scenario(w):
        guest = await w.admit(R0)
        await guest.greet()
        guest.writer.write(data)
        kind, _, body = await guest.read()
        assert (kind, int.from_bytes(body[:2], "big")) == (FrameKind.ERROR, ErrorCode.MALFORMED)
        with pytest.raises(EOFError):
            await guest.read()
        assert counters(w)[f"malformed-{reason}"] == 1
        await guest.accept()  # bounded back-off, then it is served again
        assert (await guest.greet())[0] == FrameKind.WELCOME

    run(scenario)


def test_a_truncated_frame_hurts_nobody_but_its_sender():
    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        await guest.greet()
        await other.greet()
        guest.writer.write(frame(FrameKind.REPORT, 1, b'{"topic": "status"}')[:-5])
        guest.writer.close()
        assert await other.ask(FrameKind.REPORT, b'{"topic": "status"}') == (FrameKind.OK, b"")
        await guest.accept()
        assert [r.guest for r in w.agent.reports.page(0, None)[0]] == [R1]

    run(scenario)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4))
def test_random_bytes_on_one_channel_leave_the_agent_and_the_other_guest_whole(noise):
    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        w.activate()
        await guest.greet()
        for piece in noise:
            guest.writer.write(piece)
        await other.greet()
        session = await other.session()
        assert (await other.ask(FrameKind.CREATE_UI, create(session, 1)))[0] == FrameKind.UI_CERT
        assert next(iter(w.agent.table)).epoch(1).cv == 0

    run(scenario)


def test_bytes_before_the_greeting_are_discarded_and_counted():
    async def scenario(w):
        guest = await w.admit(R0)
        guest.writer.write(os.urandom(5000) + frame(FrameKind.CREATE_UI, 1, bytes(56)))
        assert (await guest.greet())[0] == FrameKind.WELCOME
        await guest.ask(FrameKind.REPORT, b'{"topic": "x"}')
        assert counters(w)["discarded-bytes"] == 5000 + 66

    run(scenario)


def test_one_guests_flood_does_not_delay_another():
    """By order, not by time: while r0 has thousands of calls in its socket, only a few turns of them precede r1's."""

    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        await guest.greet()
        await other.greet()
        served = w.agent._channels[R0][0].counters
        flood = frame(FrameKind.OPEN_SESSION, 1, EPOCH.pack(7)) * 4000

        async def drain():
            while True:
                await guest.reader.read(1 << 16)

        drains = asyncio.create_task(drain())
        guest.writer.write(flood)
        await until(lambda: served["served"] > 100)
        worst = 0
        for _ in range(20):
            before = served["served"]
            assert before < 4000
            await other.ask(FrameKind.OPEN_SESSION, EPOCH.pack(7))
            worst = max(worst, served["served"] - before)
        drains.cancel()
        assert worst <= 6 * 16  # a request and its answer pass the loop in at most a few turns of TURN_FRAMES each

    run(scenario, bucket=(1e9, 1e9))


def test_a_guest_over_its_rate_is_not_read_from():
    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        await guest.greet()
        await other.greet()
        guest.writer.write(frame(FrameKind.OPEN_SESSION, 1, EPOCH.pack(7)) * 300)
        await until(lambda: counters(w).get("throttled", 0) >= 1)
        served = w.agent._channels[R0][0].counters
        assert served["served"] <= 51
        await other.ask(FrameKind.OPEN_SESSION, EPOCH.pack(7))
        assert served["served"] <= 51

    run(scenario, bucket=(0.001, 50.0))


def test_a_guest_that_does_not_read_its_answers_is_not_read_from_and_can_be_evicted():
    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        await guest.greet()
        await other.greet()
        report = frame(FrameKind.REPORT, 1, json.dumps({"topic": "status", "x": "y" * 100}).encode())
        request = frame(FrameKind.OPEN_SESSION, 1, EPOCH.pack(7))
        served = w.agent._channels[R0][0].counters

        async def flood():
            while True:
                guest.writer.write(request * 500 + report)
                await guest.writer.drain()

        flooding = asyncio.create_task(flood())
        last = -1
        while served["served"] != last:  # until nothing moves any more over a whole round trip of the other guest
            last = served["served"]
            for _ in range(50):
                await other.ask(FrameKind.OPEN_SESSION, EPOCH.pack(7))
        await w.agent.evict(R0)
        flooding.cancel()
        assert [g["replica"] for g in w.agent.status()["guests"]] == ["r1"]

    run(scenario, bucket=(1e9, 1e9))


def test_a_talkative_guest_displaces_only_its_own_reports():
    async def scenario(w):
        guest, other = await w.admit(R0), await w.admit(R1)
        await guest.greet()
        await other.greet()
        await other.ask(FrameKind.REPORT, b'{"topic": "liar", "replica": "r0"}')
        big = json.dumps({"topic": "status", "x": "y" * 60000}).encode()
        for _ in range(30):
            assert await guest.ask(FrameKind.REPORT, big) == (FrameKind.OK, b"")
        assert counters(w)["reports-dropped"] == 13
        found, following = w.agent.reports.page(0, None)
        assert found[0].topic == "liar"
        everything = list(found)
        while following < 31:
            found, following = w.agent.reports.page(following, None)
            everything += found
        assert [r.seq for r in everything] == [1, *range(15, 32)]

    run(scenario, bucket=(1e9, 1e9))


def test_long_poll_returns_at_the_first_report_and_empty_at_its_deadline():
    async def scenario(w):
        guest = await w.admit(R0)
        await guest.greet()
        assert await w.agent.reports.wait(0, None, 0.01) == ([], 0)
        waiting = asyncio.create_task(w.agent.reports.wait(0, GROUP, 30))
        await asyncio.sleep(0)
        await guest.ask(FrameKind.REPORT, b'{"topic": "ready", "c": 1}')
        found, following = await waiting
        assert [(r.topic, r.body) for r in found] == [("ready", {"c": 1})]
        assert following == 1
        assert await w.agent.reports.wait(0, "other", 0.01) == ([], 1)

    run(scenario)


def test_reports_skipped_for_another_group_do_not_move_past_unseen_ones():
    async def scenario(w):
        guest = await w.admit(R0)
        await guest.greet()
        await guest.ask(FrameKind.REPORT, b'{"topic": "ready", "c": 1}')
        _, following = w.agent.reports.page(0, "other")
        await guest.ask(FrameKind.REPORT, b'{"topic": "ready", "c": 2}')
        assert [r.body["c"] for r in w.agent.reports.page(following, GROUP)[0]] == [2]

    run(scenario)


def test_evicted_guests_channel_is_closed():
    async def scenario(w):
        guest = await w.admit(R0)
        await guest.greet()
        await w.agent.evict(R0)
        with pytest.raises(EOFError):
            await guest.read()

    run(scenario)


def test_the_issued_certificate_works_in_mutual_tls_1_3(tmp_path):
    """As peers will use it: chain to the incarnation's channel CA, key of the guest."""

    def credentials(w, guest_key, der, who):
        pem = x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
        key = guest_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = tmp_path / f"{who.replica}.pem"
        path.write_bytes(pem + key)
        return path

    async def scenario(w):
        contexts = {}
        for who, protocol in ((R0, ssl.PROTOCOL_TLS_SERVER), (R1, ssl.PROTOCOL_TLS_CLIENT)):
            guest = await w.admit(who)
            await guest.greet()
            key = Ed25519PrivateKey.generate()
            spki = key.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            kind, der = await guest.ask(FrameKind.ISSUE, spki)
            assert kind == FrameKind.CERTIFICATE
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            context.load_cert_chain(credentials(w, key, der, who))
            contexts[who] = context
        for who, other in ((R0, R1), (R1, R0)):
            contexts[who].load_verify_locations(cadata=w.agent.table.get(other).ca.certificate)
        seen = asyncio.get_running_loop().create_future()

        async def serve(_reader, writer):
            seen.set_result(writer.get_extra_info("peercert"))
            writer.close()

        server = await asyncio.start_unix_server(serve, f"{w.folder}/tls", ssl=contexts[R0])
        reader, writer = await asyncio.open_unix_connection(f"{w.folder}/tls", ssl=contexts[R1], server_hostname="r0")
        assert await reader.read() == b""
        peer = writer.get_extra_info("peercert")
        writer.close()
        server.close()
        assert peer["subject"] == ((("commonName", "ledger/r0#1"),),)
        assert (await seen)["subject"] == ((("commonName", "ledger/r1#2"),),)

    run(scenario)


def test_resync_inside_a_frame_is_the_senders_own_loss():
    async def scenario(w):
        guest = await w.admit(R0)
        await guest.greet()
        guest.writer.write(frame(FrameKind.SIGN, 5, bytes(8) + b"\2" + RESYNC + bytes(48)))
        assert (await guest.read())[0] == FrameKind.ERROR  # what follows RESYNC is no frame
        await guest.accept()
        assert (await guest.greet())[0] == FrameKind.WELCOME

    run(scenario)


async def welcomed(w, monkeypatch, measure):
    """A guest of libvirt's that has greeted; `measure` says what is found behind each connection."""
    monkeypatch.setattr("cloudfit_orchestrator.wormhole.host.measure_libvirt", measure)
    monkeypatch.setattr("cloudfit_orchestrator.wormhole.host.measure_attached", measure)
    nothing = {"command_line": "", "verity_root": "", "parts": (), "packages": (), "lineage": "x"}
    manifest = seal_manifest(Manifest("x", Role.REPLICA, adversary=False, **nothing), w.image_key)
    guest = await w.admit(R0, machine=MachineRef("libvirt", uri="qemu:///system", uuid="u"), manifest=manifest)
    assert (await guest.greet())[0] == FrameKind.WELCOME
    return guest


def test_a_guest_that_greets_before_it_is_measured_is_answered_after(monkeypatch):
    async def scenario(w):
        verdict = threading.Event()
        verdict.set()

        def measure(uri, uuid, manifest):
            assert verdict.wait(20)
            return Measured(uuid, "sha256:0", f"{w.folder}/r0-1", isolated=True)

        guest = await welcomed(w, monkeypatch, measure)
        verdict.clear()
        guest.writer.close()
        await guest.accept()
        greeting = asyncio.create_task(guest.greet())
        for _ in range(100):  # turns of the loop, which is the agent's, too
            await asyncio.sleep(0)
        assert not greeting.done()
        assert counters(w)["served"] == 1
        verdict.set()
        assert (await greeting)[0] == FrameKind.WELCOME

    run(scenario)


def test_another_machine_behind_the_same_channel_is_measured_again_and_gets_nothing(monkeypatch):
    """The domain was stopped and started from other bytes: the socket is the same, what runs is not."""

    async def scenario(w):
        verdicts = []

        def measure(uri, uuid, manifest):
            if verdicts and (verdict := verdicts.pop(0)):
                raise verdict
            return Measured(uuid, "sha256:0", f"{w.folder}/r0-1", isolated=True)

        guest = await welcomed(w, monkeypatch, measure)
        verdicts += [BadError("kernel: differs"), UnknownError("libvirt does not answer"), None]
        guest.writer.close()
        for _ in range(2):
            await guest.accept()
            with pytest.raises((EOFError, ConnectionError)):
                await guest.greet()
        assert (counters(w)["measurement-failed"], counters(w)["measurement-unknown"]) == (1, 1)
        await guest.accept()
        assert (await guest.greet())[0] == FrameKind.WELCOME

    run(scenario)
