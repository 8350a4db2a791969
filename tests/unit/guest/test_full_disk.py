"""A replica without room on its disk, in a group of three processes: it is silent, says so, and comes back by itself.

The kernel itself refuses what is written (a limit of file sizes, set from outside; tests/vm has a small file system).
"""

import errno
import resource
from functools import partial

from cloudfit_orchestrator.bft.effects import Append
from cloudfit_orchestrator.bft.usig.journal import LogBody, LogMessage, decode_entry
from cloudfit_orchestrator.gateway.kv import KvClient
from cloudfit_orchestrator.guest import durable as durable_module
from cloudfit_orchestrator.guest.durable import MAX_WAITING_SIGNS, Durable
from cloudfit_orchestrator.guest.wal import WriteAheadLog
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.unit.gateway.cluster import GROUP, Cluster
from tests.unit.guest.helpers import scenario, until

TIMEOUT_S = 20
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def give_room(cluster: Cluster, replica: str, incarnation: int, *, room: bool) -> None:
    """Let the process write no file beyond its first bytes, or as much as it likes."""
    pid = cluster.processes[cluster.name(replica, incarnation)].pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, UNLIMITED if room else (1, UNLIMITED[1]))


def said(cluster: Cluster, replica: str) -> list[str]:
    return [body["state"] for who, body in cluster.topic("storage") if who == replica]


def counter(cluster: Cluster, replica: str, incarnation: int) -> int:
    return cluster.agent.table.get(Identity(GROUP, replica, incarnation)).epochs[1].cv


def settled(cluster: Cluster) -> bool:
    """No UI is under way: each member has logged what all others have certified, and has asked for none beyond it."""
    members = {f"r{i}": i + 1 for i in range(cluster.n)}
    certified = {replica: counter(cluster, replica, incarnation) for replica, incarnation in members.items()}
    for me, incarnation in members.items():
        log = WriteAheadLog(cluster.home / f"{me}-{incarnation}.state" / "wal", read_only=True)
        logged = dict.fromkeys(members, 0)
        for record in log.records():
            match decode_entry(record):
                case LogMessage(message=message) if message.c == 1:
                    logged[message.replica] = max(logged[message.replica], message.cv)
                case LogBody(c=1, cv=cv):
                    logged[me] = max(logged[me], cv)
        log.close()
        if logged != certified:
            return False
    return True


@partial(scenario, deadline_s=120)
async def test_a_replica_on_a_full_disk_stops_voting_says_so_and_votes_again_when_there_is_room():
    async with Cluster(checkpoint_period=8, window=32) as cluster, cluster.client(near="r1") as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        await kv.put(b"before", b"x")
        await until(lambda: counter(cluster, "r2", 3) > 0)
        give_room(cluster, "r2", 3, room=False)
        n = 0
        while said(cluster, "r2") != ["full"]:
            await kv.put(b"until full %d" % n, b"x")
            n += 1
        silent_at = counter(cluster, "r2", 3)
        for i in range(40):  # beyond a checkpoint, which has to be written as well
            await kv.put(b"full %d" % i, b"x")
        assert counter(cluster, "r2", 3) == silent_at, "it voted for what it cannot remember"
        assert said(cluster, "r2") == ["full"], "told again and again"
        give_room(cluster, "r2", 3, room=True)
        await until(lambda: said(cluster, "r2")[-1] == "ok", 30)
        await until(lambda: counter(cluster, "r2", 3) > silent_at, 30)
        await cluster.kill("r0", 1)  # now its vote is needed
        for i in range(10):
            await kv.put(b"after %d" % i, b"x")
        assert len([item async for item in kv.list()]) == 1 + n + 40 + 10
        for topic in ("diverged", "amnesia", "liar"):
            assert not cluster.topic(topic)


@partial(scenario, deadline_s=120)
async def test_a_replica_that_starts_on_a_full_disk_says_so_and_serves_when_there_is_room():
    async with Cluster(checkpoint_period=8, window=32) as cluster, cluster.client(near="r1") as client:
        kv = KvClient(client, timeout_s=TIMEOUT_S)
        await kv.put(b"before", b"x")
        await until(lambda: settled(cluster))  # a UI that nobody else has would be lost with the log, and r2 with it
        await cluster.kill("r2", 3)
        for path in (cluster.home / "r2-3.state").rglob("*"):  # the log's file is lost, and cannot be made
            if path.is_file():
                path.unlink()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # inherited
        try:
            await cluster.start("r2", 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await until(lambda: said(cluster, "r2") == ["unusable"], 20)
        await kv.put(b"meanwhile", b"x")
        ready = len(cluster.topic("ready"))
        give_room(cluster, "r2", 3, room=True)
        await until(lambda: said(cluster, "r2") == ["unusable", "ok"], 30)
        await until(lambda: len(cluster.topic("ready")) > ready, 30)


@scenario
async def _days(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_module, "FULL_RETRY_S", 0.01)
    full, done = True, []
    real = WriteAheadLog._write

    def write(self, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    monkeypatch.setattr(WriteAheadLog, "_write", write)
    states = []
    durable = Durable(tmp_path, lambda state, _: states.append(state), states.append)
    durable.write(Append(b"x"))
    await until(lambda: states == ["full"])
    for i in range(3 * MAX_WAITING_SIGNS):  # a checkpoint is signed again four times a second, while nothing is
        durable.after(lambda i=i: done.append(i), may_be_lost=True)
    durable.after(lambda: done.append("a counter must not be left out"))
    assert len(durable._queue) <= MAX_WAITING_SIGNS + 1
    assert durable.lost == 2 * MAX_WAITING_SIGNS
    full = False
    await until(lambda: done and done[-1] == "a counter must not be left out")
    assert done[:-1] == list(range(MAX_WAITING_SIGNS))
    assert states == ["full", "ok"]
    await durable.close()


def test_a_disk_that_is_full_for_days_fills_no_memory(tmp_path, monkeypatch):
    _days(tmp_path, monkeypatch)
