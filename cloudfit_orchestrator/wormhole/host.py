"""The agent of a host: it admits a machine only after it has measured what really boots there."""

import asyncio
import base64
import contextlib
import datetime as dt
import logging
from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.clock import Clock
from cloudfit_orchestrator.model.envelope import key_id
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import (
    LaunchCertificate,
    Manifest,
    manifest_digest,
    open_manifest,
    seal_launch,
)
from cloudfit_orchestrator.wormhole.agent import Admission, Agent, MachineRef
from cloudfit_orchestrator.wormhole.guests import Guest
from cloudfit_orchestrator.wormhole.kss import ChannelCA, Lease
from cloudfit_orchestrator.wormhole.measure import NO_IMAGE, Measured, measure_libvirt, measure_process
from cloudfit_orchestrator.wormhole.nova import GONE_S, Watch, find_channel, measure_attached

MAX_MEASURING = 2  # at a time: each reads a whole image

_log = logging.getLogger(__name__)


class HostAgent(Agent):
    """The agent of one host. Its keys live in memory only: they end with it."""

    def __init__(
        self,
        name: str,
        identity_key: Ed25519PrivateKey,
        *,
        controller_keys: list[bytes],
        image_keys: list[bytes],
        clock: Clock | None = None,
        bucket: tuple[float, float] | None = None,
        gone_s: float = GONE_S,
    ) -> None:
        """`bucket`: rate in tokens a second and burst of each guest; `gone_s`: of `Watch`. Both for tests."""
        super().__init__(name, identity_key, controller_keys=controller_keys, clock=clock, bucket=bucket)
        self._image_keys = image_keys
        self._measuring = asyncio.Semaphore(MAX_MEASURING)
        self._watch = Watch(gone_s=gone_s)

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
            measured=image != NO_IMAGE,
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

    async def _let_go(self, guest: Guest) -> None:
        await self._watch.remove(guest.machine)

    async def stop(self) -> None:
        """See `Agent.stop`."""
        await super().stop()
        await self._watch.stop()


def _machine_id(machine: MachineRef) -> str:
    return machine.uuid if machine.driver == "libvirt" else f"process-{machine.pid}"


def _measure(machine: MachineRef, manifest: Manifest | None, *, attach: bool) -> Measured:
    if machine.driver == "process":
        return measure_process(machine.pid, machine.socket)
    if manifest is None:
        raise BadInputError("a libvirt machine needs an image manifest")
    how = measure_attached if attach else measure_libvirt
    return how(machine.uri, machine.uuid, manifest)
