"""Real TLS on loopback: who gets in, who does not, and what hostile bytes do."""

import asyncio
import socket
import ssl
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.messages import MAX_CLIENT_FRAME, MAX_PEER_FRAME
from cloudfit_orchestrator.gateway.identity import self_signed
from cloudfit_orchestrator.guest.crowd import MAX_LINKS_PER_PEER
from cloudfit_orchestrator.guest.links import SendQueue
from cloudfit_orchestrator.guest.transport import Transport
from cloudfit_orchestrator.model.record import Client
from cloudfit_orchestrator.wormhole.tls import Credentials
from tests.unit.guest.fake_agent import Authority
from tests.unit.guest.helpers import scenario, until


@dataclass(frozen=True)
class P:
    peer_id: str
    address: str
    channel_ca: bytes


class Node:
    """One incarnation: an authority, credentials, a transport."""

    def __init__(self, name: str, group: str = "g", claims: str | None = None) -> None:
        self.name, self.authority = name, Authority(name)
        key = Ed25519PrivateKey.generate()
        leaf = self.authority.issue(f"{group}/{claims or name}", Credentials.request(key))
        self.credentials = Credentials(key, leaf)
        self.frames: list[tuple] = []
        self.transport = Transport(
            group="g",
            credentials=self.credentials,
            from_peer=lambda peer, body: self.frames.append((peer, body)),
            from_client=lambda client, body: self.frames.append((client, body)),
        )

    async def start(self) -> "Node":
        port = await self.transport.listen("127.0.0.1", 0)
        self.peer = P(self.name, f"127.0.0.1:{port}", self.authority.der)
        return self


@asynccontextmanager
async def nodes(*made: Node):
    try:
        yield [await node.start() for node in made]
    finally:
        for node in made:
            await node.transport.close()
        await asyncio.sleep(0.01)  # let aborted sockets close before the loop does


