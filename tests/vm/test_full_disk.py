"""A group of three processes, one of them on a file system of a few MiB that somebody else fills: really no room."""

import subprocess
from contextlib import contextmanager
from functools import partial

import pytest

from cloudfit_orchestrator.gateway.kv import KvClient
from tests.unit.gateway.cluster import Cluster
from tests.unit.guest.helpers import scenario, until
from tests.unit.guest.test_full_disk import counter, said

SIZE_MIB = 4


@contextmanager
def small_disk(where):
    """A file system of SIZE_MIB at `where` (root)."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def fill(path):
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.vm
@partial(scenario, deadline_s=180)
async def test_a_replica_whose_file_system_is_full_is_silent_until_there_is_room(tmp_path):
    cluster = Cluster(checkpoint_period=8, window=32)
    (cluster.home / "r2-3.state").symlink_to(tmp_path / "disk")
    with small_disk(tmp_path / "disk"):
        async with cluster, cluster.client(near="r1") as client:
            kv = KvClient(client, timeout_s=20)
            await kv.put(b"before", b"x")
            filler = tmp_path / "disk" / "somebody's"
            with pytest.raises(OSError, match="No space"):
                fill(filler)
            for i in range(4):  # the log's last page has room for some
                await kv.put(b"full %d" % i, bytes(5000))
            await until(lambda: said(cluster, "r2") == ["full"], 20)
            silent_at = counter(cluster, "r2", 3)
            for i in range(40):
                await kv.put(b"full %d" % i, bytes(5000))
            assert counter(cluster, "r2", 3) == silent_at
            filler.unlink()
            await until(lambda: said(cluster, "r2") == ["full", "ok"], 30)
            await until(lambda: counter(cluster, "r2", 3) > silent_at, 30)
            await cluster.kill("r0", 1)
            for i in range(10):
                await kv.put(b"after %d" % i, b"x")
            assert not cluster.topic("diverged")
