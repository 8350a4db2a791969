"""What is missing, for `catchup.py` to fetch; filled anew on every `Configuration.advance`."""

from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.usig.merge import Missing


@dataclass(slots=True)
class Wanted:
    """Batches by digest, NEW-VIEWs by view, streams up to a counter. Who cites a part of a stream has it, if it is
    correct: `citers` by stream.
    """

    batches: set[bytes] = field(default_factory=set)
    views: set[int] = field(default_factory=set)
    streams: dict[str, int] = field(default_factory=dict)
    citers: dict[str, set[str]] = field(default_factory=dict)

    def clear(self) -> None:
        """Nothing is missing."""
        self.batches.clear()
        self.views.clear()
        self.streams.clear()
        self.citers.clear()

    def stream(self, replica: str, cv: int, citer: str = "") -> None:
        """A stream is needed up to `cv`, perhaps since `citer` cites it."""
        self.streams[replica] = max(cv, self.streams.get(replica, 0))
        if citer not in ("", replica):
            self.citers.setdefault(replica, set()).add(citer)

    def add(self, missing: Missing, citer: str = "") -> None:
        """Take the needs of a merge in, perhaps one that `citer` has made."""
        self.batches.update(missing.batches)
        self.views.update(missing.views)
        for replica, cv in missing.streams:
            self.stream(replica, cv, citer)
