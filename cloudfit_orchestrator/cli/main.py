"""`cloudfit`: nouns first. Exit codes: 0 done or nothing to do, 2 bad usage or changes pending, 1 error."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from cloudfit_orchestrator.cli.lazy import LazyGroup, Place
from cloudfit_orchestrator.cli.output import EXIT_ERROR, Session
from cloudfit_orchestrator.controller.home import default_home
from cloudfit_orchestrator.model.errors import CloudfitError

_HERE = "cloudfit_orchestrator.cli"
_PLACES = {
    "agent": Place(f"{_HERE}.agent:agent_", "Wormhole agents."),
    "bench": Place(
        f"{_HERE}.bench:bench_",
        "Measure: throughput and latency of a group, beside etcd; checkpoints by size of state; curves.",
    ),
    "config": Place(f"{_HERE}.config:config_", "CONFIG STORAGE."),
    "demo": Place(
        f"{_HERE}.demo:demo",
        "A group over three clouds is attacked, loses a cloud, and is cleansed, on real machines.",
    ),
    "doctor": Place(f"{_HERE}.doctor:doctor", "What is there, what is missing, and the command that mends it."),
    "group": Place(f"{_HERE}.group:group_", "Replica groups."),
    "image": Place(f"{_HERE}.image:image_", "Images that machines boot."),
    "kv": Place(f"{_HERE}.kv:kv_", "The key-value service of a group."),
    "orphans": Place(
        f"{_HERE}.orphans:orphans_group",
        "Machines, disks, snapshots and networks with our tags that this home does not know any more.",
    ),
    "recovery": Place(f"{_HERE}.recovery:recovery_", "Renewing replicas."),
    "spec-schema": Place(f"{_HERE}.group:spec_schema", ""),
}


def _version() -> str:
    try:
        return version("cloudfit-orchestrator")
    except PackageNotFoundError:
        return "unknown"


@click.group(cls=LazyGroup, places=_PLACES, epilog="Example: cloudfit doctor")
@click.option("--home", type=click.Path(path_type=Path), help="Data directory; default $CLOUDFIT_HOME, or the user's.")
@click.version_option(_version(), prog_name="cloudfit")
@click.pass_context
def cli(ctx: click.Context, home: Path | None) -> None:
    """Run Byzantine fault tolerant services as virtual machines over several clouds, and keep cleansing them."""
    ctx.obj = Session(home or default_home())


def main() -> None:
    """Entry of the `cloudfit` command."""
    try:
        cli()
    except CloudfitError as error:  # raised before a command's own guard, by options
        click.echo(f"cloudfit: {error}", err=True)
        sys.exit(EXIT_ERROR)
