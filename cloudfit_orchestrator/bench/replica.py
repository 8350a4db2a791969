"""A replica as it is measured: the very runtime of `guest`, which says its figures on its log at SIGUSR1, and profiles
its event loop from one SIGUSR2 to the next. It dials its peers through a delay proxy where `--routes FILE` says so:
JSON, {replica: {peer's replica: host:port}}.
"""

import argparse
import asyncio
import cProfile
import json
import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.bench.profiles import new_profile, top
from cloudfit_orchestrator.bft.situation import Peer
from cloudfit_orchestrator.guest import machine, tls
from cloudfit_orchestrator.guest.runtime import Runtime
from cloudfit_orchestrator.guest.transport import Transport
from cloudfit_orchestrator.model.record import Client


class MeasuredTransport(Transport):
    """Counts what is sent to peers, and dials them elsewhere than the record says."""

    def __init__(self, routes: dict[str, str], **arguments: Any) -> None:
        """`routes`: `host:port` by the peer's replica."""
        super().__init__(**arguments)
        self._routes = routes
        self.sent_messages = 0
        self.sent_bytes = 0

    def send(self, peer_id: str, body: bytes, *, soon: bool = True) -> None:
        """See `Transport`."""
        self.sent_messages += 1
        self.sent_bytes += len(body)
        super().send(peer_id, body, soon=soon)

    def configure(self, peers: Iterable[tls.Peer], clients: Iterable[Client]) -> None:
        """See `Transport`."""
        routed = [
            Peer(p.peer_id, self._routes.get(p.peer_id.partition("#")[0], p.address), p.channel_ca) for p in peers
        ]
        super().configure(routed, clients)


def figures(runtime: Runtime) -> dict[str, Any]:
    """Counts since the start. To be asked of a runtime that greets nobody any more."""
    transport = runtime.transport
    assert isinstance(transport, MeasuredTransport)
    return {
        "sent_messages": transport.sent_messages,
        "sent_bytes": transport.sent_bytes,
        "log_syncs": runtime.durable.syncs,
        "status": runtime.replica.status,
        "transport": dict(transport.counters),
        "runtime": dict(runtime.counters),
    }


class Profiler:
    """On, off and said, on again."""

    def __init__(self) -> None:
        """Off."""
        self._profile: cProfile.Profile | None = None

    def turn(self) -> None:
        """To be called in the thread that is meant."""
        if self._profile is None:
            self._profile = new_profile()
            self._profile.enable()
        else:
            self._profile.disable()
            machine.log("profile", top=top(self._profile))
            self._profile = None


async def replica(where: machine.Machine, *, routes: dict[str, dict[str, str]]) -> None:
    """Run the replica of this machine."""

    def transport(**arguments: Any) -> Transport:
        return MeasuredTransport(routes.get(runtime.welcome.replica, {}), **arguments)

    runtime = Runtime(
        port=where.port,
        state=where.state,
        prepare_network=where.prepare_network,
        announce_ready=where.announce_ready,
        log=machine.log,
        make_transport=transport,
    )
    loop, profiler = asyncio.get_running_loop(), Profiler()
    loop.add_signal_handler(signal.SIGUSR1, lambda: machine.log("figures", **figures(runtime)))
    loop.add_signal_handler(signal.SIGUSR2, profiler.turn)
    await runtime.run()


def main() -> int:
    """Take the own option away; the others are every guest's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--routes", type=Path)
    own, sys.argv[1:] = parser.parse_known_args()
    routes = json.loads(own.routes.read_text()) if own.routes else {}
    return machine.run(partial(replica, routes=routes))


if __name__ == "__main__":
    sys.exit(main())
