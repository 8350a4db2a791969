"""`cloudfit`: nouns first. Exit codes: 0 done or nothing to do, 2 bad usage or changes pending, 1 error."""

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from cloudfit_orchestrator.cli.bench import bench_
from cloudfit_orchestrator.cli.change import group_apply, group_evacuate, group_plan, group_scale
from cloudfit_orchestrator.cli.clients import Kv
from cloudfit_orchestrator.cli.orphans import orphans_group, preflight
from cloudfit_orchestrator.cli.output import (
    EXIT_ERROR,
    Session,
    format_option,
    guarded,
    pass_session,
    print_json,
    print_table,
    show_progress,
)
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.apply import active_record
from cloudfit_orchestrator.controller.demo import Demo, local_spec, print_summary, told_on
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.disks import disks
from cloudfit_orchestrator.controller.doctor import examine
from cloudfit_orchestrator.controller.home import Home, default_home
from cloudfit_orchestrator.controller.local import agent_command, agents_of_home
from cloudfit_orchestrator.controller.ports import Progress
from cloudfit_orchestrator.controller.recover import recover
from cloudfit_orchestrator.controller.survey import look
from cloudfit_orchestrator.launcher.build import build_image
from cloudfit_orchestrator.launcher.sil import find_image, list_images, verify_image
from cloudfit_orchestrator.model.errors import BadInputError, CloudfitError
from cloudfit_orchestrator.model.record import open_record, record_hash
from cloudfit_orchestrator.model.signing import public_bytes

KV_TIMEOUT_S = 30.0
IMAGES = ("replica", "recovery")  # what `image build` builds when no name is given


def _version() -> str:
    try:
        return version("cloudfit-orchestrator")
    except PackageNotFoundError:
        return "unknown"


@click.group(epilog="Example: cloudfit doctor")
@click.option("--home", type=click.Path(path_type=Path), help="Data directory; default $CLOUDFIT_HOME, or the user's.")
@click.version_option(_version(), prog_name="cloudfit")
@click.pass_context
def cli(ctx: click.Context, home: Path | None) -> None:
    """Run Byzantine fault tolerant services as virtual machines over several clouds, and keep cleansing them."""
    ctx.obj = Session(home or default_home())


cli.add_command(bench_)
cli.add_command(orphans_group)


# --- groups


@cli.group("group")
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


# --- the kv service


timeout_option = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=KV_TIMEOUT_S, show_default=True,
    metavar="SECONDS", help="Give up when f+1 replicas have not answered equally by then.",
)  # fmt: skip


@cli.group("kv")
def kv_() -> None:
    """The key-value service of a group."""


@kv_.command("put", epilog="Example: cloudfit kv put ledger colour blue")
@click.argument("group")
@click.argument("key")
@click.argument("value")
@timeout_option
@pass_session
@guarded
def kv_put(session: Session, group: str, key: str, value: str, timeout_s: float) -> None:
    """Set KEY to VALUE; returns once f+1 replicas agree."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        kv.put_many([(key.encode(), value.encode())])


@kv_.command("get", epilog="Example: cloudfit kv get ledger colour")
@click.argument("group")
@click.argument("key")
@timeout_option
@format_option
@pass_session
@guarded
def kv_get(session: Session, group: str, key: str, timeout_s: float, form: str) -> None:
    """Print the value of KEY; exit code 1 if there is none."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        (value,) = kv.get_many([key.encode()])
    if form == "json":
        text = None if value is None else base64.b64encode(value).decode()
        print_json({"group": group, "key": key, "found": value is not None, "value_base64": text})
    elif value is not None:
        sys.stdout.buffer.write(value + b"\n")
    else:
        click.echo(f"cloudfit: group {group} has no key {key}", err=True)
    if value is None:
        sys.exit(EXIT_ERROR)


