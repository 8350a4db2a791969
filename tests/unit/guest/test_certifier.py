"""What the runtime asks of the wormhole, through losses, refusals and restarts of the agent's side."""

import shutil
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

from cloudfit_orchestrator.bft.effects import Certify, Report, Sign
from cloudfit_orchestrator.guest.certifier import Certifier
from cloudfit_orchestrator.guest.channel import Channel, Handlers
from cloudfit_orchestrator.guest.ports import ListeningPort
from cloudfit_orchestrator.model.channel import ErrorCode, FrameKind
from cloudfit_orchestrator.model.statement import Kind
from tests.unit.guest.fake_agent import FakeAgent
from tests.unit.guest.helpers import scenario, until


class Core:
    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))

    def named(self, name) -> list:
        return [call[1:] for call in self.calls if call[0] == name]


@asynccontextmanager
async def certifier():
    import asyncio

    home = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))
    core = Core()
    made: list[Certifier] = []
    port = ListeningPort(home / "ch")
    handlers = Handlers(
        lambda _: made[0].channel_opened(),
        lambda: made[0].channel_lost(),  # noqa: PLW0108  not made yet
        lambda _: None,
        lambda _: None,
    )
    channel = Channel(port, handlers)
    errors: list = []

    def call(method, *args):
        try:
            method(*args)
        except Exception as error:  # noqa: BLE001  what the runtime makes a crash of
            errors.append(error)

    made.append(Certifier("r0", channel, core, call, Counter()))
    core.errors = errors
    running = asyncio.create_task(channel.run())
    agent = FakeAgent(home / "ch", {"group": "g", "replica": "r0", "incarnation": 1})
    try:
        await agent.dial()
        yield made[0], core, agent
    finally:
        await made[0].close()
        await agent.drop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        port.close()
        shutil.rmtree(home)


def digest(i: int) -> bytes:
    return bytes([i]) * 32


@scenario
async def test_a_session_is_told_and_uis_are_made_in_order():
    async with certifier() as (c, core, _):
        c.want_session(1)
        c.want_session(1)
        await until(lambda: core.named("session"))
        assert core.named("session") == [(1, 1, [])]
        for i in range(1, 11):
            c.certify(Certify(1, i, digest(i)))
        await until(lambda: len(core.named("certified")) == 10)
        assert [cv for _, cv, _ in core.named("certified")] == list(range(1, 11))
        c.want_session(1)  # the core asks for one again: it wants to be told again
        await until(lambda: len(core.named("session")) == 2)
        assert core.named("session")[1][1] == 11


@scenario
async def test_a_lost_channel_is_resumed_from_recent_without_the_core():
    async with certifier() as (c, core, agent):
        c.want_session(1)
        await until(lambda: core.named("session"))
        c.certify(Certify(1, 1, digest(1)))
        await until(lambda: len(core.named("certified")) == 1)
        agent.mute = True
        for i in range(2, 5):
            c.certify(Certify(1, i, digest(i)))
        c.sign(Sign(1, Kind.REQ, bytes(8), 77))
        c.report(Report("status", {"x": 1}))
        await until(lambda: sum(kind == FrameKind.CREATE_UI for kind, _ in agent.requests) == 4)
        # The agent had certified two of them when the connection broke.
        agent.certified += [(i, digest(i), bytes([i]) * 64) for i in (2, 3)]
        await agent.drop()
        agent.mute = False
        await agent.dial()
        await until(lambda: len(core.named("certified")) == 4)
        assert [cv for _, cv, _ in core.named("certified")] == [1, 2, 3, 4]
        assert core.named("certified")[1] == (1, 2, bytes([2]) * 64)
        await until(lambda: core.named("signed") and agent.reports)
        assert len(core.named("session")) == 1
        assert core.errors == []


@scenario
async def test_a_counter_that_is_elsewhere_is_not_glossed_over():
    async with certifier() as (c, core, agent):
        c.want_session(1)
        await until(lambda: core.named("session"))
        agent.mute = True
        c.certify(Certify(1, 1, digest(1)))
        await until(lambda: any(kind == FrameKind.CREATE_UI for kind, _ in agent.requests))
        agent.certified.append((1, digest(99), bytes(64)))
        await agent.drop()
        agent.mute = False
        await agent.dial()
        await until(lambda: core.errors)
        assert "counter 1 of epoch 1" in str(core.errors[0])


@scenario
async def test_a_refusal_reaches_the_core_once_for_all_that_was_pipelined():
    async with certifier() as (c, core, agent):
        c.want_session(1)
        await until(lambda: core.named("session"))
        agent.errors[FrameKind.CREATE_UI] = (ErrorCode.FROZEN, "frozen")
        for i in range(1, 6):
            c.certify(Certify(1, i, digest(i)))
        await until(lambda: core.named("refused"))
        del agent.errors[FrameKind.CREATE_UI]
        for i in range(1, 6):
            c.certify(Certify(1, i, digest(i)))
        await until(lambda: len(core.named("certified")) == 5)
        assert core.named("refused") == [(1, ErrorCode.FROZEN)]


@scenario
async def test_a_session_refused_is_asked_for_again_and_an_unsigned_statement_dropped():
    async with certifier() as (c, core, agent):
        agent.errors[FrameKind.OPEN_SESSION] = (ErrorCode.NO_EPOCH, "not yet")
        agent.errors[FrameKind.SIGN] = (ErrorCode.LEASE_OVER, "over")
        c.want_session(2)
        c.sign(Sign(2, Kind.REQ, bytes(8), 5))
        await until(lambda: sum(kind == FrameKind.OPEN_SESSION for kind, _ in agent.requests) >= 2)
        del agent.errors[FrameKind.OPEN_SESSION]
        await until(lambda: core.named("session"))
        assert core.named("signed") == []
        assert c._statements == {}


@scenario
async def test_reports_are_plain_json_within_their_limit():
    async with certifier() as (c, _, agent):
        c.report(Report("a", {"bytes": b"\x01", "set": {2, 1}}))
        c.report(Report("b", {"long": "x" * 100_000}))
        await until(lambda: len(agent.reports) == 2)
        assert agent.reports[0] == {"topic": "a", "bytes": "01", "set": [1, 2]}
        assert agent.reports[1]["topic"] == "b"
        assert agent.reports[1]["omitted_bytes"] > 100_000


@scenario
async def test_a_flood_of_replies_and_reads_leaves_room_for_the_uis():
    """An admitted client's reads filled all that may be under way; a UI that was asked for meanwhile was not asked for
    at all, nor again, as nothing was refused: a wedge was never certified, and no successor came.
    """
    async with certifier() as (c, core, agent):
        c.want_session(1)
        await until(lambda: core.named("session"))
        agent.mute = True  # the wormhole is slow
        for token in range(3000):
            c.sign(Sign(1, Kind.READ, bytes(80), token, waits=False))
        c.certify(Certify(1, 1, digest(1)))
        c.sign(Sign(1, Kind.CHECKPOINT, bytes(40), 3001))
        await until(lambda: sum(kind == FrameKind.SIGN for kind, _ in agent.requests) > 512)
        await until(lambda: any(kind == FrameKind.CREATE_UI for kind, _ in agent.requests))
        await until(lambda: any(body[8:9] == bytes([Kind.CHECKPOINT]) for _, body in agent.requests if len(body) == 49))
