"""What is missing, for `catchup.py` to fetch; filled anew on every `Configuration.advance`."""

from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.usig.merge import Missing


@dataclass(slots=True)
class Wanted:
    """Batches by digest, NEW-VIEWs by view, streams up to a counter."""

    batches: set[bytes] = field(default_factory=set)
    views: set[int] = field(default_factory=set)
    streams: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Nothing is missing."""
        self.batches.clear()
        self.views.clear()
        self.streams.clear()

    def stream(self, replica: str, cv: int) -> None:
        """A stream is needed up to `cv`."""
        self.streams[replica] = max(cv, self.streams.get(replica, 0))

    def add(self, missing: Missing) -> None:
        """Take a merge's needs in."""
        self.batches.update(missing.batches)
        self.views.update(missing.views)
        for replica, cv in missing.streams:
            self.stream(replica, cv)
