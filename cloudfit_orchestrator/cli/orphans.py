"""`cloudfit orphans` and `cloudfit group preflight`: what is left in clouds, and what would fail there."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

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
from cloudfit_orchestrator.controller import orphans as orphans_
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.apply import image_of
from cloudfit_orchestrator.controller.preflight import examine
from cloudfit_orchestrator.model.errors import CloudfitError


@click.group("orphans")
def orphans_group() -> None:
    """Machines, disks, snapshots and networks with our tags that this home does not know any more."""


@orphans_group.command("list", epilog="Example: cloudfit orphans list -f json")
@format_option
@pass_session
@guarded
def orphans_list(session: Session, form: str) -> None:
    """Orphans in all clouds that any group of this home ever named. Exit code 1 if a cloud cannot be looked at."""
    with session.context() as context:
        _show(orphans_.orphans(context), form)


@orphans_group.command("sweep", epilog="Example: cloudfit orphans sweep")
@format_option
@pass_session
@guarded
def orphans_sweep(session: Session, form: str) -> None:
    """Delete them. What does not carry this home's complete tags is never touched. Not beside a running operation."""
    with session.context() as context, contextlib.ExitStack() as locks:
        for row in context.journal.groups():  # an operation that runs has made what the journal does not know yet
            locks.enter_context(session.home.lock(f"group-{row.name}"))
        _show(orphans_.sweep(context), form)


def _show(found: Sequence[orphans_.Found], form: str) -> None:
    rows = [[f.cloud.name, o.kind.value, o.name, o.id] for f in found for o in f.orphans]
    problems = [(f.cloud.name, f.problem) for f in found if f.problem]
    headings = ["cloud", "kind", "name", "id"]
    if form == "json":
        named = [dict(zip(headings, row, strict=True)) for row in rows]
        print_json({"orphans": named, "problems": [{"cloud": c, "problem": p} for c, p in problems]})
    else:
        print_table(headings, rows) if rows else click.echo("no orphans")
    for cloud, problem in problems:
        click.echo(f"cloudfit: {cloud}: {problem}", err=True)
    if problems:
        sys.exit(EXIT_ERROR)


@click.command("preflight", epilog="Example: cloudfit group preflight ledger.yaml --probe")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--probe", is_flag=True, help="Also make and remove small objects, to see what is allowed.")
@format_option
@pass_session
@guarded
def preflight(session: Session, spec: Path, probe: bool, form: str) -> None:  # noqa: FBT001
    """Everything that would make a group of SPEC fail in its clouds, at once. Exit code 1 if anything would."""
    wanted = spec_file.read_spec(spec)
    with session.context() as context:
        images = {}
        for replica, _ in wanted.placement:
            try:
                images[replica] = image_of(context, wanted, replica)
            except CloudfitError as error:
                click.echo(f"cloudfit: {error.fact}", err=True)
        found = examine(context, wanted, images, probe=probe)
    headings = ["cloud", "check", "verdict", "finding", "fix"]
    rows = [[f.cloud, f.finding.name, f.finding.verdict, f.finding.finding, f.finding.fix] for f in found]
    if form == "json":
        print_json({"group": wanted.group, "findings": [dict(zip(headings, row, strict=True)) for row in rows]})
    else:
        print_table(headings, rows)
    if len(images) < wanted.n or any(f.finding.verdict == "fail" for f in found):
        sys.exit(EXIT_ERROR)
