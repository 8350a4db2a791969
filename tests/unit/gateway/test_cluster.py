"""The whole path on one computer: client, TLS, three replica processes, their logs, a real agent."""

import asyncio
from functools import partial

from cloudfit_orchestrator.bft.messages import (
    MAX_CLIENT_FRAME,
    Bundle,
    BundleBody,
    Replies,
    Request,
    bundle_bytes,
    encode,
)
from cloudfit_orchestrator.gateway.kv import KvClient
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.unit.gateway.cluster import GROUP, Cluster
from tests.unit.guest.helpers import scenario, until

group_scenario = partial(scenario, deadline_s=120)  # view changes under load wait out doubled time-outs

TIMEOUT_S = 20


@group_scenario
async def test_writes_are_read_back_and_shared_by_bundles():
    async with Cluster(checkpoint_period=16, window=64) as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        await asyncio.gather(*(kv.put(b"k%03d" % i, b"v%d" % i) for i in range(500)))
        assert await kv.get(b"k007") == b"v7"
        assert [item async for item in kv.list(b"k")] == [(b"k%03d" % i, b"v%d" % i) for i in range(500)]
        assert await kv.delete(b"k007")
        assert await kv.get(b"k007") is None
        assert client.figures.bundles < 100
        assert client.figures.lies.total() == 0
        for replica in ("r0", "r1", "r2"):
            assert "cloudfit: replica ready" in cluster.log(replica, int(replica[1]) + 1)


@group_scenario
async def test_reads_are_answered_by_all_replicas_at_once_and_ordered_where_one_is_silent():
    async with Cluster() as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        await kv.put(b"k", b"v1")
        while client.figures.unordered < 8:  # a replica that is behind answers otherwise, and the read is ordered
            assert await asyncio.gather(*(kv.get(b"k") for _ in range(8))) == [b"v1"] * 8
        bundles = client.figures.bundles
        await cluster.kill("r2", 3)
        assert await kv.get(b"k") == b"v1"
        assert client.figures.bundles == bundles + 1
        await kv.put(b"k", b"v2")
        assert await kv.get(b"k") == b"v2"


@group_scenario
async def test_a_killed_replica_comes_back_from_its_log_and_the_group_never_stops():
    async with Cluster(checkpoint_period=8, window=32) as cluster, cluster.client(near="r1") as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        for i in range(30):
            await kv.put(b"before %d" % i, b"x")
        await cluster.kill("r2", 3)
        for i in range(30):
            await kv.put(b"during %d" % i, b"x")
        ready = len([r for r, _ in cluster.topic("ready") if r == "r2"])
        await cluster.start("r2", 3)
        await until(lambda: len([r for r, _ in cluster.topic("ready") if r == "r2"]) > ready, 20)
        await cluster.kill("r0", 1)  # now r2 is needed: its vote and its state
        for i in range(30):
            await kv.put(b"after %d" % i, b"x")
        assert len([item async for item in kv.list()]) == 90
        assert not cluster.topic("diverged")
        assert not cluster.topic("amnesia")


@group_scenario
async def test_a_replica_is_replaced_and_the_client_follows():
    async with Cluster(checkpoint_period=8, window=32) as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        for i in range(40):
            await kv.put(b"k%02d" % i, b"v")
        await cluster.launch("r0", 9)
        await cluster.reconfigure(2, 1, {"r0": 9, "r1": 2, "r2": 3})
        await cluster.kill("r0", 1)
        await kv.put(b"later", b"w")
        assert client.record.c == 2
        await until(lambda: ("r0", 2) in [(r, b["c"]) for r, b in cluster.topic("ready")], 20)
        await cluster.kill("r1", 2)
        await kv.put(b"last", b"w")
        assert len([item async for item in kv.list()]) == 42


