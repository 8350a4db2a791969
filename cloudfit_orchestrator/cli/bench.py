"""`cloudfit bench`: measure on this host, with real processes. Exit code 1 also where an operation failed."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from cloudfit_orchestrator.bench import ordering, plot, standing, state
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
from cloudfit_orchestrator.cli.simulate import bench_simulate
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm

_DEFAULT = ordering.Parameters()
_OF_OWN = {"algorithm": "--algorithm", "n": "-n"}  # what a --group has from its spec
_directory_option = click.option(
    "--directory", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path(),
    help="Where temporary files live; on a disk. Default: the working directory.",
)  # fmt: skip


@click.group("bench", epilog="Example: cloudfit bench ordering --clients 64 --against etcd")
def bench_() -> None:
    """Measure: throughput and latency of a group, beside etcd; checkpoints by size of state; curves."""


bench_.add_command(bench_simulate)


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`1,4,16` as numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,4,16,64") from error


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a measurement as Ctrl-C does: with everything torn down, and nothing to go on with."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        click.echo("cloudfit: interrupted; what the measurement made is gone", err=True)
        sys.exit(128 + signal.SIGINT)


@bench_.command(
    "ordering",
    epilog="Example: cloudfit bench ordering --clients 64 --against etcd --repeat 3 -f json > ours.json; "
    "cloudfit bench ordering --sweep 1,4,16,64,256; "
    "cloudfit bench ordering --wan a-b:20ms,a-c:35ms,b-c:50ms --clients 48 --stop-slowest; "
    "cloudfit bench ordering --group ledger --sweep 1,64",
)
@click.option(
    "--algorithm", type=click.Choice([a.value for a in Algorithm]), default=_DEFAULT.algorithm, show_default=True
)
@click.option("-n", "n", type=int, default=_DEFAULT.n, show_default=True, help="Replicas; f is (n-1)/2, pbft: (n-1)/3.")
@click.option("--clients", type=int, default=_DEFAULT.sweep[0], show_default=True, help="Concurrent callers, all told.")
@click.option("--sweep", callback=_numbers, metavar="LIST", help="Several numbers of callers in turn: 1,4,16,64,256.")
@click.option("--processes", type=int, help="Client processes with a key each; default 1, with --wan one a region.")
@click.option("--payload", type=int, default=_DEFAULT.payload, show_default=True, help="Bytes of a value.")
@click.option("--keys", type=int, default=_DEFAULT.keys, show_default=True, help="Size of the key space.")
@click.option(
    "--reads", type=int, default=_DEFAULT.reads, show_default=True, help="Percent of reads, as the SDK reads."
)
@click.option("--duration", type=float, default=_DEFAULT.duration_s, show_default=True, help="Seconds of one round.")
@click.option("--warmup", type=float, default=_DEFAULT.warmup_s, show_default=True, help="Seconds before, not counted.")
@click.option("--repeat", type=int, default=_DEFAULT.repeat, show_default=True, help="Rounds; medians are reported.")
@click.option("--against", type=click.Choice(["etcd"]), help="Alternate rounds with this peer, three members.")
@click.option("--wan", metavar="DELAYS", help="Regions and one-way delays: a-b:20ms,a-c:35ms,b-c:50ms.")
@click.option("--profile", is_flag=True, help="One more round, profiled and not counted: where the CPU time goes.")
@click.option("--stop-slowest", is_flag=True, help="With --wan: the farthest replica stands still for half of a round.")
@click.option("--group", metavar="NAME", help="No group of its own: one that serves already. Its state keeps the keys.")
@_directory_option
@format_option
@pass_session
@guarded
def bench_ordering(
    session: Session, directory: Path, form: str, group: str | None, clients: int, sweep: tuple[int, ...] | None,
    duration: float, warmup: float, **others: Any,
) -> None:  # fmt: skip
    """A closed loop of puts on a group of processes: operations per second, latency, CPU, messages, and a peer's.

    Everything that it makes is gone afterwards, also after Ctrl-C, but for what it puts into a --group that is not its
    own; of such a group only what a client sees is told, and the CPU time of machines on this host. The values of
    cpu_ms_per_op are of all servers together; others_cpu_share tells how much of the machine somebody else used
    meanwhile.
    """
    parameters = ordering.Parameters(sweep=sweep or (clients,), duration_s=duration, warmup_s=warmup, **others)
    if group is not None and (given := [option for name, option in _OF_OWN.items() if _asked_for(name)]):
        raise BadInputError(
            f"{', '.join(given)} cannot be had with --group: group {group} is measured as its spec says",
            next_command="leave out one of the two",
        )
    with _interruptible():
        if group is None:
            found = ordering.run(parameters, directory.absolute(), show_progress)
        else:
            with session.context() as context:
                found = standing.run(context, session.home, group, parameters, show_progress)
    if form == "json":
        print_json(found)
    else:
        _print_points(found)
    if not found["good"]:
        sys.exit(EXIT_ERROR)


def _asked_for(parameter: str) -> bool:
    """Whether the command line names it, rather than its default holding."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def _print_points(found: dict[str, Any]) -> None:
    machine, points = found["machine"], found["points"]
    about = f"{machine['cores']} cores, {machine['cpu']}, {machine['file_system']}, kernel {machine['kernel']}"
    click.echo(f"{found['parameters']['algorithm']}, n={found['parameters']['n']}, on {about}")
    figures = ["ops_s", "p50_ms", "p99_ms", "cpu_ms_per_op"]
    more = ["msgs_per_op", "bytes_per_op", "fsyncs_per_s", "ops_per_bundle"]
    rows = []
    for point in points:
        rows.append(["group", point["clients"], *(point[f] for f in (*figures, *more)), point["errors"]])
        for region, seen in point.get("regions", {}).items():
            rows.append([f"  region {region}", "", seen["ops_s"], seen["p50_ms"], seen["p99_ms"], *[""] * 6])
            rows.append([f"  bound {region}", "", "", seen["bound_ms"], *[""] * 7])
        if "peer" in point:
            peer = point["peer"]
            rows.append([peer["name"], point["clients"], *(peer[f] for f in figures), *[""] * 4, peer["errors"]])
            rows.append(["ratio", "", point["ratio"], *[""] * 8])
    print_table(["", "clients", *figures, *more, "errors"], rows)
    for point in points:
        for name, rows in point.get("profile", {}).items():
            click.echo(f"{name}, {point['clients']} clients:")
            _print_profile(rows)
        for one in point["rounds"]:
            for who, seen in one.items():
                if seen["errors"]:
                    click.echo(
                        f"{who}, {point['clients']} clients: {seen['errors']} errors: {seen['first_error']}", err=True
                    )


