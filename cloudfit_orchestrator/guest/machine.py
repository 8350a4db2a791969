"""What the entry modules share: arguments, log lines, the network, and the end of the process."""

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.guest import network
from cloudfit_orchestrator.guest.ports import ListeningPort, Port, VirtioPort
from cloudfit_orchestrator.guest.runtime import Welcome
from cloudfit_orchestrator.model.errors import BadError, CloudfitError

_INTERFACES = Path("/sys/class/net")
_LOOPBACK = "lo"
_STARTED_S = time.clock_gettime(time.CLOCK_BOOTTIME)
EXIT_CRASHED = 70  # EX_SOFTWARE: init starts us again


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this program runs: in a virtual machine, or as a local process behind a socket."""

    port: Port
    state: Path
    local: bool

    def announce_ready(self) -> None:
        """Say on the console that the replica serves, and how many ms after power-on (a local process: its start)."""
        since_s = _STARTED_S if self.local else 0
        print(f"cloudfit: replica ready {(time.clock_gettime(time.CLOCK_BOOTTIME) - since_s) * 1000:.0f}", flush=True)

    def prepare_network(self, welcome: Welcome) -> str:
        """Configure the one interface as WELCOME says, unless this is a local process; the address to listen on."""
        address = str(welcome.network.get("address", "127.0.0.1" if self.local else ""))
        if self.local:
            return address
        interfaces = sorted(p.name for p in _INTERFACES.iterdir() if p.name != _LOOPBACK)
        if not interfaces or not address:
            raise BadError(f"WELCOME gives the address {address!r}, and the interfaces are {interfaces}")
        gateway = welcome.network.get("gateway") or None
        network.configure(interfaces[0], address, int(welcome.network.get("prefix", 24)), gateway)
        return address


def log(event: str, **fields: object) -> None:
    """One JSON line on stderr (the console's log file), which may take no more: that must not stop a replica."""
    line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, default=str)
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def run(program: Callable[[Machine], Coroutine[Any, Any, None]]) -> int:
    """Parse the arguments, run `program` on the fastest event loop there is; the exit code."""
    parser = argparse.ArgumentParser(description="A CloudFIT guest program; it is started by the guest's init.")
    parser.add_argument("--channel", type=Path, help="unix socket to listen on for the agent, instead of a virtio port")
    parser.add_argument("--own-network", action="store_true", help="all the same this is a machine with an interface")
    parser.add_argument("--state", type=Path, default=Path("/state"), help="directory of log and snapshots")
    arguments = parser.parse_args()
    port: Port = ListeningPort(arguments.channel) if arguments.channel else VirtioPort()
    machine = Machine(port, arguments.state, local=arguments.channel is not None and not arguments.own_network)
    gc.freeze()  # what is loaded stays: it need not be visited again and again
    try:
        with asyncio.Runner(loop_factory=_fast_loop()) as runner:
            runner.run(program(machine))
    except KeyboardInterrupt:
        return 130
    except CloudfitError as error:
        log("stopped", why=str(error), kind=type(error).__name__)
        return EXIT_CRASHED
    except Exception as error:  # noqa: BLE001  the process boundary: say it on the console, let init start us again
        log("crashed", why=repr(error), trace=traceback.format_exc().splitlines()[-12:])
        return EXIT_CRASHED
    return 0


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  optional: the guest runs without
    except ImportError:
        return None
    return uvloop.new_event_loop
