import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudfit_orchestrator.bench.processes import LOOPBACK, Worker, free_ports
from cloudfit_orchestrator.bench.wan import Proxies, Wan, bound_ms, launch_target, rotation_ms
from cloudfit_orchestrator.model.errors import BadInputError

THREE = "a-b:20ms,a-c:35ms,b-c:50ms"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a-b", "is none"),
        ("a-a:5ms", "is none"),
        ("a-b:5000ms", "is none"),
        ("a-b:5ms,b-a:6ms", "twice"),
        ("a-b:5ms,b-c:6ms", "no delay is given for a-c"),
        ("a-b:1ms,a-c:1ms,a-d:1ms,b-c:1ms,b-d:1ms,c-d:1ms", "4 regions"),
    ],
)
def test_delays_that_make_no_sense_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        Wan.parse(text, 3)


def test_bound_of_ebawa_is_one_round_trip_to_the_nearest_other_replica() -> None:
    wan = Wan.parse(THREE, 3)
    # r0 decides with r1's vote at 20+20 and tells its client; r1 decides at 20, its reply is there at 40, too: f+1.
    assert bound_ms(wan, "a", "ebawa") == 40
    assert bound_ms(wan, "b", "ebawa") == 40
    assert bound_ms(wan, "c", "ebawa") == 70


def test_bound_of_minbft_goes_by_the_leader() -> None:
    wan = Wan.parse(THREE, 3)
    assert bound_ms(wan, "a", "minbft") == 40
    # b's client: to r0 at 20; r1 has the proposal at 40; r0 decides at 20+40, its reply is in b at 80.
    assert bound_ms(wan, "b", "minbft") == 80
    # c's client: to r0 at 35; r2 has the proposal at 70 and decides; r1 decides at 55, its reply is in c at 105.
    assert bound_ms(wan, "c", "minbft") == 105


def test_idle_proposers_cost_their_skips() -> None:
    wan = Wan.parse(THREE, 3)
    # r2 skips at 35; r0 has that at 70 and decides with its own vote. r1 has r2's SKIP at 85: too late to be second.
    # r2's own SKIP needs a vote of r0: at r2 35+70; the client needs r0 (70) and the faster of r1 and r2.
    assert rotation_ms(wan, "a") == 35 + 50 + 20
    assert rotation_ms(wan, "a") >= bound_ms(wan, "a", "ebawa")


def test_the_farthest_replica_has_the_longest_ways() -> None:
    assert Wan.parse(THREE, 3).farthest == "r2"


def test_proxy_delays_both_directions_and_keeps_the_order() -> None:
    wan = Wan.parse("a-b:40ms", 2)
    proxies = Proxies(wan, free_ports(Proxies.ports_needed(wan)))
    (address,) = proxies.replicas["r0"].values()
    assert proxies.clients["a"].keys() == {"r1"}
    with (
        socket.create_server((LOOPBACK, 0)) as server,
        Worker("delay proxy", "cloudfit_orchestrator.bench.proxy", {"routes": proxies.routes}) as proxy,
    ):
        proxy.answer(10)
        launch_target(proxy, "r1", f"{LOOPBACK}:{server.getsockname()[1]}")
        server.settimeout(10)
        with socket.create_connection((LOOPBACK, int(address.rpartition(":")[2])), timeout=10) as near:
            far, _ = server.accept()
            with far:
                far.settimeout(10)
                pieces = [bytes([i]) * 10_000 for i in range(50)]
                for from_, to in ((near, far), (far, near)):
                    began_s = time.monotonic()
                    for piece in pieces:
                        from_.sendall(piece)
                    got = to.recv(1)
                    assert time.monotonic() - began_s >= 0.040
                    while len(got) < 500_000:
                        got += to.recv(1 << 16)
                    assert got == b"".join(pieces)
                near.shutdown(socket.SHUT_RDWR)
                assert far.recv(1) == b""


def test_proxy_hangs_up_where_it_knows_no_target() -> None:
    wan = Wan.parse("a-b:1ms", 2)
    proxies = Proxies(wan, free_ports(Proxies.ports_needed(wan)))
    with Worker("delay proxy", "cloudfit_orchestrator.bench.proxy", {"routes": proxies.routes}) as proxy:
        proxy.answer(10)
        (address,) = proxies.replicas["r0"].values()
        with socket.create_connection((LOOPBACK, int(address.rpartition(":")[2])), timeout=10) as near:
            assert near.recv(1) == b""


def test_replicas_that_are_launched_at_once_all_reach_the_proxy() -> None:
    wan = Wan.parse("a-b:1ms", 2)
    proxies = Proxies(wan, free_ports(Proxies.ports_needed(wan)))
    with (
        Worker("proxy", "cloudfit_orchestrator.bench.proxy", {"routes": proxies.routes}) as proxy,
        ThreadPoolExecutor(3) as pool,
    ):
        assert proxy.answer(30) == {"ready": True}
        for _ in range(300):  # the last of three is the one whose answer another may have taken
            told = [pool.submit(launch_target, proxy, f"r{n}", f"{LOOPBACK}:{9000 + n}") for n in range(3)]
            for one in told:
                one.result()