async def dial(node: Node, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = node.peer.address.split(":")
    return await asyncio.open_connection(host, int(port), ssl=context, server_hostname="")


def client_of(name: str) -> tuple[Client, Ed25519PrivateKey]:
    key = Ed25519PrivateKey.generate()
    return self_signed(name, key), key


async def ends(reader: asyncio.StreamReader) -> bool:
    """The other side closed, with or without an alert."""
    try:
        return await asyncio.wait_for(reader.read(), 10) == b""
    except (ssl.SSLError, ConnectionError):
        return True


@scenario
async def test_peers_exchange_frames_of_any_allowed_size_in_order():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        for node in (a, b):
            node.transport.configure([a.peer, b.peer], [])
        bodies = [b"", b"x", bytes(MAX_PEER_FRAME), *(b"%d" % i for i in range(500))]
        for body in bodies:
            a.transport.send("r1#2", body)
        b.transport.send("r0#1", b"back")
        await until(lambda: len(b.frames) == len(bodies) and a.frames)
        assert b.frames == [("r0#1", body) for body in bodies]
        assert a.frames == [("r1#2", b"back")]


@scenario
async def test_a_connection_is_made_again_until_the_peer_accepts_it_and_after_it_broke():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        a.transport.configure([b.peer], [])
        a.transport.send("r1#2", b"refused")
        await until(b.transport.counters.total)
        b.transport.configure([a.peer], [])
        await until(lambda: b.transport._owners)
        assert b.frames == []
        a.transport.send("r1#2", b"first")
        await until(lambda: b.frames == [("r0#1", b"first")])
        for link in list(b.transport._owners):
            link.abort("test")
        await until(lambda: not b.transport._owners)
        await until(lambda: b.transport._owners)
        a.transport.send("r1#2", b"second")
        await until(lambda: b.frames == [("r0#1", b"first"), ("r0#1", b"second")])


@scenario
async def test_a_stranger_and_a_wrong_group_are_refused():
    async with nodes(Node("r0#1"), Node("r1#2"), Node("r2#3"), Node("r3#4", group="other")) as (a, b, stranger, other):
        a.transport.configure([b.peer, other.peer], [])
        for node in (stranger, other):
            reader, writer = await dial(a, node.credentials.client_context(a.authority.der))
            writer.write(struct.pack(">I", 3) + b"abc")
            assert await ends(reader)
            writer.close()
        assert a.frames == []
        assert a.transport._owners == {}


@scenario
async def test_one_authority_cannot_speak_for_another_incarnation():
    liar = Node("r1#2", claims="r2#3")
    async with nodes(Node("r0#1"), liar, Node("r2#3")) as (a, b, c):
        a.transport.configure([b.peer, c.peer], [])
        reader, writer = await dial(a, b.credentials.client_context(a.authority.der))
        writer.write(struct.pack(">I", 3) + b"abc")
        assert await ends(reader)
        writer.close()
        assert a.frames == []
        assert a.transport.counters["closed: stranger"] == 1
        # Nor does anybody dial it: the certificate it shows is not that of the peer dialled.
        a.transport.send("r1#2", b"secret")
        await until(lambda: a.transport.counters["closed: stranger"] == 2)
        assert b.frames == []


@scenario
async def test_a_client_is_known_by_its_certificate_and_gets_answers_on_its_own_connection():
    known, key = client_of("alice")
    unknown, other_key = client_of("mallory")
    async with nodes(Node("r0#1")) as (a,):
        a.transport.configure([], [known])
        reader, writer = await dial(a, Credentials(key, known.certificate).client_context(a.authority.der))
        writer.write(struct.pack(">I", 5) + b"hello")
        await until(lambda: a.frames)
        assert a.frames == [(known.key, b"hello")]
        a.transport.answer(known.key, b"world")
        a.transport.answer(unknown.key, b"nobody")
        assert await reader.readexactly(9) == struct.pack(">I", 5) + b"world"
        r2, w2 = await dial(a, Credentials(other_key, unknown.certificate).client_context(a.authority.der))
        assert await ends(r2)
        w2.close()
        # A known client is no peer, and is let go when it is removed.
        a.transport.configure([], [])
        assert await ends(reader)
        writer.close()


@scenario
async def test_a_removed_peer_is_disconnected_and_no_longer_dialled():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        for node in (a, b):
            node.transport.configure([a.peer, b.peer], [])
        a.transport.send("r1#2", b"1")
        await until(lambda: b.frames)
        b.transport.configure([], [])
        await until(lambda: not b.transport._owners)
        a.transport.configure([], [])
        a.transport.send("r1#2", b"2")
        assert a.transport.counters["not sent: unknown peer"] == 1
        assert a.transport._diallers == {}


@pytest.mark.parametrize("attack", ["gigabyte", "oversize for a client", "truncated"])
def test_a_bad_frame_closes_the_connection_and_no_other(attack):
    @scenario
    async def run():
        alice, key = client_of("alice")
        async with nodes(Node("r0#1")) as (a,):
            a.transport.configure([], [alice])
            context = Credentials(key, alice.certificate).client_context(a.authority.der)
            good_reader, good = await dial(a, context)
            bad_reader, bad = await dial(a, context)
            if attack == "truncated":
                bad.write(struct.pack(">I", 100) + b"half")
                await bad.drain()
                bad.close()
                await until(lambda: a.transport.counters["truncated frame"] == 1)
            else:
                length = 1 << 30 if attack == "gigabyte" else MAX_CLIENT_FRAME + 1
                bad.write(struct.pack(">I", length) + b"x" * 1000)
                assert await ends(bad_reader)
                bad.close()
                assert a.transport.counters["closed: oversize frame"] == 1
            good.write(struct.pack(">I", 2) + b"ok")
            await until(lambda: a.frames)
            a.transport.answer(alice.key, b"ok")
            assert await good_reader.readexactly(6)
            good.close()
            assert a.frames == [(alice.key, b"ok")]

    run()


@scenario
async def test_random_bytes_and_silence_on_the_port_disturb_nobody():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        a.transport.configure([b.peer], [])
        b.transport.configure([a.peer], [])
        host, port = a.peer.address.split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(100)]
        noisy = socket.create_connection((host, int(port)))
        noisy.sendall(b"\x16\x03\x01" + bytes(range(256)) * 100)
        b.transport.send("r0#1", b"heard")
        await until(lambda: a.frames == [("r1#2", b"heard")])
        for s in (*silent, noisy):
            s.close()


@scenario
async def test_connections_of_one_owner_are_bounded():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        a.transport.configure([b.peer], [])
        context = b.credentials.client_context(a.authority.der)
        open_ = [await dial(a, context) for _ in range(MAX_LINKS_PER_PEER + 1)]
        assert await ends(open_[0][0])
        await until(lambda: len(a.transport._crowd.of("r1#2")) == MAX_LINKS_PER_PEER)
        for _, writer in open_:
            writer.close()


def test_a_full_queue_drops_the_oldest_and_counts_it():
    from collections import Counter

    counters: Counter[str] = Counter()
    queue = SendQueue(10, counters, "dropped")
    for body in (b"aaaa", b"bbbb", b"cccc"):
        queue.put(body)
    assert counters["dropped"] == 1
    assert queue.take() == struct.pack(">I", 4) + b"bbbb" + struct.pack(">I", 4) + b"cccc"
    assert queue.take() == b""


@scenario
async def test_what_need_not_go_soon_waits_for_what_must_and_keeps_its_place():
    async with nodes(Node("r0#1"), Node("r1#2")) as (a, b):
        for node in (a, b):
            node.transport.configure([a.peer, b.peer], [])
        a.transport.send("r1#2", b"first")
        await until(lambda: b.frames)
        a.transport.send("r1#2", b"patient", soon=False)
        await asyncio.sleep(0.05)  # the time in which it must not come
        assert len(b.frames) == 1
        a.transport.send("r1#2", b"urgent")
        await until(lambda: len(b.frames) == 3)
        a.transport.send("r1#2", b"patient again", soon=False)
        a.transport.flush()
        await until(lambda: len(b.frames) == 4)
        assert [body for _, body in b.frames] == [b"first", b"patient", b"urgent", b"patient again"]
