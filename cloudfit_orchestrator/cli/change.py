"""`cloudfit group apply`, `plan` and `scale`: a group is made, and made another one, by the same command."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from cloudfit_orchestrator.cli.output import (
    EXIT_CHANGES_PENDING,
    Session,
    format_option,
    guarded,
    pass_session,
    print_json,
    print_table,
)
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.apply import Applied
from cloudfit_orchestrator.controller.change import ensure, plan
from cloudfit_orchestrator.controller.difference import Difference, evacuated, scaled
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.controller.proof import malicious_cloud, proof
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.spec import GroupSpec


@click.command("apply", epilog="Example: cloudfit group apply ledger.yaml")
@click.argument("spec", type=click.Path(path_type=Path))
@format_option
@pass_session
@guarded
def group_apply(session: Session, spec: Path, form: str) -> None:
    """Make the group be as SPEC says, also one that serves already: it grows, shrinks, moves or changes its algorithm
    while clients go on. Safe to repeat, and to interrupt. `cloudfit group plan` shows first what would change.
    """
    wanted = spec_file.read_spec(spec)
    with session.context() as context, session.home.lock(f"group-{wanted.group}"):
        done = _ensure(context, wanted)
    _show(done, form)


@click.command("plan", epilog="Example: cloudfit group plan ledger.yaml && echo as the file says")
@click.argument("spec", type=click.Path(path_type=Path))
@format_option
@pass_session
@guarded
def group_plan(session: Session, spec: Path, form: str) -> None:
    """What `apply` would change, and the placement proof: what the group survives then, and what it does not.

    Writes nothing. Exit code 0: nothing to do, 2: changes are pending, 1: error.
    """
    wanted = spec_file.read_spec(spec)
    with session.context() as context:
        found = plan(context, wanted)
    domains = proof(found.spec)
    if form == "json":
        changes = [asdict(d) for d in found.differences]
        facts = {"group": found.group, "exists": found.exists, "pending": found.pending, "changes": changes}
        trust = {"trust": found.spec.trust.value, "malicious_cloud": malicious_cloud(found.spec)}
        print_json({**facts, "proof": [asdict(d) for d in domains], **trust})
    elif not found.exists:
        click.echo(f"group {found.group} would be made: {wanted.n} replicas on {len(wanted.clouds)} clouds")
    elif found.pending:
        rows = [[d.what, d.now, d.wanted, _how(d)] for d in found.differences]
        print_table(["what", "now", "wanted", "how"], rows)
    else:
        click.echo(f"group {found.group} is as the spec says")
    if form != "json":
        rows = [[d.kind, d.name, ", ".join(d.replicas), "survived" if d.survived else "NOT survived"] for d in domains]
        print_table(["lost or taken over", "which", "replicas", f"with f={wanted.f}"], rows)
        click.echo(malicious_cloud(found.spec))
    if found.pending:
        sys.exit(EXIT_CHANGES_PENDING)


def _how(difference: Difference) -> str:
    return "new configuration" if difference.by == "configuration" else "noted, no new configuration"


@click.command("scale", epilog="Example: cloudfit group scale ledger --f 2")
@click.argument("group")
@click.option("--f", "f", type=click.IntRange(min=0), help="Faulty replicas that are tolerated; default as it is.")
@click.option("--k", "k", type=click.IntRange(min=0), help="Replicas that recover meanwhile; default as it is.")
@format_option
@pass_session
@guarded
def group_scale(session: Session, group: str, f: int | None, k: int | None, form: str) -> None:
    """Change how many faults GROUP tolerates, on the clouds that it has; replicas come and go as that needs.

    Write it into the spec file too: the next `apply` of the file makes the group what the file says.
    """
    if f is None and k is None:
        raise click.UsageError("name --f or --k")
    with session.context() as context, session.home.lock(f"group-{group}"):
        now = _known(context, group)
        wanted = scaled(now, now.f if f is None else f, now.k if k is None else k)
        done = _ensure(context, wanted)
    _show(done, form)


@click.command("evacuate", epilog="Example: cloudfit group evacuate ledger passau")
@click.argument("group")
@click.argument("cloud")
@format_option
@pass_session
@guarded
def group_evacuate(session: Session, group: str, cloud: str, form: str) -> None:
    """Give the replicas of GROUP on CLOUD to a reserve (reserve: true in the spec), also where CLOUD is lost.

    CLOUD becomes the reserve. Exchange the two in the spec file too: the next `apply` makes the group what it says.
    """
    with session.context() as context, session.home.lock(f"group-{group}"):
        done = _ensure(context, evacuated(_known(context, group), cloud))
    _show(done, form)


def _known(context: Context, group: str) -> GroupSpec:
    row = context.journal.group(group)
    if row is None:
        raise BadInputError(f"there is no group {group}", next_command="cloudfit group list")
    return spec_file.from_json(row.spec)


def _ensure(context: Context, wanted: GroupSpec) -> Applied:
    for loss in wanted.not_tolerated:
        context.report(Progress("apply", "warning", wanted.group, f"this spec does not tolerate {loss}"))
    return ensure(context, wanted)


def _show(done: Applied, form: str) -> None:
    if form == "json":
        members = [{"replica": m.replica, "incarnation": m.incarnation, "cloud": m.cloud} for m in done.members]
        facts = {"changed": done.changed, "c": done.c, "outage_s": done.outage_s, "left": list(done.left)}
        print_json({"group": done.group, **facts, "members": members})
        return
    what = "serves" if done.changed else "serves already, nothing to do"
    waited = f", clients waited {done.outage_s:.1f} s" if done.outage_s is not None else ""
    click.echo(f"group {done.group} {what}: {len(done.members)} replicas, configuration {done.c}{waited}")
    if done.left:
        click.echo(f"left behind, the next apply removes it: {', '.join(done.left)}")
