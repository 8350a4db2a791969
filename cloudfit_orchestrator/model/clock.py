"""Time as a parameter. Safety never depends on it."""

from typing import Protocol


class Clock(Protocol):
    """A monotonic clock, seconds."""

    def now_s(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...
