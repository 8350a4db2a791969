"""Blocking calls side by side: one thread for each of a few clouds, and one watcher for each agent's reports."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import TypeVar

from cloudfit_orchestrator.controller.agents import Report
from cloudfit_orchestrator.controller.ports import Agent, Context
from cloudfit_orchestrator.model.errors import UnknownError

MAX_THREADS = 64  # one a cloud; a spec names no more
REPORT_WAIT_S = 0.25  # how long one call waits in the agent for news; bounds how late the end is noticed
RETRY_S = 0.5  # after an agent did not answer

_K = TypeVar("_K")
_T = TypeVar("_T")


def each(context: Context, keys: Iterable[_K], act: Callable[[_K], _T]) -> dict[_K, _T]:
    """`act` of every key, side by side. Raises the first error in the order of keys, after all have ended.

    An interrupt stops what has not begun and waits for the calls under way, which are bounded by their drivers.
    """
    wanted = list(keys)
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(MAX_THREADS, len(wanted))) as pool:
        futures = {key: pool.submit(_guarded, context, act, key) for key in wanted}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            context.cancelled.set()
            for future in futures.values():
                future.cancel()
            raise
    return {key: future.result() for key, future in futures.items()}


def _guarded(context: Context, act: Callable[[_K], _T], key: _K) -> _T:
    context.check_cancelled()
    return act(key)


def watch(
    context: Context,
    agents: Mapping[str, Agent],
    group: str,
    handle: Callable[[Report], bool],
    *,
    timeout_s: float,
    waiting_for: Callable[[], str],
) -> None:
    """Hand every report of `group` to `handle`, until it returns True. It sees one report at a time, old ones too.

    Raises UnknownError after `timeout_s`, naming what `waiting_for` says; an agent that does not answer is asked again.
    """
    done, lock = Event(), Lock()
    deadline = time.monotonic() + timeout_s
    silent: dict[str, str] = {}

    def follow(name: str) -> None:
        since = 0
        while not done.is_set() and not context.cancelled.is_set() and time.monotonic() < deadline:
            try:
                reports, since = agents[name].reports(since, REPORT_WAIT_S, group)
                silent.pop(name, None)
            except UnknownError as error:
                silent[name] = error.fact
                done.wait(RETRY_S)
                continue
            for report in reports:
                with lock:
                    if not done.is_set() and handle(report):
                        done.set()

    each(context, agents, follow)
    context.check_cancelled()
    if not done.is_set():
        quiet = "".join(f"; agent of {name} does not answer: {why}" for name, why in sorted(silent.items()))
        raise UnknownError(
            f"group {group}: waited {timeout_s:.0f} s for {waiting_for()}{quiet}",
            next_command=f"cloudfit group show {group}, then the same command again: it goes on where it stopped",
        )