def _print_profile(rows: list[dict[str, Any]]) -> None:
    print_table(["function", "calls", "own_ms", "total_ms"], [list(row.values()) for row in rows])


@bench_.command("state", epilog="Example: cloudfit bench state --sizes 10MB,100MB,1GB --changed 1000 -f json")
@click.option("--sizes", default="10MB,100MB,1GB", show_default=True, metavar="LIST", help="Sizes of the state.")
@click.option("--changed", type=int, default=1000, show_default=True, help="Keys that change between checkpoints.")
@click.option("--value", type=int, default=1000, show_default=True, help="Bytes of a value.")
@click.option("--repeat", type=int, default=5, show_default=True, help="Checkpoints; medians are reported.")
@_directory_option
@format_option
@guarded
def bench_state(sizes: str, changed: int, value: int, repeat: int, directory: Path, form: str) -> None:
    """What a checkpoint costs by size of state: digest and snapshot, and what is written to disk."""
    wanted = [state.parse_size(text) for text in sizes.split(",")]
    with _interruptible():
        found = state.run(
            wanted, changed, value=value, repeat=repeat, directory=directory.absolute(), report=show_progress
        )
    if form == "json":
        print_json(found)
        return
    figures = ["change_ms", "checkpoint_ms", "checkpoint_cpu_ms", "save_ms", "save_cpu_ms", "written_mb", "rss_mb"]
    print_table(
        ["size_mb", "keys", *figures], [[p["size_mb"], p["keys"], *(p[f] for f in figures)] for p in found["points"]]
    )
    for name, factor in found["growth"].items():
        verdict = "flat" if found["flat"][name] else "NOT flat"
        click.echo(f"{name}: {factor} times the CPU time from the smallest to the largest state: {verdict}")
    _print_profile(found["profile"])


@bench_.command("plot", epilog="Example: cloudfit bench plot ebawa.json minbft.json -o curves.svg")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="SVG file.")
@guarded
def bench_plot(files: tuple[Path, ...], output: Path) -> None:
    """Throughput and latency of several results of `bench ordering -f json`, best made with --sweep."""
    drawing = plot.svg([curve for file in files for curve in plot.read_curves(file)])
    try:
        output.write_text(drawing)
    except OSError as error:
        raise BadInputError(f"cannot write {output}: {error.strerror}", next_command="name another by -o") from error
