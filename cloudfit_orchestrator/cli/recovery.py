"""`cloudfit recovery`: renewing replicas."""

import json
import sys
from dataclasses import asdict

import click

from cloudfit_orchestrator.cli.output import (
    EXIT_ERROR,
    Session,
    format_option,
    guarded,
    pass_session,
    print_json,
    print_table,
)
from cloudfit_orchestrator.controller.recover import recover


@click.group("recovery")
def recovery_() -> None:
    """Renewing replicas."""


@recovery_.command("start", epilog="Example: cloudfit recovery start ledger r1 --suspected")
@click.argument("group")
@click.argument("replica")
@click.option("--suspected", is_flag=True, help="Close its epoch whatever state its log is in.")
@format_option
@pass_session
@guarded
def recovery_start(session: Session, group: str, replica: str, suspected: bool, form: str) -> None:  # noqa: FBT001
    """Replace the machine of REPLICA by a clean one while the group goes on. Run again, it goes on."""
    with session.context() as context, session.home.lock(f"group-{group}"):
        done = recover(context, group, replica, suspected=suspected)
    if form == "json":
        print_json(asdict(done))
    else:
        rows = [[name.replace("_", " "), json.dumps(value)] for name, value in asdict(done).items()]
        print_table(["figure", "value"], rows)
    if done.outcome != "done":
        sys.exit(EXIT_ERROR)
