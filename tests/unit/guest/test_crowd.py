"""Clients that open connections, send, or stop reading without measure, over real TLS: the others do not notice."""

import asyncio
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest

from cloudfit_orchestrator.guest import crowd as module
from cloudfit_orchestrator.guest import transport
from cloudfit_orchestrator.guest.crowd import FILES_RESERVED, MAX_LINKS_PER_CLIENT, MIN_CLIENT_LINKS
from cloudfit_orchestrator.guest.links import FRAMES_A_TURN, Link, SendQueue
from cloudfit_orchestrator.guest.transport import MAX_HANDSHAKES
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.wormhole.tls import Credentials
from tests.fuzz.fuzz_frames import Wire
from tests.unit.guest.helpers import scenario, until
from tests.unit.guest.test_transport import Node, client_of, dial, ends, nodes

HALF_FRAME = struct.pack(">I", 1 << 20) + bytes(1000)
SILENT = 1_000  # connections that do not even begin TLS
GREEDY = 100  # connections of one key that do


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


class Known:
    """A client that `node` admits."""

    def __init__(self, name: str, node: Node) -> None:
        self.admitted, self.key = client_of(name)
        self.context: ssl.SSLContext = Credentials(self.key, self.admitted.certificate).client_context(
            node.authority.der
        )
        self.node = node

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await dial(self.node, self.context)


async def asks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> float:
    """Seconds until `question` came back."""
    began_s = time.monotonic()
    writer.write(frame(question))
    assert await asyncio.wait_for(reader.readexactly(4 + len(question)), 10) == frame(question)
    return time.monotonic() - began_s


def echo(node: Node) -> None:
    """The node answers each client with its own words."""
    node.transport._from_client = node.transport.answer


def links(node: Node, client: Known) -> int:
    return len(node.transport._crowd.of(client.admitted.key))


async def linked(node: Node, client: Known, count: int) -> None:
    """Wait until the node has seen so many connections; a client's handshake ends before the server's."""
    await until(lambda: links(node, client) == count)


