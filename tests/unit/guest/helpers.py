"""What asynchronous tests share."""

import asyncio
import functools
from collections.abc import Callable


def scenario(test, deadline_s: float = 30):
    """Run a coroutine function as a test, under a deadline."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), deadline_s))

    return run


async def until(condition: Callable[[], object], deadline_s: float = 60) -> None:
    """Wait for what another task or process brings about."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.005)
