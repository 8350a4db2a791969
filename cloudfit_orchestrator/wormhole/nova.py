"""Servers of an unmodified Nova: their channel is attached while they run, and their coming and going is followed.

A Nova server is a libvirt domain whose UUID is the server's id. Nova knows nothing of our channel: a hard reboot builds
the domain anew without it. So it is looked for, and attached if it is missing, before each connection; the measurement
follows, as for every new process of a hypervisor. Epochs outlive a reboot, as their counter is here and only grows.
They end when the machine leaves the host: at once when it is migrated; when it is undefined, only after a while,
because Nova undefines and defines again in each hard reboot, and an event does not say which of the two it is.

A server that boots by UEFI starts once: its firmware boots from a disk that its guest writes to, so what a second start
would run is not measured. Resets end its hypervisor's process, and no channel is attached to another process of it.
"""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, PermanentError, UnknownError
from cloudfit_orchestrator.model.image import Manifest
from cloudfit_orchestrator.wormhole.measure import (
    Measured,
    by_uefi,
    channel_of,
    check_boot,
    check_local,
    is_nova,
    live_definition,
    measure_domain,
    running,
)

GONE_S = 300.0  # without a domain: a hard reboot of a busy host takes a minute or two, with volumes and ports
BACK_OFF_S = (0.5, 30.0)  # before connecting to libvirtd again: first, longest
KEEP_ALIVE = (5, 6)  # seconds, tries: a libvirtd that hangs for half a minute counts as gone
# From these on a reset that is not wanted ends QEMU itself (set-action); before, libvirt ended it some time after.
LIBVIRT_VERSION, QEMU_VERSION = 8_000_000, 6_000_000
_PAUSE_S = 1.0  # after an error of libvirt's event loop, so that one that lasts does not take a processor

_log = logging.getLogger(__name__)


def measure_attached(uri: str, uuid: str, manifest: Manifest) -> Measured:
    """As `measure_libvirt`; a Nova server without our channel gets it, but only if it boots what the manifest says.

    Raises also PermanentError if nothing can be attached to it.
    """
    domain = live_definition(uri, uuid)
    if is_nova(domain) and channel_of(domain) is None:
        check_boot(domain, manifest, may_reset=True)
        if by_uefi(domain):
            _end_with_resets(uri, uuid)  # what is measured after this, below, runs until the end
        find_channel(uri, uuid)
        domain = live_definition(uri, uuid)
    return measure_domain(domain, manifest)


def find_channel(uri: str, uuid: str, once: str = "") -> str:
    """The socket of a Nova server's channel, which is attached if there is none. Safe to repeat.

    Raises BadError if it may start once, which was `once`, and this is another start.
    """
    domain = live_definition(uri, uuid)
    found = channel_of(domain)
    if once and (found is None or domain.get("id") != once):
        raise BadError(f"server {uuid} was started again, from a disk that its guest may have written over")
    if found is not None:
        return found
    if not is_nova(domain):
        raise PermanentError(f"domain {uuid} has no channel {PORT_NAME}, and Nova did not make it")
    if domain.find("devices/controller[@type='virtio-serial']") is None:
        raise PermanentError(
            f"server {uuid} has no virtio-serial controller, without which channel {PORT_NAME} cannot be attached",
            next_command="openstack image set --property hw_qemu_guest_agent=yes IMAGE; make the server anew",
        )
    _attach(uri, uuid)
    found = channel_of(live_definition(uri, uuid))
    if found is None:  # a reboot came in between
        raise UnknownError(f"server {uuid} lost channel {PORT_NAME} as soon as it had it")
    _log.info("channel attached", extra={"guest": uuid, "socket": found})
    return found


def _end_with_resets(uri: str, uuid: str) -> None:
    """Have the hypervisor's process end where the machine would be reset. Raises PermanentError if it cannot."""
    import libvirt  # noqa: PLC0415  see measure.running

    with running(uri, uuid, write=True) as domain:
        connection = domain.connect()
        if connection.getLibVersion() < LIBVIRT_VERSION or connection.getVersion() < QEMU_VERSION:
            raise PermanentError(
                f"server {uuid} boots by UEFI, and its host cannot keep it from starting again",
                next_command="libvirt 8.0 and QEMU 6.0 or newer there, or boot: kernel in the spec",
            )
        domain.setLifecycleAction(
            libvirt.VIR_DOMAIN_LIFECYCLE_REBOOT,
            libvirt.VIR_DOMAIN_LIFECYCLE_ACTION_DESTROY,
            libvirt.VIR_DOMAIN_AFFECT_LIVE,
        )


