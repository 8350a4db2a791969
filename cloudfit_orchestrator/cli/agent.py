"""`cloudfit agent`: wormhole agents."""

import os

import click

from cloudfit_orchestrator.cli.output import Session, format_option, guarded, pass_session, print_json, print_table
from cloudfit_orchestrator.controller.local import agent_command, agents_of_home


@click.group("agent")
def agent_() -> None:
    """Wormhole agents."""


@agent_.command("run", epilog="Example: cloudfit agent run lisbon")
@click.argument("cloud")
@pass_session
@guarded
def agent_run(session: Session, cloud: str) -> None:
    """Run the agent of a local cloud in the foreground."""
    command = agent_command(session.home, cloud)
    os.execv(command[0], command)  # noqa: S606  our own interpreter and module


@agent_.command("status", epilog="Example: cloudfit agent status -f json")
@format_option
@pass_session
@guarded
def agent_status(session: Session, form: str) -> None:
    """The agents that this home runs."""
    found = agents_of_home(session.home)
    if form == "json":
        print_json({"agents": found})
        return
    cells = [[a["cloud"], a["running"], a.get("pid", ""), len(a.get("guests", [])), a.get("reason", "")] for a in found]
    print_table(["cloud", "running", "pid", "guests", "reason"], cells)
