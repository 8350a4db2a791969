"""The replica's entry: `python3 -I -m cloudfit_orchestrator.guest [--channel PATH] [--state DIR]`."""

import sys

from cloudfit_orchestrator.guest import machine
from cloudfit_orchestrator.guest.runtime import Runtime


async def replica(where: machine.Machine) -> None:
    """Run the replica of this machine."""
    await Runtime(
        port=where.port,
        state=where.state,
        prepare_network=where.prepare_network,
        announce_ready=where.announce_ready,
        log=machine.log,
    ).run()


if __name__ == "__main__":
    sys.exit(machine.run(replica))
