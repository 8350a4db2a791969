"""Profiles of one thread by its CPU time: what waits costs nothing in them. They slow the thread about twofold."""

import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

TOP = 30  # functions of a profile
_PACKAGES = ("cloudfit_orchestrator", "site-packages", "python3")


def new_profile() -> cProfile.Profile:
    """To be enabled in the thread that is meant."""
    return cProfile.Profile(time.thread_time)


def top(profile: cProfile.Profile, most: int = TOP) -> list[dict[str, Any]]:
    """The functions with most CPU time of their own, most first: own and with all they call, in ms."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    chosen = sorted(stats.items(), key=lambda item: -item[1][2])[:most]
    return [
        {
            "function": f"{_short(file)}:{line} {name}" if line else name,
            "calls": calls,
            "own_ms": round(1000 * own_s, 2),
            "total_ms": round(1000 * total_s, 2),
        }
        for (file, line, name), (_, calls, own_s, total_s, _) in chosen
    ]


def _short(file: str) -> str:
    """The path below its package."""
    parts = Path(file).parts
    at = max((i for i, part in enumerate(parts) if part.startswith(_PACKAGES)), default=-1)
    return "/".join(parts[at + 1 :])
