"""What guests told the controller: a ring for each guest, so that a talkative one displaces only its own words."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from cloudfit_orchestrator.wormhole.identity import Identity

MAX_REPORTS = 4096  # of one guest
MAX_REPORT_BYTES = 1 << 20  # of one guest
ENTRY_BYTES = 256  # what a report costs beyond its body, in memory and in an answer
MAX_PAGE_BYTES = 1 << 20  # of one answer to the controller, whose lines have at most 2 MiB


@dataclass(frozen=True, slots=True)
class Report:
    """One report; `seq` grows by one with each report of any guest here."""

    seq: int
    guest: Identity
    topic: str
    body: dict[str, Any]
    size: int  # bytes, with ENTRY_BYTES


class _Ring:
    def __init__(self) -> None:
        self.items: deque[Report] = deque()
        self.size = 0

    def add(self, report: Report) -> int:
        self.items.append(report)
        self.size += report.size
        dropped = 0
        while len(self.items) > MAX_REPORTS or self.size > MAX_REPORT_BYTES:
            self.size -= self.items.popleft().size
            dropped += 1
        return dropped


class Reports:
    """All guests' rings. `since` is a sequence number; a gap in the numbers means that reports were dropped."""

    def __init__(self) -> None:
        self._rings: dict[Identity, _Ring] = {}
        self._next = 1
        self._news = asyncio.Event()

    def add(self, guest: Identity, topic: str, body: dict[str, Any], size: int) -> int:
        """Keep a report, `size` bytes of JSON; returns how many older ones of this guest gave way."""
        report = Report(self._next, guest, topic, body, size + ENTRY_BYTES)
        self._next += 1
        self._news.set()
        self._news = asyncio.Event()
        return self._rings.setdefault(guest, _Ring()).add(report)

    def forget(self, guest: Identity) -> None:
        """Drop the reports of an evicted guest."""
        self._rings.pop(guest, None)

    def page(self, since: int, group: str | None) -> tuple[list[Report], int]:
        """Reports with seq > since, oldest first, at most MAX_PAGE_BYTES; and the `since` of the next call."""
        found = sorted(
            (
                r
                for guest, ring in self._rings.items()
                if group in (None, guest.group)
                for r in ring.items
                if r.seq > since
            ),
            key=lambda r: r.seq,
        )
        size = 0
        for count, report in enumerate(found):
            size += report.size
            if count and size > MAX_PAGE_BYTES:
                return found[:count], found[count - 1].seq
        return found, self._next - 1

    async def wait(self, since: int, group: str | None, wait_s: float) -> tuple[list[Report], int]:
        """Like `page`, but waits for a first report up to `wait_s` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            news = self._news
            found, following = self.page(since, group)
            if found or loop.time() >= deadline:
                return found, following
            try:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
            except TimeoutError:
                continue