async def _greedy(node: Node, client: Known, count: int) -> None:
    """Open `count` connections, never closing one."""
    opened = []

    async def some(share: int) -> None:
        for _ in range(share):
            with suppress(OSError, ssl.SSLError):
                opened.append(await client.dial())

    await asyncio.gather(*(some(count // 20) for _ in range(20)))
    await until(lambda: links(node, client) <= MAX_LINKS_PER_CLIENT)
    for _, writer in opened:
        writer.transport.abort()


def test_a_client_that_never_stops_connecting_keeps_sixteen_and_an_honest_one_is_served():
    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            honest, mallory = Known("alice", a), Known("mallory", a)
            a.transport.configure([], [honest.admitted, mallory.admitted])
            echo(a)
            reader, writer = await honest.dial()
            attack = asyncio.create_task(_greedy(a, mallory, GREEDY))
            waits_s, most = [], 0
            while not attack.done():
                waits_s.append(await asks(reader, writer, b"still there?"))
                most = max(most, links(a, mallory))
            await attack
            assert most <= MAX_LINKS_PER_CLIENT
            assert len(waits_s) > 10, "it was not served while the other connected"
            assert (
                a.transport.counters["closed: too many connections of one owner"] >= GREEDY - 2 * MAX_LINKS_PER_CLIENT
            )
            late_reader, late = await honest.dial()
            await asks(late_reader, late, b"and now?")
            late.close()
            writer.close()

    run()


def test_silent_connections_are_counted_off_and_an_honest_handshake_under_way_is_not_given_up(monkeypatch):
    monkeypatch.setattr(transport, "HANDSHAKE_TIMEOUT_S", 60)  # it waits for the whole crowd

    @partial(scenario, deadline_s=120)
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            honest = Known("alice", a)
            a.transport.configure([], [honest.admitted])
            echo(a)
            host, port = a.peer.address.split(":")
            slow = socket.create_connection((host, int(port)))  # it begins TLS only when the crowd has come
            await until(lambda: len(a.transport._handshakes) == 1)
            loop = asyncio.get_running_loop()
            silent = []
            for _ in range(SILENT):
                stranger = socket.socket()
                stranger.settimeout(0)
                stranger.bind(("127.0.0.2", 0))
                await loop.sock_connect(stranger, (host, int(port)))
                silent.append(stranger)
                if len(silent) > 100:
                    silent.pop(0).close()
            await until(lambda: a.transport.counters["refused: too many handshakes"] > SILENT - 2 * MAX_HANDSHAKES)
            assert len(a.transport._handshakes) <= MAX_HANDSHAKES + 2
            reader, writer = await asyncio.open_connection(sock=slow, ssl=honest.context, server_hostname="")
            await asks(reader, writer, b"in?")
            writer.close()
            for stranger in silent:
                stranger.close()

    run()


def test_files_are_left_for_the_disk_and_the_client_with_most_connections_gives_way(monkeypatch):
    monkeypatch.setattr(module, "raise_file_limit", lambda: FILES_RESERVED + MIN_CLIENT_LINKS + 4)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            crowd = a.transport._crowd
            honest, many = Known("alice", a), [Known(f"m{i}", a) for i in range(4)]
            a.transport.configure([], [c.admitted for c in (honest, *many)])
            echo(a)
            reader, writer = await honest.dial()
            open_ = [await client.dial() for client in many for _ in range(8)]
            reason = "closed: too many connections of all clients"
            await until(lambda: a.transport.counters[reason] == 1 + len(open_) - crowd.most)
            assert crowd.status == {"clients": 5, "client links": crowd.most}
            await asks(reader, writer, b"me?")
            for _, other in (*open_, (reader, writer)):
                other.transport.abort()
            await until(lambda: crowd.status == {"clients": 0, "client links": 0})

    run()


def test_who_comes_last_is_refused_where_nobody_has_more(monkeypatch):
    monkeypatch.setattr(module, "raise_file_limit", lambda: 0)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            clients = [Known(f"c{i}", a) for i in range(MIN_CLIENT_LINKS + 1)]
            a.transport.configure([], [c.admitted for c in clients])
            open_ = []
            for client in clients[:-1]:
                open_.append(await client.dial())
                await linked(a, client, 1)
            reader, last = await clients[-1].dial()
            assert await ends(reader)
            assert all(links(a, client) == 1 for client in clients[:-1])
            for _, writer in (*open_, (reader, last)):
                writer.transport.abort()

    run()


def test_the_process_takes_the_files_that_it_is_allowed():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000));"
        "from cloudfit_orchestrator.guest.crowd import raise_file_limit;"
        "print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "1000", "1000"]


def test_half_a_frame_and_then_nothing_ends_the_connection_and_an_idle_one_stays(monkeypatch):
    monkeypatch.setattr(module, "FRAME_TIMEOUT_S", 0.3)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            honest, mallory = Known("alice", a), Known("mallory", a)
            a.transport.configure([], [honest.admitted, mallory.admitted])
            echo(a)
            reader, writer = await honest.dial()
            attacks = [await mallory.dial() for _ in range(MAX_LINKS_PER_CLIENT)]
            for i, (_, attack) in enumerate(attacks):
                attack.write(HALF_FRAME[: 3 if i % 2 else None])  # half a length, too
            for lost, _ in attacks:
                assert await ends(lost)
            assert a.transport.counters["closed: frame not completed in time"] == MAX_LINKS_PER_CLIENT
            await asks(reader, writer, b"idle, not gone")
            for _, attack in (*attacks, (reader, writer)):
                attack.transport.abort()

    run()


def test_a_frame_that_trickles_in_byte_by_byte_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "FRAME_TIMEOUT_S", 0.3)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            mallory = Known("mallory", a)
            a.transport.configure([], [mallory.admitted])
            reader, writer = await mallory.dial()
            over = asyncio.create_task(ends(reader))
            writer.write(struct.pack(">I", 1 << 20))
            while not over.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
            assert await over
            assert a.transport.counters["closed: frame not completed in time"] == 1
            writer.transport.abort()

    run()


