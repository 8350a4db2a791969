"""The guest's end of the channel, against an agent at the other end of a real socket."""

import asyncio
import json
import os
import pty
import shutil
import tempfile
import tty
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cloudfit_orchestrator.guest.channel import Channel, ChannelLostError, Handlers, WormholeRefusedError
from cloudfit_orchestrator.guest.ports import ListeningPort, VirtioPort, find_port
from cloudfit_orchestrator.model import channel as ch
from cloudfit_orchestrator.model.channel import ErrorCode, FrameKind, FrameReader
from tests.unit.guest.fake_agent import FakeAgent
from tests.unit.guest.helpers import scenario, until

WELCOME = {"group": "g", "replica": "r0", "incarnation": 3}


class Seen:
    def __init__(self) -> None:
        self.calls: list = []

    def handlers(self) -> Handlers:
        return Handlers(
            opened=lambda welcome: self.add("opened", welcome),
            lost=lambda: self.add("lost", None),
            record=lambda body: self.add("record", body),
            command=lambda body: self.add("command", body),
        )

    def add(self, what, value) -> None:
        self.calls.append((what, value))

    async def until(self, *expected) -> None:
        await until(lambda: all(e in [c[0] for c in self.calls] for e in expected))


@asynccontextmanager
async def connected():
    directory = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))
    seen = Seen()
    port = ListeningPort(directory / "ch")
    channel = Channel(port, seen.handlers())
    running = asyncio.create_task(channel.run())
    agent = FakeAgent(directory / "ch", WELCOME)
    try:
        await agent.dial()
        await seen.until("opened")
        yield channel, agent, seen
    finally:
        await agent.drop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        port.close()
        shutil.rmtree(directory)


@scenario
async def test_requests_are_pipelined_and_answered_in_order():
    async with connected() as (channel, agent, seen):
        assert seen.calls == [("opened", WELCOME)]
        session, cv = ch.SESSION.unpack(await channel.request(FrameKind.OPEN_SESSION, ch.EPOCH.pack(1)))
        asked = [
            channel.request(FrameKind.CREATE_UI, ch.CREATE_UI.pack(session, 1, cv + i, bytes([i]) * 32))
            for i in range(20)
        ]
        answers = [ch.UI_CERT.unpack(body) for body in await asyncio.gather(*asked)]
        assert answers == [(cv, certificate) for cv, _, certificate in agent.certified]
        assert [digest[0] for _, digest, _ in agent.certified] == list(range(20))


@scenario
async def test_pushes_reach_the_handlers():
    async with connected() as (_, agent, seen):
        agent.push(FrameKind.RECORD, b"envelope")
        agent.push(FrameKind.COMMAND, b'{"op": "learn"}')
        await seen.until("record", "command")
        assert ("record", b"envelope") in seen.calls
        assert ("command", {"op": "learn"}) in seen.calls


@scenario
async def test_an_error_is_typed():
    async with connected() as (channel, agent, _):
        agent.errors[FrameKind.SIGN] = (ErrorCode.LEASE_OVER, "too late")
        with pytest.raises(WormholeRefusedError, match="too late") as caught:
            await channel.request(FrameKind.SIGN, b"")
        assert caught.value.code is ErrorCode.LEASE_OVER


@scenario
async def test_a_lost_connection_fails_what_was_open_and_is_made_again():
    async with connected() as (channel, agent, seen):
        agent.mute = True
        asked = channel.request(FrameKind.REPORT, b"{}")
        await agent.drop()
        with pytest.raises(ChannelLostError):
            await asked
        with pytest.raises(ChannelLostError):
            await channel.request(FrameKind.REPORT, b"{}")
        agent.mute = False
        await agent.dial()
        await until(lambda: channel.is_open)
        assert await channel.request(FrameKind.REPORT, b"{}") == b""
        assert [what for what, _ in seen.calls] == ["opened", "lost", "opened"]


@pytest.mark.parametrize(
    "junk",
    [
        b"\x40\x00\x00\x00" + b"x" * 100,  # a frame of 1 GiB
        bytes(64),
        ch.frame(FrameKind.OK, 99),
        ch.frame(FrameKind.COMMAND, 0, b"[]"),
        ch.frame(FrameKind.COMMAND, 0, b"[" * 100_000),
    ],
)
def test_junk_ends_the_connection_and_the_channel_comes_back(junk):
    @scenario
    async def run():
        async with connected() as (channel, agent, seen):
            agent.raw(junk)
            await seen.until("lost")
            await agent.dial()
            await until(lambda: channel.is_open)
            assert await channel.request(FrameKind.REPORT, b"{}") == b""
            assert channel.counters.total() == 1

    run()


def test_the_port_is_found_by_its_name(tmp_path):
    assert find_port(tmp_path) is None
    for device, name in [("vport1p1", "org.qemu.guest_agent.0"), ("vport1p2", ch.PORT_NAME)]:
        (tmp_path / device).mkdir()
        (tmp_path / device / "name").write_text(name + "\n")
    assert find_port(tmp_path) == "vport1p2"


@scenario
async def _virtio(tmp_path, monkeypatch):
    # A pseudo-terminal hangs up like a port whose host side is gone.
    (tmp_path / "ports" / "vport1p2").mkdir(parents=True)
    (tmp_path / "ports" / "vport1p2" / "name").write_text(ch.PORT_NAME)
    master, slave = pty.openpty()
    tty.setraw(slave)
    (tmp_path / "vport1p2").symlink_to(os.ttyname(slave))
    os.close(slave)
    port = VirtioPort(tmp_path / "ports", tmp_path)
    seen = Seen()
    channel = Channel(port, seen.handlers())
    running = asyncio.create_task(channel.run())
    reader = FrameReader(ch.MAX_GUEST_FRAME, stale=True)
    os.set_blocking(master, False)
    frames: list = []

    def greeted() -> bool:
        try:
            frames.extend(reader.feed(os.read(master, 4096)))
        except OSError:  # nothing yet, or nobody has opened the other end yet
            return False
        return bool(frames)

    await until(greeted)
    (kind, request, _) = frames[0]
    assert kind == FrameKind.HELLO
    os.write(master, ch.RESYNC + ch.frame(FrameKind.WELCOME, request, json.dumps(WELCOME).encode()))
    await seen.until("opened")
    os.close(master)  # the host lets go
    await seen.until("lost")
    tries = 0
    real = os.open

    def counted(path, *args, **kwargs):
        nonlocal tries
        tries += "vport" in str(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", counted)
    await asyncio.sleep(0.5)  # the time in which it must not try often
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert 1 <= tries <= 8  # backs off, does not spin


def test_a_virtio_port_is_greeted_when_its_host_is_there_and_not_spun_on_when_it_is_gone(tmp_path, monkeypatch):
    _virtio(tmp_path, monkeypatch)
