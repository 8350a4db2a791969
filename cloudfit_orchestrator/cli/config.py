"""`cloudfit config`: CONFIG STORAGE."""

import sys

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
from cloudfit_orchestrator.model.record import open_record, record_hash


@click.group("config")
def config_() -> None:
    """CONFIG STORAGE."""


@config_.command("log", epilog="Example: cloudfit config log ledger")
@click.argument("group")
@format_option
@pass_session
@guarded
def config_log(session: Session, group: str, form: str) -> None:
    """The chain of configuration records of GROUP, oldest first."""
    rows = []
    with session.context() as context:
        for entry in context.store.log(group):
            r = open_record(entry.envelope, context.trusted)
            members = " ".join(f"{m.replica}#{m.incarnation}" for m in r.members)
            hashed = record_hash(entry.envelope).hex()[:16]
            rows.append([entry.sequence, r.c, r.base, r.status.value, r.h, len(r.confirmations), members, hashed])
    headings = ["sequence", "c", "base", "status", "h", "confirmations", "members", "hash"]
    if form == "json":
        print_json({"group": group, "records": [dict(zip(headings, row, strict=True)) for row in rows]})
    else:
        print_table(headings, rows)


@config_.command("verify", epilog="Example: cloudfit config verify ledger")
@click.argument("group")
@format_option
@pass_session
@guarded
def config_verify(session: Session, group: str, form: str) -> None:
    """Check every signature, link and confirmation of GROUP's chain, and that it was not rolled back."""
    with session.context() as context:
        verdict = context.store.verify(group, context.journal.head(group))
    if form == "json":
        facts = {"good": verdict.good, "records": verdict.records, "active_c": verdict.active_c}
        print_json({"group": group, **facts, "bad_link": verdict.bad_link, "reason": verdict.reason})
    elif verdict.good:
        click.echo(f"group {group}: {verdict.records} records hold, configuration {verdict.active_c} is ACTIVE")
    else:
        click.echo(f"cloudfit: group {group}: record {verdict.bad_link}: {verdict.reason}", err=True)
        click.echo("  next: restore config.sqlite from a copy that verifies", err=True)
    if not verdict.good:
        sys.exit(EXIT_ERROR)
