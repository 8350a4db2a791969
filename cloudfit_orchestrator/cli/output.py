"""How commands speak: results on stdout, as a table or JSON; progress on stderr, as text or NDJSON; one-line errors."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import LocalSites, open_context
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.model.errors import CloudfitError

SCHEMA = 1  # of every JSON document that a command prints
EXIT_OK, EXIT_ERROR, EXIT_CHANGES_PENDING = 0, 1, 2
INTERRUPTED = "interrupted: run the same command again, it goes on where it stopped"

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Session:
    """What all commands share."""

    home_path: Path

    @property
    def home(self) -> Home:
        """The data directory, made on first use."""
        return Home(self.home_path)

    @contextmanager
    def context(self) -> Iterator[Context]:
        """A controller process; its connections end with the block."""
        context = open_context(self.home, show_progress)
        try:
            yield context
        except KeyboardInterrupt:
            context.cancelled.set()
            raise
        finally:
            if isinstance(context.sites, LocalSites):
                context.sites.close()
            context.journal.close()


pass_session = click.make_pass_decorator(Session)


def show_progress(progress: Progress) -> None:
    """One line on stderr: text for people, NDJSON where nobody watches."""
    if sys.stderr.isatty():
        line = f"{click.style(progress.stage.ljust(9), fg='cyan')} {progress.message}"
    else:
        fields = {"operation": progress.operation, "stage": progress.stage, "subject": progress.subject}
        line = json.dumps({"schema": SCHEMA, **fields, "message": progress.message, **progress.data})
    click.echo(line, err=True)


def print_json(doc: dict[str, Any]) -> None:
    """One JSON document with its schema version."""
    click.echo(json.dumps({"schema": SCHEMA, **doc}, default=str))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rich on a terminal; aligned columns elsewhere."""
    text = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415  a tenth of a second that pipes need not pay
        from rich.table import Table  # noqa: PLC0415

        table = Table(*headings)
        for row in text:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [list(headings), *text]) for i in range(len(headings))]
    for row in [list(headings), *text]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def format_option(command: _F) -> _F:
    """`-f table|json`."""
    choice = click.Choice(["table", "json"])
    return click.option("-f", "--format", "form", type=choice, default="table", show_default=True)(command)


def guarded(command: Callable[..., Any]) -> Callable[..., None]:
    """Errors become one clear message with the next command, and exit code 1; never a traceback for our own."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CloudfitError as error:
            click.echo(f"cloudfit: {error.fact}", err=True)
            if error.next_command:
                click.echo(f"  next: {error.next_command}", err=True)
            sys.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo(f"cloudfit: {INTERRUPTED}", err=True)
            sys.exit(130)

    return run
