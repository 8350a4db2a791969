"""The guest's own end of the channel against the agent's: what one writes, the other understands."""

import asyncio
from pathlib import Path

import pytest

from cloudfit_orchestrator.guest.channel import Channel, Handlers, WormholeRefusedError
from cloudfit_orchestrator.guest.ports import ListeningPort
from cloudfit_orchestrator.model.channel import CREATE_UI, EPOCH, SESSION, ErrorCode, FrameKind
from tests.unit.wormhole.world import DIGEST, GROUP, identity, world

R0 = identity("r0", 1)


def test_the_guests_channel_and_the_agent_agree_also_after_the_agent_dropped_it():
    async def scenario():
        async with asyncio.timeout(30), world() as w:
            seen, news = [], asyncio.Event()

            def saw(what):
                seen.append(what)
                news.set()

            async def until(count):
                while len(seen) < count:
                    news.clear()
                    await news.wait()

            path = f"{w.folder}/guest"
            port = ListeningPort(Path(path))
            handlers = Handlers(
                opened=lambda welcome: saw(("opened", welcome["replica"])),
                lost=lambda: saw("lost"),
                record=lambda envelope: saw(("record", envelope)),
                command=lambda body: saw(("command", body)),
            )
            channel = Channel(port, handlers)
            running = asyncio.create_task(channel.run())
            await w.agent.admit(w.order(R0, path))
            await until(1)
            prepared, active = w.activate()
            w.agent.command(R0, {"op": "retire"})
            await until(3)
            # A push takes what is newest: PREPARED may have been overtaken by its ACTIVE.
            assert seen == [("opened", "r0"), ("record", active), ("command", {"op": "retire"})]
            session, _ = SESSION.unpack(await channel.request(FrameKind.OPEN_SESSION, EPOCH.pack(1)))
            calls = [channel.request(FrameKind.CREATE_UI, CREATE_UI.pack(session, 1, cv, DIGEST)) for cv in (1, 2, 4)]
            assert [len(answer) for answer in await asyncio.gather(*calls[:2])] == [72, 72]
            with pytest.raises(WormholeRefusedError) as refused:
                await calls[2]
            assert refused.value.code is ErrorCode.WRONG_COUNTER
            await asyncio.gather(channel.request(FrameKind.ISSUE, b"no key"), return_exceptions=True)
            await until(6)  # dropped as malformed, connected and greeted again, told again
            assert seen[3:6] == ["lost", ("opened", "r0"), ("record", active)]
            with pytest.raises(WormholeRefusedError) as refused:
                await channel.request(FrameKind.CREATE_UI, CREATE_UI.pack(session, 1, 3, DIGEST))
            assert refused.value.code is ErrorCode.STALE_SESSION
            assert w.agent.table.records(GROUP).active.envelope == active
            assert prepared != active
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            port.close()

    asyncio.run(scenario())
