"""A token bucket: how much of the agent one guest may use."""

from cloudfit_orchestrator.model.clock import Clock

RATE_PER_S = 8000.0  # tokens; a certificate costs one, of which a core makes about 20,000 a second
BURST = 2000.0


class TokenBucket:
    """Time-based, so a guest that has been quiet may burst. Not a safety rule."""

    def __init__(self, clock: Clock, *, rate_per_s: float = RATE_PER_S, burst: float = BURST) -> None:
        """Starts full."""
        self._clock = clock
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = burst
        self._at_s = clock.now_s()

    def take(self, tokens: float) -> float:
        """Spend `tokens`, going into debt if need be; returns the seconds to wait before the next frame is served."""
        now_s = self._clock.now_s()
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        self._tokens -= tokens
        return max(0.0, -self._tokens / self._rate_per_s)
