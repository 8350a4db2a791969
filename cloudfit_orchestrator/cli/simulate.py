"""`cloudfit bench simulate`: attack simulated groups, many seeds at a time, and say what was covered."""

import sys
import time

import click

from cloudfit_orchestrator.cli.output import EXIT_ERROR, format_option, guarded, print_json, print_table
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.testing.campaign import Coverage, campaign, jobs
from cloudfit_orchestrator.testing.plan import draw
from cloudfit_orchestrator.testing.profiles import MIXED, PROFILES
from cloudfit_orchestrator.testing.shrink import Shrinker
from cloudfit_orchestrator.testing.simulator import change

PROGRESS_S = 5.0


def _changes(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, object]:
    try:
        return dict(change(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 3,5,7") from error


@click.command(
    "simulate",
    epilog="Example: cloudfit bench simulate --seeds 1000 --n 3,5 --jobs 2; "
    "cloudfit bench simulate --seeds 1 --first-seed 7 --n 3 --algorithm ebawa --shrink",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=100, show_default=True, help="So many, with each n and engine."
)
@click.option("--first-seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--n", "ns", callback=_numbers, default="3", show_default=True, metavar="LIST", help="Replicas: 3,5,7.")
@click.option(
    "--algorithm", type=click.Choice(["all", *(a.value for a in Algorithm)]), default="all", show_default=True
)
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default=MIXED, show_default=True)
@click.option("--set", "changes", multiple=True, callback=_changes, metavar="FIELD=VALUE", help="Of the profile.")
@click.option("--jobs", "processes", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--shrink", is_flag=True, help="Make the first failed run small, and say how it is replayed.")
@format_option
@guarded
def bench_simulate(
    seeds: int,
    first_seed: int,
    ns: tuple[int, ...],
    algorithm: str,
    profile: str,
    changes: dict[str, object],
    processes: int,
    *,
    shrink: bool,
    form: str,
) -> None:
    """Simulate groups under faults and attacks chosen by seeds, and check all that they promise.

    Exit code 1 if a run failed; each failure names the command that replays it event by event.
    """
    if min(ns) < 3:
        raise BadInputError(f"--n {min(ns)}: a group of so few tolerates nothing", next_command="choose 3 or more")
    algorithms = list(Algorithm) if algorithm == "all" else [Algorithm(algorithm)]
    started, told = time.monotonic(), 0.0

    def progress(coverage: Coverage) -> None:
        nonlocal told
        now = time.monotonic() - started
        if now - told >= PROGRESS_S:
            told = now
            click.echo(f"{coverage.runs} runs, {len(coverage.failures)} failed, {now:.0f} s", err=True)

    wanted = jobs(range(first_seed, first_seed + seeds), ns, algorithms, profile, changes)
    coverage = campaign(wanted, processes=processes, progress=progress)
    document = coverage.document(time.monotonic() - started)
    if shrink and coverage.failures:
        document["smallest"] = _shrink(coverage.failures[0].command)
    if form == "json":
        print_json(document)
    else:
        _print(coverage, document)
    if coverage.failures:
        sys.exit(EXIT_ERROR)


def _shrink(command: str) -> str:
    words = command.split()
    told = {name: words[i + 1] for i, name in enumerate(words) if name.startswith("--")}
    changes = dict(change(words[i + 1]) for i, name in enumerate(words) if name == "--set")
    plan = draw(int(told["--seed"]), int(told["--n"]), Algorithm(told["--algorithm"]), told["--profile"], changes)
    return Shrinker(plan).shrink().report.command


def _print(coverage: Coverage, document: dict[str, object]) -> None:
    click.echo(
        f"{coverage.runs} runs {document['runs_by_n']}, {document['runs_per_s']} a second "
        f"({document['runs_per_cpu_s']} a CPU second), {document['virtual_s']} virtual s, {coverage.events} events, "
        f"{coverage.answered} operations"
    )
    faults = sorted({fault for _, fault in coverage.pairs})
    attacks = sorted({attack for attack, _ in coverage.pairs})
    print_table(
        ["attack", *faults], [[attack, *(coverage.pairs[attack, fault] for fault in faults)] for attack in attacks]
    )
    for sort in ("fault", "rule", "check"):
        print_table([sort, "runs"], list(coverage.of(sort).items()))
    if coverage.never:
        click.echo(f"attacks that reached nobody: {', '.join(coverage.never)}")
    for failure in coverage.failures:
        click.echo(f"FAILED ({failure.kind}): {failure.fact.splitlines()[0][:200]}\n  replay: {failure.command}")
    if "smallest" in document:
        click.echo(f"smallest: {document['smallest']}")


if __name__ == "__main__":
    bench_simulate()
