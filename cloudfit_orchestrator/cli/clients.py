"""Clients of a group for commands: they follow its configuration through this home's CONFIG STORAGE."""

import asyncio

from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.gateway.client import Client
from cloudfit_orchestrator.gateway.kv import SyncKv
from cloudfit_orchestrator.gateway.numbers import FileNumbers
from cloudfit_orchestrator.model.errors import PermanentError


def make_client(context: Context, home: Home, group: str) -> Client:
    """A client of `group` with this home's operator key. Raises PermanentError if the group has no configuration."""
    envelope = context.store.active(group)
    if envelope is None:
        raise PermanentError(f"group {group} has no ACTIVE configuration", next_command="cloudfit group list")
    identity = home.client()

    async def newest() -> bytes | None:
        return await asyncio.to_thread(context.store.active, group)

    return Client(
        envelope,
        context.trusted,
        admitted=identity.public,
        key=identity.key,
        numbers=FileNumbers(home.client_numbers(group, identity.name)),
        newer=newest,
    )


class Kv(SyncKv):
    """The kv service of a group, by this home's operator. Connects when entered."""

    def __init__(self, context: Context, home: Home, group: str, *, timeout_s: float) -> None:
        """`timeout_s`: of each operation."""
        super().__init__(lambda: make_client(context, home, group), timeout_s=timeout_s)

    @property
    def lies(self) -> dict[str, int]:
        """Wrong results with a good signature, by replica."""
        return dict(self.figures.lies)
