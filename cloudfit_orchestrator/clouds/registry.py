"""Which drivers there are: our own in a dict, others' by the entry-point group `cloudfit.clouds`."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from cloudfit_orchestrator.clouds.base import Cloud
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError

ENTRY_POINTS = "cloudfit.clouds"
DRIVERS = {  # name -> module:class; imported when asked for, so that the process driver needs no libvirt
    "libvirt": "cloudfit_orchestrator.clouds.libvirt_cloud.driver:LibvirtCloud",
    "openstack": "cloudfit_orchestrator.clouds.openstack:OpenStackCloud",
    "process": "cloudfit_orchestrator.clouds.process:ProcessCloud",
}


def driver(name: str) -> Callable[..., Cloud]:
    """The class of the driver `name`. Raises BadInputError if there is none, PermanentError if it cannot be loaded."""
    try:
        if name in DRIVERS:
            module, _, attribute = DRIVERS[name].partition(":")
            found: Any = getattr(import_module(module), attribute)
        else:
            plugins = entry_points(group=ENTRY_POINTS, name=name)
            if not plugins:
                raise BadInputError(f"no cloud driver is named {name!r}; there are {', '.join(known_drivers())}")
            found = next(iter(plugins)).load()
    except ImportError as error:
        raise PermanentError(
            f"cloud driver {name!r} cannot be loaded: {error}", next_command="pip install what the driver names"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Cloud)):
        raise PermanentError(f"cloud driver {name!r} is {found!r}, not a subclass of Cloud")
    return found


def known_drivers() -> list[str]:
    """Names of all drivers, our own and installed plugins, sorted."""
    return sorted({*DRIVERS, *(e.name for e in entry_points(group=ENTRY_POINTS))})
