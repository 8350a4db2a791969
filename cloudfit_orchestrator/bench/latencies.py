"""Latencies as a histogram of bounded size that can be added up over processes, regions and phases."""

from collections import Counter
from collections.abc import Iterable, Mapping


def rounded_us(latency_us: int) -> int:
    """To three significant digits: 0.5 % at most away, and a histogram has at most some thousand bars."""
    scale = 1
    while latency_us >= 1000 * scale:
        scale *= 10
    return (latency_us + scale // 2) // scale * scale


def histogram(latencies_us: Iterable[int]) -> dict[int, int]:
    """How often each rounded latency was seen."""
    exact = Counter(latencies_us)
    bars: Counter[int] = Counter()
    for latency_us, times in exact.items():
        bars[rounded_us(latency_us)] += times
    return dict(bars)


def added(histograms: Iterable[Mapping[int, int] | Mapping[str, int]]) -> dict[int, int]:
    """One histogram of all; keys that came through JSON as text are numbers again."""
    bars: Counter[int] = Counter()
    for one in histograms:
        for latency_us, times in one.items():
            bars[int(latency_us)] += times
    return dict(bars)


def percentile_ms(bars: Mapping[int, int], percent: float) -> float | None:
    """The smallest latency in ms that `percent` of all do not exceed (nearest rank); None if there is none."""
    total = sum(bars.values())
    if not total:
        return None
    rank, seen = max(1, -(-total * percent // 100)), 0
    for latency_us in sorted(bars):
        seen += bars[latency_us]
        if seen >= rank:
            break
    return latency_us / 1000
