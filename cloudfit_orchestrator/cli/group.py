"""`cloudfit group`: replica groups."""

import json
from dataclasses import asdict

import click

from cloudfit_orchestrator.cli.change import group_apply, group_evacuate, group_plan, group_scale
from cloudfit_orchestrator.cli.orphans import preflight
from cloudfit_orchestrator.cli.output import Session, format_option, guarded, pass_session, print_json, print_table
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.apply import active_record
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.disks import disks
from cloudfit_orchestrator.controller.survey import look
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import open_record


@click.group("group")
def group_() -> None:
    """Replica groups."""


for command in (group_apply, group_plan, group_scale, group_evacuate, preflight):
    group_.add_command(command)


@group_.command("list", epilog="Example: cloudfit group list -f json")
@format_option
@pass_session
@guarded
def group_list(session: Session, form: str) -> None:
    """All groups of this home."""
    rows = []
    with session.context() as context:
        for row in context.journal.groups():
            wanted = spec_file.from_json(row.spec)
            envelope = context.store.active(row.name)
            c = open_record(envelope, context.trusted).c if envelope else None
            running = context.journal.open_of(row.name)
            rows.append(
                {
                    "group": row.name, "state": row.state.value, "n": wanted.n, "f": wanted.f, "k": wanted.k, "c": c,
                    "operation": f"{running.kind} {running.subject}".strip() if running else "",
                }
            )  # fmt: skip
    if form == "json":
        print_json({"groups": rows})
    else:
        print_table(["group", "state", "n", "f", "k", "c", "operation"], [list(r.values()) for r in rows])


@group_.command("show", epilog="Example: cloudfit group show ledger")
@click.argument("name")
@format_option
@pass_session
@guarded
def group_show(session: Session, name: str, form: str) -> None:
    """Members of a group: what the cloud says, whether they answer, whether what runs was verified."""
    with session.context() as context:
        row = context.journal.group(name)
        if row is None:
            raise BadInputError(f"there is no group {name}", next_command="cloudfit group list")
        wanted = spec_file.from_json(row.spec)
        record = active_record(context, name) if context.store.active(name) else None
        seen = look(context, wanted, record)
        disk = disks(context, wanted)
    if form == "json":
        facts = {"group": name, "state": row.state.value, "c": record.c if record else None, "f": wanted.f}
        print_json(
            {
                **facts,
                "not_tolerated": wanted.not_tolerated,
                "members": [{**asdict(s), "disk": disk.get((s.replica, s.incarnation), "ok")} for s in seen],
            }
        )
        return
    click.echo(
        f"group {name}: {row.state.value}, configuration {record.c if record else '-'}, f={wanted.f}, k={wanted.k}"
    )
    headings = ["replica", "role", "cloud", "address", "machine", "reachable", "verified", "epoch", "disk", "frames"]
    cells = [
        [f"{s.replica}#{s.incarnation}", s.role, s.cloud, s.address, s.machine, s.reachable, s.verified, s.epoch,
         disk.get((s.replica, s.incarnation), "ok"), sum(s.counters.values())]
        for s in seen
    ]  # fmt: skip
    print_table(headings, cells)


@group_.command("destroy", epilog="Example: cloudfit group destroy ledger")
@click.argument("name")
@click.option("--unprotect", is_flag=True, help="Also if the spec says protect: true.")
@format_option
@pass_session
@guarded
def group_destroy(session: Session, name: str, unprotect: bool, form: str) -> None:  # noqa: FBT001
    """Remove a group with all its machines, disks and networks. Safe to repeat."""
    with session.context() as context, session.home.lock(f"group-{name}"):
        gone = destroy(context, name, unprotect=unprotect)
    if form == "json":
        print_json(asdict(gone))
    elif gone.changed:
        click.echo(f"group {name} is gone: {gone.machines} machines, {gone.snapshots} snapshots")
    else:
        click.echo(f"there is no group {name}, nothing to do")


@click.command("spec-schema", hidden=True)
def spec_schema() -> None:
    """JSON Schema of the spec, for editors."""
    click.echo(json.dumps(spec_file.json_schema(), indent=2))
