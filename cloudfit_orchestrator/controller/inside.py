"""The agents inside the guests of one cloud (`trust: none`), put together so that they look like the agent of a host.

Each is trusted as much as its guest: not at all. So:
1. What it says is about its own guest only, whatever name it puts there; who it is was proved by its certificate.
2. What it says may be anything: nonsense is an error of this guest (BadError), never ours.
3. One that is silent, lies or refuses keeps nobody from speaking with the others.
4. What it did not hear, because it was away, it is told when it is back.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cloudfit_orchestrator.controller.agents import ADMIT_TIMEOUT_S, AgentClient, GuestRef, NotAdmittedError, Report
from cloudfit_orchestrator.controller.journal import MachineRow
from cloudfit_orchestrator.controller.secrets import GuestSecrets
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, TemporaryError, UnknownError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.record import ConfigRecord, Status
from cloudfit_orchestrator.model.signing import KEY_BYTES
from cloudfit_orchestrator.model.ui import EpochEnd

MAX_THREADS = 16
MAX_REPORT_BYTES = 4 << 20  # kept of one guest, whose agent keeps a quarter of that; its oldest give way
REPORT_BYTES = 256  # what one costs beyond its body
LOOK_AGAIN_S = 2.0  # after a guest was silent: asking it costs a time-out
BOOT_RETRY_S = 0.5

_T = TypeVar("_T")

Records = Callable[[str], list[tuple[ConfigRecord, bytes]]]  # of a group: ACTIVE, and a PREPARED that follows it


class InsideAgents:
    """`ports.Agent` of one cloud."""

    inside = True

    def __init__(
        self, cloud: str, rows: Callable[[], Iterable[MachineRow]], secrets: GuestSecrets, records: Records
    ) -> None:
        """`rows`: the machines of this home that are not gone, from the journal."""
        self.cloud = cloud
        self._rows = rows
        self._secrets = secrets
        self._records = records
        self._lock = threading.Lock()
        self._clients: dict[GuestRef, AgentClient] = {}
        self._silent_until: dict[GuestRef, float] = {}
        self._cursors: dict[GuestRef, int] = {}
        self._heard: dict[int, tuple[Report, int]] = {}  # number -> report and its size, as they came from all guests
        self._last = 0

    # --- whom there is

    def _known(self) -> dict[GuestRef, MachineRow]:
        mine = (r for r in self._rows() if r.cloud == self.cloud and r.machine_id)
        return {GuestRef(r.group, r.replica, r.incarnation): r for r in mine}

    def _row(self, guest: GuestRef) -> MachineRow:
        row = self._known().get(guest)
        if row is None:
            raise NotAdmittedError(f"{_name(guest)} has no machine on {self.cloud}")
        return row

    def _client(self, guest: GuestRef, row: MachineRow) -> AgentClient:
        with self._lock:
            if guest not in self._clients:
                self._clients[guest] = AgentClient(self._secrets.dialer(row))
            return self._clients[guest]

    def _ask(self, guest: GuestRef, call: Callable[[AgentClient], _T], row: MachineRow | None = None) -> _T:
        """`call` on the agent in that guest. Raises CloudfitError whatever comes back."""
        client = self._client(guest, row or self._row(guest))
        try:
            return call(client)
        except CloudfitError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadError(
                f"the agent inside {_name(guest)} answers nonsense: {error!r}"[:500],
                next_command=f"cloudfit recovery start {guest.group} {guest.replica} --suspected",
            ) from error

    def _each(self, guests: Iterable[GuestRef], call: Callable[[GuestRef], _T]) -> dict[GuestRef, _T | CloudfitError]:
        """`call` for all, side by side: a silent one costs its own time-out only, and is then left for a while."""

        def guarded(guest: GuestRef) -> _T | CloudfitError:
            if time.monotonic() < self._silent_until.get(guest, 0.0):
                return UnknownError(f"{_name(guest)} was silent just now")
            try:
                return call(guest)
            except UnknownError as error:
                self._silent_until[guest] = time.monotonic() + LOOK_AGAIN_S
                return error
            except CloudfitError as error:
                return error

        wanted = list(guests)
        if not wanted:
            return {}
        with ThreadPoolExecutor(min(MAX_THREADS, len(wanted))) as pool:
            return dict(zip(wanted, pool.map(guarded, wanted), strict=True))

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    # --- ports.Agent

    def key_of(self, guest: GuestRef) -> bytes:
        """The key that its launch certificate is signed with: derived, not asked for."""
        return self._secrets.agent_key(self._row(guest))

    def status(self) -> dict[str, Any]:
        """See `Agent`. `silent`: guests of which nothing can be said now."""
        known = self._known()
        found = self._each(known, lambda guest: self._status_of(guest, known[guest]))
        return {
            "guests": [answer for answer in found.values() if not isinstance(answer, CloudfitError)],
            "silent": [_name(guest) for guest, answer in found.items() if isinstance(answer, CloudfitError)],
        }

    def _status_of(self, guest: GuestRef, row: MachineRow) -> dict[str, Any]:
        def look(client: AgentClient) -> dict[str, Any]:
            answer = client.status()
            mine = answer["guests"][0]
            self._tell_missed(client, guest, dict(answer["groups"].get(guest.group) or {}))
            return {
                "group": guest.group,
                "replica": guest.replica,
                "incarnation": guest.incarnation,
                "image": str(mine["image"]),
                "connected": mine["connected"] is True,
                "greeted": mine["greeted"] is True,
                "epochs": [{"c": int(e["c"]), "state": str(e["state"]), "cv": int(e["cv"])} for e in mine["epochs"]],
                "counters": {str(k): int(v) for k, v in mine["counters"].items()},
            }

        return self._ask(guest, look, row)

    def _tell_missed(self, client: AgentClient, guest: GuestRef, held: dict[str, Any]) -> None:
        """Rule 4. One that has lost its keys refuses: that is its business."""
        newest = max(int(held.get("active") or 0), int(held.get("prepared") or 0))
        for record, envelope in self._records(guest.group):
            active = record.status is Status.ACTIVE
            if record.c > newest or (active and record.c > int(held.get("active") or 0)):
                with contextlib.suppress(CloudfitError):
                    client.install(guest.group, envelope)

    def admit(
        self,
        guest: GuestRef,
        *,
        role: Role,
        machine: dict[str, Any],
        manifest: bytes,
        lease_s: float,
        welcome: dict[str, Any],
        image_dir: Path | None = None,
        allow_adversary: bool = False,
    ) -> bytes:
        """See `Agent`. Nothing is measured: it boots, and proves that it has our drive. Waits for that."""
        del machine, image_dir
        deadline = time.monotonic() + ADMIT_TIMEOUT_S
        while True:
            try:
                return self._ask(
                    guest,
                    lambda client: client.admit(
                        guest, role=role, machine={"driver": "inside"}, manifest=manifest, lease_s=lease_s,
                        welcome=welcome, allow_adversary=allow_adversary,
                    ),
                )  # fmt: skip
            except UnknownError as error:
                if time.monotonic() >= deadline:
                    raise TemporaryError(
                        f"{_name(guest)} on {self.cloud} did not come up in {ADMIT_TIMEOUT_S:.0f} s: {error.fact}",
                        next_command="see its console; the same command again goes on",
                    ) from error
            time.sleep(BOOT_RETRY_S)  # a machine that boots tells nobody

    def prepare(self, guest: GuestRef, c: int) -> tuple[bytes, bytes]:
        """See `Agent`."""

        def keys(client: AgentClient) -> tuple[bytes, bytes]:
            usig, kss = client.prepare(guest, c)
            if len(usig) != KEY_BYTES or len(kss) != KEY_BYTES:
                raise ValueError("no keys")
            return usig, kss

        return self._ask(guest, keys)

    def install(self, group: str, envelope: bytes) -> None:
        """Tell all guests of the group here, as far as they listen. UnknownError if none of them does."""
        guests = {g: row for g, row in self._known().items() if g.group == group and row.role == Role.REPLICA.value}
        found = self._each(guests, lambda g: self._ask(g, lambda client: client.install(group, envelope), guests[g]))
        failed = [answer for answer in found.values() if isinstance(answer, CloudfitError)]
        if failed and len(failed) == len(found):
            raise failed[0]

    def freeze(self, guest: GuestRef, c: int) -> int:
        """See `Agent`."""
        return self._ask(guest, lambda client: client.freeze(guest, c))

    def thaw(self, guest: GuestRef, c: int) -> int:
        """See `Agent`."""
        return self._ask(guest, lambda client: client.thaw(guest, c))

    def close_epoch(self, guest: GuestRef, c: int) -> EpochEnd:
        """See `Agent`."""
        return self._ask(guest, lambda client: client.close_epoch(guest, c))

    def command(self, guest: GuestRef, body: dict[str, Any]) -> None:
        """See `Agent`."""
        self._ask(guest, lambda client: client.command(guest, body))

    def reports(self, since: int, wait_s: float = 0.0, group: str | None = None) -> tuple[list[Report], int]:
        """See `Agent`. `seq` is the guest's own count; `since` and what comes back count here, all guests together."""
        guests = {g: row for g, row in self._known().items() if group in (None, g.group)}
        waits = wait_s if self._last <= since else 0.0
        found = self._each(guests, lambda g: self._news(g, guests[g], waits))
        if guests and all(isinstance(answer, UnknownError) for answer in found.values()):
            time.sleep(min(wait_s, BOOT_RETRY_S))  # all are silent: the caller asks again at once
        with self._lock:
            new = [r for number, (r, _) in self._heard.items() if number > since and group in (None, r.guest.group)]
            return new, self._last

    def _news(self, guest: GuestRef, row: MachineRow, wait_s: float) -> None:
        def fetch(client: AgentClient) -> None:
            since = self._cursors.get(guest, 0)
            found, following = client.reports(since, wait_s, guest.group)
            if not isinstance(following, int):
                raise ValueError("no sequence number")  # noqa: TRY004  what a guest says, not a fault of ours
            if following < since:  # its agent has begun anew
                self._cursors[guest] = 0
                return
            mine = [Report(int(r.seq), guest, str(r.topic), dict(r.body)) for r in found]  # rule 1
            with self._lock:
                if self._cursors.get(guest, 0) == since:  # else another thread has them
                    self._cursors[guest] = following
                    self._hear(guest, mine)

        self._ask(guest, fetch, row)

    def _hear(self, guest: GuestRef, reports: list[Report]) -> None:
        for report in reports:
            self._last += 1
            self._heard[self._last] = (report, len(repr(report.body)) + REPORT_BYTES)
        its = {number: size for number, (report, size) in self._heard.items() if report.guest == guest}
        excess = sum(its.values()) - MAX_REPORT_BYTES
        for number, size in its.items():
            if excess <= 0:
                return
            del self._heard[number]
            excess -= size

    def evict(self, guest: GuestRef) -> None:
        """Nothing: the keys are in the machine, and go with it."""
        with self._lock:
            client = self._clients.pop(guest, None)
        if client is not None:
            client.close()


def _name(guest: GuestRef) -> str:
    return f"{guest.group}/{guest.replica}#{guest.incarnation}"
