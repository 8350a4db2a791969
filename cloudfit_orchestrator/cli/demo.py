"""`cloudfit demo`: the whole story."""

import sys
from pathlib import Path

import click

from cloudfit_orchestrator.cli.clients import Kv
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
from cloudfit_orchestrator.controller.demo import Demo, local_spec, print_summary, told_on
from cloudfit_orchestrator.controller.home import Home


@click.command("demo", epilog="Example: cloudfit demo --keep; cloudfit demo --openstack ledger.yaml")
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