def held(node: Node) -> int:
    return sum(link.held for link in node.transport._owners)


def test_half_frames_of_many_connections_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIENT_BYTES", 4 << 20)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            honest, mallory = Known("alice", a), Known("mallory", a)
            a.transport.configure([], [honest.admitted, mallory.admitted])
            echo(a)
            reader, writer = await honest.dial()
            writer.write(frame(b"x" * 1000)[:500])
            attacks = [await mallory.dial() for _ in range(MAX_LINKS_PER_CLIENT)]
            for _, attack in attacks:
                attack.write(struct.pack(">I", 1 << 20) + bytes((1 << 20) - 1))
            reason = "closed: holds more memory than its share"
            await until(lambda: a.transport.counters[reason] >= MAX_LINKS_PER_CLIENT - 4)
            await until(lambda: held(a) <= 4 << 20)  # what is closed lets go a turn later
            writer.write(frame(b"x" * 1000)[500:])
            assert await asyncio.wait_for(reader.readexactly(1004), 10) == frame(b"x" * 1000)
            for _, attack in (*attacks, (reader, writer)):
                attack.transport.abort()

    run()


def test_answers_that_are_not_read_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIENT_BYTES", 4 << 20)

    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            honest, mallory = Known("alice", a), Known("mallory", a)
            a.transport.configure([], [honest.admitted, mallory.admitted])
            echo(a)
            reader, writer = await honest.dial()
            attacks = [await mallory.dial() for _ in range(MAX_LINKS_PER_CLIENT)]
            for attack, _ in attacks:
                attack._transport.pause_reading()
            await linked(a, mallory, MAX_LINKS_PER_CLIENT)
            most = 0
            reason = "closed: holds more memory than its share"
            while not a.transport.counters[reason]:
                a.transport.answer(mallory.admitted.key, bytes(64 << 10))
                most = max(most, held(a))
                await asyncio.sleep(0)
            assert most > 3 << 20, "the test has filled nothing"
            await until(lambda: held(a) <= 4 << 20)
            await asks(reader, writer, b"and I?")
            for _, attack in (*attacks, (reader, writer)):
                attack.transport.abort()

    run()


@scenario
async def test_one_connection_that_floods_leaves_the_others_their_turn():
    counters: Counter[str] = Counter()
    got: list[bytes] = []
    wires = [Wire(), Wire()]
    flood, honest = (
        Link(
            identify=lambda *_: True,
            received=lambda _, body: got.append(body),
            ended=lambda _: None,
            limit=100,
            queue=SendQueue(100, counters, "dropped"),
            counters=counters,
            turn=Turn(),
        )
        for _ in wires
    )
    for link, wire in zip((flood, honest), wires, strict=True):
        link.connection_made(wire)
    flood.data_received(frame(b"flood") * 1000)
    assert len(got) == FRAMES_A_TURN
    assert not wires[0].reading, "what is read while frames wait only makes more of them"
    honest.data_received(frame(b"honest"))
    assert got[-1] == b"honest"
    await until(lambda: len(got) == 1001)
    assert wires[0].reading
    flood.data_received(frame(b"flood") * 1000)
    flood.connection_lost(None)
    before = len(got)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(got) == before, "frames of a connection that is gone"


@pytest.mark.parametrize("n", [1, FRAMES_A_TURN, FRAMES_A_TURN + 1, 5 * FRAMES_A_TURN])
def test_frames_arrive_whole_and_in_order_however_many_come_at_once(n):
    @scenario
    async def run():
        async with nodes(Node("r0#1")) as (a,):
            alice = Known("alice", a)
            a.transport.configure([], [alice.admitted])
            _, writer = await alice.dial()
            bodies = [b"%d" % i for i in range(n)]
            writer.write(b"".join(map(frame, bodies)))
            await until(lambda: len(a.frames) == n)
            assert [body for _, body in a.frames] == bodies
            writer.transport.abort()

    run()
