"""Which engine orders under which algorithm: those of this package, and others by entry point `cloudfit.ordering`.

An engine from elsewhere is a distribution with `[project.entry-points."cloudfit.ordering"]` and a line
`its-name = "package.module:Class"`, the class an `Ordering`. A record names it as its algorithm; every machine of the
group must have it installed, and so must its images.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from cloudfit_orchestrator.bft.journal import entry_decoder
from cloudfit_orchestrator.bft.messages import Frozen
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm

ENTRY_POINT = "cloudfit.ordering"
# Named, not imported: a replica loads the engine that it needs, and engines may import what is above this module.
BUILT_IN: dict[str, str] = {
    Algorithm.EBAWA: "cloudfit_orchestrator.bft.usig.ordering:UsigOrdering",
    Algorithm.MINBFT: "cloudfit_orchestrator.bft.usig.ordering:UsigOrdering",
    Algorithm.PBFT: "cloudfit_orchestrator.bft.pbft.ordering:PbftOrdering",
}


def algorithms() -> list[str]:
    """The names of all engines that are installed here."""
    return sorted({*map(str, BUILT_IN), *(point.name for point in entry_points(group=ENTRY_POINT))})


@cache
def engine(algorithm: str) -> type[Ordering]:
    """The engine of that name. Raises BadInputError if there is none, or it is none; a name of this package is never
    another's.
    """
    if algorithm in BUILT_IN:
        module, _, name = BUILT_IN[algorithm].partition(":")
        found: object = getattr(import_module(module), name)
    else:
        points = [point for point in entry_points(group=ENTRY_POINT) if point.name == algorithm]
        if len(points) != 1:
            raise BadInputError(
                f"{len(points)} engines are installed for algorithm {algorithm!r}, one is needed; "
                f"here are {', '.join(algorithms())}: install its package, or take one of these"
            )
        found = points[0].load()
    if not (isinstance(found, type) and issubclass(found, Ordering)):
        raise BadInputError(f"the engine of algorithm {algorithm!r} is {found!r}, which is no Ordering")
    return found


@cache
def any_entry_decoder() -> Callable[[bytes], Frozen]:
    """Decodes log entries of any engine of this package, for who reads a log without following its records. What it
    returns raises BadError.
    """
    return entry_decoder(tuple(dict.fromkeys(kind for name in BUILT_IN for kind in engine(name).ENTRIES)))