def _attach(uri: str, uuid: str) -> None:
    """Let libvirt choose the socket's path, in the directory that it made for this domain's hypervisor process."""
    import libvirt  # noqa: PLC0415  see measure.running

    channel = ET.Element("channel", type="unix")
    ET.SubElement(channel, "source", mode="bind")
    ET.SubElement(channel, "target", type="virtio", name=PORT_NAME)
    with running(uri, uuid, write=True) as domain:
        domain.attachDeviceFlags(ET.tostring(channel, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)


@dataclass
class _Server:
    uri: str
    started: Callable[[], None]
    lost: Callable[[str], None]
    doubt: asyncio.Task[None] | None = None  # waits whether the domain comes back


class Watch:
    """Follows the lifecycle of servers by libvirt's events, over restarts of libvirtd. Methods: on the event loop."""

    def __init__(self, *, gone_s: float = GONE_S, back_off_s: tuple[float, float] = BACK_OFF_S) -> None:
        """Waits, for tests."""
        self._gone_s = gone_s
        self._back_off_s = back_off_s
        self._servers: dict[str, _Server] = {}  # by UUID
        self._following: dict[str, asyncio.Task[None]] = {}  # by URI

    def add(self, uri: str, uuid: str, started: Callable[[], None], lost: Callable[[str], None]) -> None:
        """Call `started` when its domain is started, and `lost(why)` once, when it is none of this host any more."""
        self._servers[uuid] = _Server(uri, started, lost)
        if uri not in self._following:
            self._following[uri] = asyncio.create_task(self._follow(uri), name=f"events of {uri}")

    async def remove(self, uuid: str) -> None:
        """Forget a server; unknown is no error."""
        server = self._servers.pop(uuid, None)
        if server is None:
            return
        await _cancel(server.doubt)
        if not any(other.uri == server.uri for other in self._servers.values()):
            await _cancel(self._following.pop(server.uri, None))

    async def stop(self) -> None:
        """Forget all."""
        for uuid in list(self._servers):
            await self.remove(uuid)

    async def _follow(self, uri: str) -> None:
        delay_s = self._back_off_s[0]
        while True:
            closed = asyncio.Event()
            try:
                connection = await asyncio.to_thread(self._connect, uri, asyncio.get_running_loop(), closed)
            except CloudfitError as error:
                _log.warning("no events of libvirt", extra={"why": error.fact[:500]})
            else:
                delay_s = self._back_off_s[0]
                for uuid, server in self._servers.items():
                    if server.uri == uri:
                        self._doubt(uuid, server)  # nobody said what happened before the connection
                        server.started()
                try:
                    await closed.wait()
                    _log.warning("libvirt hung up", extra={"why": uri})
                finally:
                    _close(connection)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self._back_off_s[1])

    def _connect(self, uri: str, loop: asyncio.AbstractEventLoop, closed: asyncio.Event) -> Any:
        """In a thread. Raises CloudfitError."""
        import libvirt  # noqa: PLC0415  see measure.running

        check_local(uri)
        _start_events()

        def hung_up(*_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the agent's loop has ended
                loop.call_soon_threadsafe(closed.set)

        def happened(_connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
            with contextlib.suppress(RuntimeError):  # see hung_up
                loop.call_soon_threadsafe(self._happened, domain.UUIDString(), event, detail)

        connection = None
        try:
            connection = libvirt.openReadOnly(uri)
            connection.registerCloseCallback(hung_up, None)
            connection.setKeepAlive(*KEEP_ALIVE)
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, happened, None)
        except libvirt.libvirtError as error:
            if connection is not None:
                _close(connection)
            raise UnknownError(f"libvirt at {uri} gives no events: {error}", next_command="start libvirtd") from error
        return connection

    def _happened(self, uuid: str, event: int, detail: int) -> None:
        import libvirt  # noqa: PLC0415  see measure.running

        server = self._servers.get(uuid)
        if server is None:
            return
        if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            server.started()
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED:
            self._lost(uuid, server, "it was migrated to another host")
        elif event in (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_UNDEFINED):
            self._doubt(uuid, server)

    def _doubt(self, uuid: str, server: _Server) -> None:
        if server.doubt is None or server.doubt.done():
            server.doubt = asyncio.create_task(self._gone(uuid, server), name=f"doubt of {uuid}")

    async def _gone(self, uuid: str, server: _Server) -> None:
        """Lose the server if it has no domain, now and after a while. A stopped one has one."""
        since_s: float | None = None
        wait_s = 0.0
        loop = asyncio.get_running_loop()
        while (exists := await asyncio.to_thread(_exists, server.uri, uuid)) is not True:
            if exists is False:
                since_s = loop.time() if since_s is None else since_s
                if loop.time() - since_s >= self._gone_s:
                    self._lost(uuid, server, f"there has been no domain {uuid} for {self._gone_s:g} s")
                    return
            wait_s = min(max(2 * wait_s, self._back_off_s[0]), self._back_off_s[1], self._gone_s)
            await asyncio.sleep(wait_s)

    def _lost(self, uuid: str, server: _Server, why: str) -> None:
        if self._servers.pop(uuid, None) is None:
            return
        if server.doubt is not None and server.doubt is not asyncio.current_task():
            server.doubt.cancel()
        server.lost(why)


def _exists(uri: str, uuid: str) -> bool | None:
    """Whether there is a domain, running or not; None if libvirt does not say."""
    try:
        with running(uri, uuid):
            return True
    except PermanentError:
        return False
    except UnknownError:
        return True  # it does not run
    except CloudfitError:
        return None


def _close(connection: Any) -> None:
    import libvirt  # noqa: PLC0415  see measure.running

    with contextlib.suppress(libvirt.libvirtError):  # a broken connection: nothing to close
        connection.unregisterCloseCallback()
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None and task is not asyncio.current_task():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@functools.cache
def _start_events() -> None:
    """Run libvirt's event loop, once a process, in a thread: none of its calls then waits for the agent's loop."""
    import libvirt  # noqa: PLC0415  see measure.running

    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, name="libvirt events", daemon=True).start()


def _run_events() -> None:
    import libvirt  # noqa: PLC0415  see measure.running

    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            _log.error("libvirt's event loop failed", extra={"why": str(error)})
            time.sleep(_PAUSE_S)
