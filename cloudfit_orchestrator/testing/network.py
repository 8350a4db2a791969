"""Virtual time, and a network between machines that drops, delays, duplicates, reorders and parts.

Everything that happens in a simulation is an event of one `Schedule`; events at one moment happen in the order in which
they were planned. With the same seed the same events happen, in the same order.
"""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_IN_FLIGHT = 20_000  # frames: far more than n^2 windows; a storm of messages is a failure, not a slow run


class Schedule:
    """The virtual clock (model.clock.Clock) and what is still to happen."""

    def __init__(self) -> None:
        """Time 0, nothing planned."""
        self._now = 0.0
        self._number = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self.events = 0
        self.mark = 0  # of the times of all events so far, in order: equal runs have equal marks

    def now_s(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Plan `action`."""
        self._number += 1
        heapq.heappush(self._heap, (self._now + delay_s, self._number, action))

    def run(self, until_s: float, done: Callable[[], bool]) -> bool:
        """Let events happen until `done`, checked after each; False if it was not by the virtual time `until_s`."""
        while self._heap and self._heap[0][0] <= until_s:
            self._now, _, action = heapq.heappop(self._heap)
            self.events += 1
            self.mark = hash((self.mark, self._now))  # numbers hash alike in all processes
            action()
            if done():
                return True
        self._now = max(self._now, until_s)
        return done()


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network treats a frame. Probabilities are per frame; times in seconds."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.002  # the least
    jitter_s: float = 0.003  # mean of an exponential on top: it is what reorders
    late: float = 0.0  # probability of `late_s` on top
    late_s: float = 1.0


class Network:
    """Delivers frames between named places, or does not."""

    def __init__(self, schedule: Schedule, stream: Callable[[str], random.Random], weather: Weather) -> None:
        """`weather` may be replaced at any time; `stream` gives each way its own randomness, so that what happens on
        one changes nothing on the others.
        """
        self._schedule = schedule
        self._stream = stream
        self._ways: dict[tuple[str, str], random.Random] = {}
        self.weather = weather
        self._cuts: dict[str, tuple[frozenset[str], bool]] = {}  # name -> (hosts of one side, one way only)
        self._severed: dict[str, tuple[frozenset[str], frozenset[str]]] = {}  # name -> hosts between which nothing goes
        self.in_flight = 0
        self.delivered = 0
        self.dropped = 0

    def part(self, name: str, side: Iterable[str], *, one_way: bool = False) -> None:
        """Frames between `side` and the rest are lost until this cut heals; `one_way`: only those from `side`."""
        self._cuts[name] = frozenset(side), one_way

    def sever(self, name: str, some: Iterable[str], others: Iterable[str]) -> None:
        """Frames between these two are lost; everybody else still reaches both."""
        self._severed[name] = frozenset(some), frozenset(others)

    def heal(self, name: str | None = None) -> None:
        """Undo one cut, or all."""
        if name is None:
            self._cuts.clear()
            self._severed.clear()
        else:
            self._cuts.pop(name, None)
            self._severed.pop(name, None)

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """A frame from `source` to `target` (names of hosts). What is on its way when a partition begins is lost."""
        w = self.weather
        way = self._ways.get((source, target))
        if way is None:
            way = self._ways[source, target] = self._stream(f"way {source} {target}")
        copies = 2 if w.duplicate and way.random() < w.duplicate else 1
        for _ in range(copies):
            if (
                (w.drop and way.random() < w.drop)
                or not self._connected(source, target)
                or self.in_flight >= MAX_IN_FLIGHT
            ):
                self.dropped += 1
                continue
            delay = w.delay_s + way.expovariate(1 / w.jitter_s)
            if w.late and way.random() < w.late:
                delay += way.uniform(0, w.late_s)
            self.in_flight += 1
            self._schedule.after(delay, lambda: self._arrive(source, target, deliver))

    def _arrive(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        self.in_flight -= 1
        if self._connected(source, target):
            self.delivered += 1
            deliver()
        else:
            self.dropped += 1

    def _connected(self, source: str, target: str) -> bool:
        for side, one_way in self._cuts.values():
            if source in side and target not in side:
                return False
            if target in side and source not in side and not one_way:
                return False
        for some, others in self._severed.values():
            if (source in some and target in others) or (source in others and target in some):
                return False
        return True
