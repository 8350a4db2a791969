"""`bench plot`: curves of throughput and latency of several results of `bench ordering` as one SVG."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from cloudfit_orchestrator.model.errors import BadInputError

NAMESPACE = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50  # margins
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
MAX_FILE = 64 << 20
MAX_CURVES = 14  # more are told apart by nobody


@dataclass(frozen=True, slots=True)
class Curve:
    """`points`: (operations per second, median latency in ms, callers), in the order of callers."""

    label: str
    points: tuple[tuple[float, float, int], ...]


def read_curves(path: Path) -> list[Curve]:
    """The group's curve in a JSON result, and its peer's. Raises BadInputError if the file is none."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise BadInputError(f"{path} is larger than any result")
        doc = json.loads(path.read_text())
        if doc["bench"] != "ordering":
            raise BadInputError(f"{path} is a result of bench {doc['bench']}, not of bench ordering")
        parameters, points = doc["parameters"], sorted(doc["points"], key=lambda p: p["clients"])
        curves = [Curve(f"{path.stem}: {parameters['algorithm']} n={parameters['n']}", _points(points, points))]
        peers = [p["peer"] for p in points if "peer" in p]
        if peers:
            curves.append(Curve(f"{path.stem}: {peers[0]['name']}", _points(peers, points)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{path} is no result of bench ordering: {type(error).__name__} {error}",
            next_command="cloudfit bench ordering -f json > result.json",
        ) from error
    return curves


def _points(
    figures: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]
) -> tuple[tuple[float, float, int], ...]:
    pairs = zip(figures, points, strict=True)
    return tuple((float(f["ops_s"]), float(f["p50_ms"]), int(p["clients"])) for f, p in pairs if f["p50_ms"])


def nice_step(span: float, steps: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `steps`."""
    power = 10.0 ** math.floor(math.log10(span / steps))
    return next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= steps)


def svg(curves: Sequence[Curve]) -> str:
    """Throughput to the right (linear), median latency upwards (logarithmic). Raises BadInputError without a point."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        raise BadInputError("there is no point to plot", next_command="cloudfit bench ordering --sweep 1,4,16,64,256")
    if len(curves) > MAX_CURVES:
        raise BadInputError(f"{len(curves)} curves are more than {MAX_CURVES}, which nobody tells apart")
    most = max(x for x, _, _ in points) * 1.05
    low = 10.0 ** math.floor(math.log10(min(y for _, y, _ in points)))
    high = max(10.0 ** math.ceil(math.log10(max(y for _, y, _ in points))), 10 * low)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / most
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / low) / math.log(high / low)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    step = nice_step(most, 8)
    for i in range(int(most / step) + 1):
        x, bottom = at(i * step, low)
        parts.append(_line(x, bottom, x, TOP) + _text(x, bottom + 16, f"{i * step:g}", "middle"))
    decades = round(math.log10(high / low))
    for decade in range(decades + 1):
        x, y = at(0, low * 10**decade)
        parts.append(_line(x, y, WIDTH - RIGHT, y) + _text(x - 6, y + 4, f"{low * 10**decade:g}", "end"))
    parts.append(_text(WIDTH / 2, HEIGHT - 12, "operations per second", "middle"))
    parts.append(f'<g transform="rotate(-90 16 {HEIGHT / 2})">' + _text(16, HEIGHT / 2, "median latency, ms", "middle"))
    parts.append("</g>")
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        line = " ".join("{},{}".format(*at(x, y)) for x, y, _ in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y, clients in curve.points:
            across, down = at(x, y)
            parts.append(f'<circle cx="{across}" cy="{down}" r="3.5" fill="{colour}"/>')
            parts.append(_text(across + 6, down - 6, str(clients), "start", colour))
        parts.append(_text(LEFT + 12, TOP + 16 + 16 * number, curve.label, "start", colour))
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
