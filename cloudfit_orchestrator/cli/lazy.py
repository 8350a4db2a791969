"""Commands that are imported when they are asked for: most of a short command's time would go into others' imports."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import click

_ROOM: Final = 6  # columns that click leaves around names


class Place(NamedTuple):
    """Where a command is, as `module:attribute`, and the first line of its help; empty if it is hidden."""

    where: str
    help: str


class _Commands(MutableMapping[str, click.Command]):
    """What click looks commands up in."""

    def __init__(self, places: dict[str, Place]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._places[name].where.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        raise TypeError(f"{name} is added where its place is written")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is removed where its place is written")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class LazyGroup(click.Group):
    """A group of commands in other modules."""

    def __init__(self, name: str | None = None, *, places: dict[str, Place], **kwargs: Any) -> None:
        """`places`: by the commands' names; all else as click's."""
        super().__init__(name, _Commands(places), **kwargs)
        self._places = places

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        """As click does it, without an import."""
        limit = formatter.width - _ROOM - max(map(len, self._places))
        rows = [
            (name, click.Command(name, help=place.help).get_short_help_str(limit))
            for name, place in sorted(self._places.items())
            if place.help
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
