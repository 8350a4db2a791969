"""`cloudfit doctor`: what a machine needs."""

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
from cloudfit_orchestrator.controller.doctor import examine


@click.command("doctor", epilog="Example: cloudfit doctor")
@format_option
@pass_session
@guarded
def doctor(session: Session, form: str) -> None:
    """What is there, what is missing, and the command that mends it."""
    checks = examine(session.home)
    if form == "json":
        print_json({"checks": [asdict(c) for c in checks]})
    else:
        print_table(["check", "verdict", "finding", "fix"], [[c.name, c.verdict, c.finding, c.fix] for c in checks])
    if any(c.verdict == "fail" for c in checks):
        sys.exit(EXIT_ERROR)
