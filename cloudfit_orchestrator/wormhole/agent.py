"""The agent: table, channels and reports together, and the controller's orders on them (docs/contracts.md)."""

import asyncio
import base64
import contextlib
import datetime as dt
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.clock import Clock
from cloudfit_orchestrator.model.envelope import key_id
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import (
    LaunchCertificate,
    Manifest,
    Role,
    manifest_digest,
    open_manifest,
    seal_launch,
)
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.channel import Channel, Find, Verify
from cloudfit_orchestrator.wormhole.guests import Guest, Table
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.kss import ChannelCA, Lease
from cloudfit_orchestrator.wormhole.measure import NO_IMAGE, Measured, measure_libvirt, measure_process
from cloudfit_orchestrator.wormhole.nova import Watch, find_channel, measure_attached
from cloudfit_orchestrator.wormhole.reports import Reports
from cloudfit_orchestrator.wormhole.requests import Desk
from cloudfit_orchestrator.wormhole.throttle import TokenBucket

MAX_MEASURING = 2  # at a time: each reads a whole image

_log = logging.getLogger(__name__)


class BoottimeClock:
    """Counts suspend, so that a lease does not outlast a sleeping host."""

    def now_s(self) -> float:
        """Seconds since the host booted."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class MachineRef:
    """Which machine to admit: a libvirt domain (uri, uuid) or a local process (pid, socket)."""

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


class Agent:
    """All state of one agent, in memory only. Methods run on the event loop, measuring in threads."""

    def __init__(
        self,
        name: str,
        identity_key: Ed25519PrivateKey,
        *,
        controller_keys: list[bytes],
        image_keys: list[bytes],
        clock: Clock | None = None,
        bucket: tuple[float, float] | None = None,
    ) -> None:
        """`bucket`: rate in tokens a second and burst of each guest, for tests."""
        self.name = name
        self.key = public_bytes(identity_key)
        self._identity_key = identity_key
        self._image_keys = image_keys
        self._clock = clock or BoottimeClock()
        self._bucket = bucket
        self.table = Table(controller_keys)
        self.reports = Reports()
        self.counters: Counter[str] = Counter()
        self._channels: dict[Identity, tuple[Channel, asyncio.Task[None]]] = {}
        self._measuring = asyncio.Semaphore(MAX_MEASURING)
        self._watch = Watch()

    async def admit(self, order: Admission) -> bytes:
        """The launch certificate's envelope. Raises BadError if the image or the machine is not what is signed."""
        manifest = self._manifest(order)
        image = manifest_digest(order.manifest) if manifest else NO_IMAGE
        machine = _machine_id(order.machine)
        found = self.table.check_admission(order.identity, machine, image)
        if found is not None:
            return found.launch
        started_s = self._clock.now_s()
        measured = await self._measure(order.machine, manifest, attach=True)
        found = self.table.check_admission(order.identity, machine, image)
        if found is not None:  # the same order came twice, and the other was measured first
            return found.launch
        guest = self._guest(order, measured, image, started_s)
        self.table.admit(guest)

        path = measured.channel

        async def find() -> str:
            nonlocal path
            with self._losing(guest, measured):
                path = await asyncio.to_thread(find_channel, order.machine.uri, order.machine.uuid, measured.once)
            return path

        async def verify() -> None:
            if order.machine.driver == "process":
                return  # not isolated anyway; a process that is started again has another id
            with self._losing(guest, measured):
                again = await self._measure(order.machine, manifest)
                if again.channel != path or again.once != measured.once:
                    raise BadError(f"domain definition: the channel of {machine} has moved")

        channel = self._serve(guest, find if measured.nova else path, verify)
        if measured.nova:
            self._watch.add(order.machine.uri, machine, channel.try_again, lambda why: self._lose(guest, why))
        return guest.launch

    @contextlib.contextmanager
    def _losing(self, guest: Guest, measured: Measured) -> Iterator[None]:
        """A machine that may start once, and is not what was measured any more, is lost: no waiting mends it."""
        try:
            yield
        except BadError as error:
            if measured.once:
                self._lose(guest, error.fact)
            raise

    def _lose(self, guest: Guest, why: str) -> None:
        """The machine has left this host: whatever comes back under its name is not the one that the epochs are of."""
        guest.lose(why)
        self.counters["guests-lost"] += 1
        _log.warning("guest lost", extra={"guest": str(guest.identity), "why": why})
        self._channels[guest.identity][1].cancel()

    async def _measure(self, machine: MachineRef, manifest: Manifest | None, *, attach: bool = False) -> Measured:
        async with self._measuring:
            measured = await asyncio.to_thread(_measure, machine, manifest, attach=attach)
        if measured.machine != _machine_id(machine):
            raise BadError(f"domain definition: machine {_machine_id(machine)} calls itself {measured.machine}")
        return measured

    def _manifest(self, order: Admission) -> Manifest | None:
        if not order.manifest and order.machine.driver == "process":
            return None
        manifest = open_manifest(order.manifest, self._image_keys)
        if manifest.role is not order.role:
            raise BadError(f"manifest: image {manifest.name} is for a {manifest.role} machine, not a {order.role}")
        if manifest.adversary and not order.allow_adversary:
            raise RefusedError(
                f"image {manifest.name} is an adversary variant", next_command="set allow_adversary: true in the spec"
            )
        return manifest

    def _guest(self, order: Admission, measured: Measured, image: str, started_s: float) -> Guest:
        ca = ChannelCA(str(order.identity))
        certificate = LaunchCertificate(
            group=order.identity.group,
            replica=order.identity.replica,
            incarnation=order.identity.incarnation,
            role=order.role,
            image=image,
            domain=measured.domain,
            machine=measured.machine,
            agent=key_id(self.key),
            isolated=measured.isolated,
            channel_ca=base64.b64encode(ca.certificate).decode(),
            measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        return Guest(
            identity=order.identity,
            role=order.role,
            machine=measured.machine,
            image=image,
            launch=seal_launch(certificate, self._identity_key),
            lease=Lease(started_s, order.lease_s),
            ca=ca,
            welcome=order.welcome,
        )

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

    def command(self, identity: Identity, body: dict[str, Any]) -> None:
        """Push a command to one guest, as soon as it has greeted, and again to each later process of it."""
        command = self.table.command(identity, body)
        self._channels[identity][0].push_command(command)

    async def evict(self, identity: Identity) -> None:
        """Destroy the guest's keys and let go of its channel."""
        guest = self.table.evict(identity)
        if guest is not None:
            await self._watch.remove(guest.machine)
        self.reports.forget(identity)
        channel, task = self._channels.pop(identity, (None, None))
        if channel is not None and task is not None:
            self.counters.update(channel.counters)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """Evict everybody."""
        for guest in self.table:
            await self.evict(guest.identity)
        await self._watch.stop()

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


def _machine_id(machine: MachineRef) -> str:
    return machine.uuid if machine.driver == "libvirt" else f"process-{machine.pid}"


def _measure(machine: MachineRef, manifest: Manifest | None, *, attach: bool) -> Measured:
    if machine.driver == "process":
        return measure_process(machine.pid, machine.socket)
    if manifest is None:
        raise BadInputError("a libvirt machine needs an image manifest")
    how = measure_attached if attach else measure_libvirt
    return how(machine.uri, machine.uuid, manifest)
