"""The client against a replica port that does not behave."""

import asyncio
import signal
import time
from functools import partial

import pytest

from cloudfit_orchestrator.gateway import client as module
from cloudfit_orchestrator.gateway.client import MAX_WAITING, Client
from cloudfit_orchestrator.gateway.kv import KvClient, SyncKv
from cloudfit_orchestrator.gateway.numbers import FileNumbers
from cloudfit_orchestrator.model.errors import BadError, BadInputError, TemporaryError
from cloudfit_orchestrator.model.record import seal_record
from cloudfit_orchestrator.model.signing import public_bytes
from tests.unit.gateway.cluster import Cluster
from tests.unit.guest.helpers import scenario, until

group_scenario = partial(scenario, deadline_s=120)


@group_scenario
async def test_without_a_quorum_a_request_fails_at_its_deadline_and_says_so(monkeypatch):
    async with Cluster() as cluster, cluster.client() as client:
        await KvClient(client, timeout_s=120).put(b"a", b"1")
        kv = KvClient(client, timeout_s=2)
        await cluster.kill("r1", 2)
        await cluster.kill("r2", 3)
        began = time.monotonic()
        with pytest.raises(TemporaryError, match="no 2 equal answers of g in time"):
            await kv.put(b"a", b"2")
        assert time.monotonic() - began < 6
        assert client.figures.deadlines == 1


@group_scenario
async def test_the_near_replica_may_be_gone():
    async with Cluster() as cluster:
        await cluster.kill("r0", 1)
        async with cluster.client(near="r0") as client:
            assert await KvClient(client, timeout_s=20).put(b"a", b"1")


@group_scenario
async def test_a_near_replica_that_lets_a_request_wait_is_not_asked_first_for_a_while():
    async with Cluster() as cluster, cluster.client(near="r2") as client:
        kv = KvClient(client, timeout_s=30)
        await kv.put(b"k", b"0")
        await until(lambda: client._diallers["r2"].connected)
        client._near = "r2"  # it may have been slow to begin
        stopped = cluster.processes[cluster.name("r2", 3)]
        stopped.send_signal(signal.SIGSTOP)
        try:
            await kv.put(b"k", b"1")
            assert client._bundles[-1].asked == "r2"
            await kv.put(b"k", b"2")
            assert client._bundles[-1].asked != "r2"
        finally:
            stopped.send_signal(signal.SIGCONT)


@group_scenario
async def test_limits_and_bad_records_are_refused_before_anything_is_sent(monkeypatch):
    async with Cluster() as cluster:
        async with cluster.client() as client:
            with pytest.raises(BadInputError, match="the limit is"):
                client.submit(bytes(2 << 20))
            monkeypatch.setattr(module, "MAX_WAITING", 1)
            first = client.submit(b"x")
            with pytest.raises(TemporaryError, match="wait for their answers"):
                client.submit(b"y")
            await first
            monkeypatch.setattr(module, "MAX_WAITING", MAX_WAITING)
            with pytest.raises(BadInputError, match="kv service refused"):
                await KvClient(client).put(b"\0reserved", b"x")
            assert not client.update(cluster.envelope)
            with pytest.raises(BadError):
                client.update(seal_record(cluster.record, cluster.client_key))
        stranger = Cluster()
        with pytest.raises(BadInputError, match="not admitted"):
            Client(
                cluster.envelope,
                [public_bytes(cluster.controller)],
                admitted=stranger.admitted,
                key=stranger.client_key,
            )


@group_scenario
async def test_a_program_without_an_event_loop_and_one_after_it_use_the_same_key(tmp_path):
    async with Cluster() as cluster:

        def program(value: bytes) -> bytes | None:
            with SyncKv(lambda: cluster.client(numbers=FileNumbers(tmp_path / "numbers")), timeout_s=15) as kv:
                before = kv.get(b"a")
                kv.put(b"a", value)
                assert kv.get(b"a") == value
                assert kv.list() == [(b"a", value)]
                kv.delete(b"b")
                assert kv.figures.answered == 5
                return before

        assert await asyncio.to_thread(program, b"1") is None
        assert await asyncio.to_thread(program, b"2") == b"1"
