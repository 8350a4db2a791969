"""The agent: table, channels and reports together, and the controller's orders on them (docs/contracts.md)."""

import asyncio
import base64
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.clock import Clock
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.channel import Channel, Find, Verify
from cloudfit_orchestrator.wormhole.epoch import Epoch
from cloudfit_orchestrator.wormhole.guests import Guest, Table
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.reports import Reports
from cloudfit_orchestrator.wormhole.requests import Desk
from cloudfit_orchestrator.wormhole.throttle import TokenBucket

_log = logging.getLogger(__name__)


class BoottimeClock:
    """Counts suspend, so that a lease does not outlast a sleeping host."""

    def now_s(self) -> float:
        """Seconds since the host booted."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class MachineRef:
    """Which machine to admit: a libvirt domain (uri, uuid), a local process (pid, socket), or that around us."""

    driver: str
    uri: str = ""
    uuid: str = ""
    pid: int = 0
    socket: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """An `admit` order. `manifest`: envelope; empty for a process without an image."""

    identity: Identity
    role: Role
    machine: MachineRef
    manifest: bytes
    allow_adversary: bool
    lease_s: float
    welcome: dict[str, Any]


class Agent(ABC):
    """All state of one agent. Methods run on the event loop."""

    def __init__(
        self,
        name: str,
        identity_key: Ed25519PrivateKey,
        *,
        controller_keys: list[bytes],
        clock: Clock | None = None,
        bucket: tuple[float, float] | None = None,
    ) -> None:
        """`bucket`: rate in tokens a second and burst of each guest, for tests."""
        self.name = name
        self.key = public_bytes(identity_key)
        self._identity_key = identity_key
        self._clock = clock or BoottimeClock()
        self._bucket = bucket
        self.table = Table(controller_keys)
        self.reports = Reports()
        self.counters: Counter[str] = Counter()
        self._channels: dict[Identity, tuple[Channel, asyncio.Task[None]]] = {}

    @abstractmethod
    async def admit(self, order: Admission) -> bytes:
        """The launch certificate's envelope. Raises BadError if the image or the machine is not what is signed."""

    def _serve(self, guest: Guest, path: str | Find, verify: Verify) -> Channel:
        desk = Desk(guest, self.table, self._clock, self._keep_report)
        if self._bucket is None:
            bucket = TokenBucket(self._clock)
        else:
            bucket = TokenBucket(self._clock, rate_per_s=self._bucket[0], burst=self._bucket[1])
        channel = Channel(path, guest, desk, bucket, verify)
        task = asyncio.create_task(channel.run(), name=f"channel {guest.identity}")
        task.add_done_callback(self._channel_ended)
        self._channels[guest.identity] = (channel, task)
        return channel

    def _channel_ended(self, task: asyncio.Task[None]) -> None:
        """Only evict ends a channel; anything else is a fault of ours that costs this guest its voice."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counters["channel-internal"] += 1
            _log.error("channel failed", exc_info=error, extra={"guest": task.get_name()})

    def _keep_report(self, guest: Identity, topic: str, body: dict[str, Any], size: int) -> None:
        self.counters["reports"] += 1
        self.counters["reports-dropped"] += self.reports.add(guest, topic, body, size)

    def install(self, group: str, envelope: bytes) -> None:
        """Take a record and push it to the guests that it concerns."""
        if self.table.install(group, envelope) is not None:
            for guest in self.table.of_group(group):
                self._channels[guest.identity][0].push_records()

    def prepare(self, identity: Identity, c: int) -> Epoch:
        """Keys of configuration c, made once."""
        return self.table.prepare(identity, c)

    def command(self, identity: Identity, body: dict[str, Any]) -> None:
        """Push a command to one guest, as soon as it has greeted, and again to each later process of it."""
        command = self.table.command(identity, body)
        self._channels[identity][0].push_command(command)

    async def evict(self, identity: Identity) -> None:
        """Destroy the guest's keys and let go of its channel."""
        await self._dismiss(identity)

    async def _dismiss(self, identity: Identity) -> None:
        guest = self.table.evict(identity)
        if guest is not None:
            await self._let_go(guest)
        self.reports.forget(identity)
        channel, task = self._channels.pop(identity, (None, None))
        if channel is not None and task is not None:
            self.counters.update(channel.counters)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _let_go(self, guest: Guest) -> None:
        """Nothing is expected of the evicted guest's machine any more."""
        del guest

    async def stop(self) -> None:
        """Evict everybody."""
        for guest in self.table:
            await self._dismiss(guest.identity)

    def status(self) -> dict[str, Any]:
        """Figures for the controller; no key material."""
        counters = Counter(self.counters)
        for channel, _ in self._channels.values():
            counters.update(channel.counters)
        return {
            "agent": self.name,
            "key": base64.b64encode(self.key).decode(),
            "guests": [self._guest_status(guest) for guest in self.table],
            "groups": {
                group: {
                    "active": held.active.record.c if held.active else None,
                    "prepared": held.prepared.record.c if held.prepared else None,
                }
                for group, held in self.table.groups().items()
            },
            "counters": dict(counters),
        }

    def _guest_status(self, guest: Guest) -> dict[str, Any]:
        channel = self._channels[guest.identity][0]
        return {
            "group": guest.identity.group,
            "replica": guest.identity.replica,
            "incarnation": guest.identity.incarnation,
            "role": guest.role.value,
            "machine": guest.machine,
            "image": guest.image,
            "connected": channel.connected,
            "greeted": channel.greeted,
            "retired": guest.retired,
            "lost": guest.lost,
            "lease_left_s": round(guest.lease.left_s(self._clock.now_s()), 1),
            "epochs": [{"c": e.c, "state": e.state.value, "cv": e.cv} for e in guest.epochs.values()],
            "counters": dict(channel.counters),
        }
