"""Finds a service by the name that a group's spec and its configuration records carry."""

import importlib

from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.services.counter import CounterService
from cloudfit_orchestrator.services.kv import KvService

_OWN: dict[str, type[Service]] = {"kv": KvService, "counter": CounterService}


def load(name: str) -> Service:
    """A fresh service: `kv`, `counter`, or `package.module:Class` of an installed package, made without arguments.

    Raises BadInputError if there is none of that name.
    """
    own = _OWN.get(name)
    if own is not None:
        return own()
    module_name, colon, class_name = name.partition(":")
    if not colon or not module_name or not class_name.isidentifier():
        raise BadInputError(
            f"unknown service {name!r}", next_command=f"use one of {', '.join(_OWN)}, or package.module:Class"
        )
    try:
        made = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise BadInputError(
            f"service {name!r} cannot be loaded: {error}", next_command="install its package into the replica image"
        ) from error
    if not callable(getattr(made, "execute", None)):
        raise BadInputError(f"service {name!r} has no execute(store, operation)")
    service: Service = made
    return service