@kv_.command("del", epilog="Example: cloudfit kv del ledger colour")
@click.argument("group")
@click.argument("key")
@timeout_option
@pass_session
@guarded
def kv_del(session: Session, group: str, key: str, timeout_s: float) -> None:
    """Remove KEY."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        kv.delete(key.encode())


# --- recovery


@cli.group("recovery")
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


# --- images


@cli.group("image")
def image_() -> None:
    """Images that machines boot."""


@image_.command("build", epilog="Example: cloudfit image build replica")
@click.argument("names", nargs=-1)
@format_option
@pass_session
@guarded
def image_build(session: Session, names: tuple[str, ...], form: str) -> None:
    """Build and sign images (default: replica and recovery)."""
    home, built = session.home, []
    for name in names or IMAGES:
        image = build_image(name, home.images, home.image_key(), _builder(name))
        built.append({"name": name, "digest": image.digest})
    if form == "json":
        print_json({"images": built})
    else:
        print_table(["name", "digest"], [list(b.values()) for b in built])


def _builder(name: str) -> Callable[[str], None]:
    return lambda text: show_progress(Progress("build", name, name, text))


@image_.command("verify", epilog="Example: cloudfit image verify replica")
@click.argument("reference")
@click.option("--allow-adversary", is_flag=True, help="Also judge an image that misbehaves on demand.")
@format_option
@pass_session
@guarded
def image_verify(session: Session, reference: str, allow_adversary: bool, form: str) -> None:  # noqa: FBT001
    """Verify every byte of an image: NAME, NAME@sha256:HEX, sha256:HEX, or a directory."""
    home = session.home
    path = Path(reference) if os.sep in reference else find_image(home.images, reference)
    manifest = verify_image(path, [public_bytes(home.image_key())], allow_adversary=allow_adversary)
    if form == "json":
        print_json({"reference": reference, "directory": str(path), "good": True, "manifest": asdict(manifest)})
    else:
        click.echo(f"image {manifest.name} in {path}: every byte is signed")


@image_.command("list", epilog="Example: cloudfit image list -f json")
@format_option
@pass_session
@guarded
def image_list(session: Session, form: str) -> None:
    """Images in this home's store."""
    home = session.home
    rows = [
        {
            "names": list(i.names), "digest": i.digest, "role": i.manifest.role.value if i.manifest else None,
            "adversary": i.manifest.adversary if i.manifest else None,
            "bytes": sum(p.size for p in i.manifest.parts) if i.manifest else None, "problem": i.problem,
        }
        for i in list_images(home.images, [public_bytes(home.image_key())])
    ]  # fmt: skip
    if form == "json":
        print_json({"images": rows})
    else:
        cells = [[", ".join(r["names"]), *list(r.values())[1:]] for r in rows]  # type: ignore[arg-type]
        print_table(["names", "digest", "role", "adversary", "bytes", "problem"], cells)


# --- agents


@cli.group("agent")
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


# --- configuration storage


@cli.group("config")
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


# --- the machine, the story


@cli.command("doctor", epilog="Example: cloudfit doctor")
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


@cli.command("demo", epilog="Example: cloudfit demo --keep; cloudfit demo --openstack ledger.yaml")
@click.option("--keep", is_flag=True, help="Leave the group running at the end.")
@click.option("--driver", type=click.Choice(["libvirt", "process"]), default="libvirt", hidden=True)
@click.option(
    "--openstack", "spec_path", type=click.Path(path_type=Path), metavar="SPEC",
    help="Tell it on the three clouds of this spec instead, OpenStack ones among them.",
)  # fmt: skip
@format_option
@pass_session
@guarded
def demo(session: Session, keep: bool, driver: str, spec_path: Path | None, form: str) -> None:  # noqa: FBT001
    """A group over three clouds is attacked, loses a cloud, and is cleansed, on real machines.

    The clouds are three networks of this host's libvirt, unless a spec names others. The story has a group, a home and
    a deployment of its own, and touches nothing else there.
    """
    spec = local_spec(driver) if spec_path is None else told_on(spec_file.read_spec(spec_path))
    story = Demo(session.home, spec=spec, keep=keep, kv=_demo_kv, report=show_progress)
    figures = story.run()
    if form == "table":
        print_summary(figures, print_table)
    print_json(figures)
    if not figures["good"]:
        sys.exit(EXIT_ERROR)


def _demo_kv(context: object, home: Home, group: str) -> Kv:
    return Kv(context, home, group, timeout_s=120.0)  # type: ignore[arg-type]


@cli.command("spec-schema", hidden=True)
def spec_schema() -> None:
    """JSON Schema of the spec, for editors."""
    click.echo(json.dumps(spec_file.json_schema(), indent=2))


def main() -> None:
    """Entry of the `cloudfit` command."""
    try:
        cli()
    except CloudfitError as error:  # raised before a command's own guard, by options
        click.echo(f"cloudfit: {error}", err=True)
        sys.exit(EXIT_ERROR)