@group_scenario
async def test_lies_are_outvoted_counted_and_attributed():
    modules = {"r1": "cloudfit_orchestrator.testing.adversary"}
    async with Cluster(checkpoint_period=8, window=32, modules=modules) as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        for i in range(20):
            await kv.put(b"k%02d" % i, b"v%d" % i)
        assert client.figures.lies.total() == 0
        cluster.agent.command(Identity(GROUP, "r1", 2), {"op": "misbehave", "how": ["replies", "digests", "disk"]})
        await until(lambda: "misbehaves" in cluster.log("r1", 2))
        for i in range(20, 60):
            await kv.put(b"k%02d" % i, b"v%d" % i)
        for i in range(60):
            assert await kv.get(b"k%02d" % i) == b"v%d" % i
        await until(lambda: client.figures.lies["r1"] > 20)
        assert set(client.figures.lies) == {"r1"}
        assert client.figures.unsigned.total() == 0
        await until(lambda: any(body["replica"] == "r1" for _, body in cluster.topic("liar")), 20)
        # Its disk, read by a recovery machine: chunk by chunk, what is sound is kept and what is not comes from peers.
        await cluster.kill("r1", 2)
        await cluster.launch("r1", 8, role=Role.RECOVERY, state="r1-2.state")
        await cluster.launch("r1", 9)
        cluster.agent.command(Identity(GROUP, "r1", 9), {"op": "base", "wait_source": True})
        cluster.agent.command(Identity(GROUP, "r1", 8), {"op": "learn", "peer": cluster.peer("r1", 9)})
        for replica, incarnation in (("r0", 1), ("r2", 3)):
            learn = {"op": "learn", "peer": cluster.peer("r1", 9)}
            cluster.agent.command(Identity(GROUP, replica, incarnation), learn)
        cluster.agent.command(Identity(GROUP, "r1", 9), {"op": "source", "peer": cluster.peer("r1", 8)})
        await until(lambda: cluster.topic("found"), 20)
        found = cluster.topic("found")[0][1]
        assert len(found["corrupt"]) > 5
        assert found["chunks"] + len(found["corrupt"]) == 1024
        await until(lambda: [r for r, _ in cluster.topic("transfer") if r == "r1"], 30)
        (transfer,) = [body for r, body in cluster.topic("transfer") if r == "r1"][-1:]
        blamed = {item["chunk"] for item in transfer["corrupt"]}
        assert blamed
        assert blamed <= set(found["corrupt"])
        assert transfer["from"]["r1#8"] > 0
        await cluster.reconfigure(2, 1, {"r0": 1, "r1": 9, "r2": 3})
        await kv.put(b"after", b"x")
        assert len([item async for item in kv.list()]) == 61


@group_scenario
async def test_frames_that_are_no_messages_hurt_nobody():
    async with Cluster() as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        await kv.put(b"a", b"1")
        body = encode(BundleBody("gg", client._public, (Request(1, b"x"),))).replace(b"gg", b"\xff\xff")
        hostile = [
            encode(Bundle(body, client._key.sign(bundle_bytes(body)))),
            encode(Bundle(b"", b"")),
            encode(Replies("gg", 1, 1, (), (), b"")).replace(b"gg", b"\xff\xff"),
            b"",
            b"\xc1",
            b"\x91" * 100_000,
            bytes(MAX_CLIENT_FRAME + 1),
        ]
        for data in hostile:
            for dialler in client._diallers.values():
                dialler.send(data)
            await kv.put(b"a", data[:10])
        assert [p.returncode for p in cluster.processes.values()] == [None] * 3


@group_scenario
async def test_a_wormhole_channel_that_breaks_again_and_again_costs_time_only():
    async with Cluster(checkpoint_period=16, window=64) as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)

        async def break_channels() -> None:
            for _ in range(5):
                for identity, (channel, task) in list(cluster.agent._channels.items()):
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    cluster.agent._channels[identity] = (channel, asyncio.create_task(channel.run()))
                await asyncio.sleep(0.2)

        breaking = asyncio.create_task(break_channels())
        for i in range(150):
            await kv.put(b"k%03d" % i, b"v")
        await breaking
        assert len([item async for item in kv.list()]) == 150
        assert [p.returncode for p in cluster.processes.values()] == [None] * 3
        assert len(cluster.topic("ready")) == 3


@group_scenario
async def test_all_replicas_are_killed_at_once_and_nothing_answered_is_lost():
    async with Cluster(checkpoint_period=8, window=32) as cluster, cluster.client() as client:
        kv = KvClient(client, timeout_s=60)
        done: list[bytes] = []

        async def write() -> None:
            for i in range(80):
                await kv.put(b"k%02d" % i, b"v")
                done.append(b"k%02d" % i)

        writing = asyncio.create_task(write())
        for threshold in (10, 45):
            await until(lambda t=threshold: len(done) >= t)
            for i in range(3):
                await cluster.kill(f"r{i}", i + 1)
            for i in range(3):
                await cluster.start(f"r{i}", i + 1)
        await writing
        assert [key async for key, _ in kv.list()] == done
        assert not cluster.topic("diverged")
        assert not cluster.topic("amnesia")
