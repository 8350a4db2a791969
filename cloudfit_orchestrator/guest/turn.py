"""What the effects of one turn of the event loop leave to do, done once at its end: write to a socket, sync the log.

Each of these by itself would cost the loop a round of its own, which is a look at all sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

Action = Callable[[], None]


class Turn:
    """Used as a context manager the turn ends with the block; outside of one, when the loop comes round."""

    def __init__(self) -> None:
        """Nothing is due."""
        self._due: deque[Action] = deque()
        self._last: deque[Action] = deque()
        self._held = False
        self._scheduled = False

    def later(self, action: Action, *, last: bool = False) -> None:
        """Call `action` at the end of this turn; `last`: after all that is not, as it takes longer."""
        (self._last if last else self._due).append(action)
        self._schedule()

    def __enter__(self) -> None:
        self._held = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._end()
        finally:
            self._held = False
            self._schedule()  # what an error left

    def _schedule(self) -> None:
        if (self._due or self._last) and not self._held and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._scheduled_end)

    def _scheduled_end(self) -> None:
        self._scheduled = False
        with self:
            pass

    def _end(self) -> None:
        """Also what comes up meanwhile."""
        while self._due or self._last:
            (self._due or self._last).popleft()()
