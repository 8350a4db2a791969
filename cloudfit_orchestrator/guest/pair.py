"""A local process in the place of a machine without a wormhole outside (`trust: none`): what `init` does there.

`python -m …guest.pair MODULE --drive FILE --channel SOCKET --state DIR` keeps replica and agent running.
"""

import argparse
import os
import sys

from cloudfit_orchestrator.guest import init


def _start(*command: str) -> int:
    return os.posix_spawn(sys.executable, [sys.executable, "-m", *command], os.environ)


def main() -> None:
    """Run until killed, with all of the process group."""
    parser = argparse.ArgumentParser(description="Run a replica and the agent inside its machine.")
    parser.add_argument("module", help="entry module of the replica")
    for name in ("--drive", "--channel", "--state"):
        parser.add_argument(name, required=True)
    o = parser.parse_args()
    init.supervise(
        lambda: _start(o.module, "--channel", o.channel, "--state", o.state),
        lambda: _start(init.AGENT, "--drive", o.drive, "--channel", o.channel, "--state", o.state),
    )


if __name__ == "__main__":
    main()
