"""Where the byte stream to the wormhole comes from: a virtio-serial port, or a unix socket for local processes."""

import asyncio
import os
import select
import socket
from abc import ABC, abstractmethod
from pathlib import Path

from cloudfit_orchestrator.model.channel import PORT_NAME

FIRST_WAIT_S = 0.02  # back-off while the host side is absent: an agent that starts beside us is found quickly,
LAST_WAIT_S = 1.0  # and one that is gone for long costs one system call a second
_PORTS = Path("/sys/class/virtio-ports")
_DEVICES = Path("/dev")
_ACCEPT_BACKLOG = 4


class Port(ABC):
    """Gives connected, non-blocking file descriptors, one at a time; the caller closes each."""

    @abstractmethod
    async def open(self) -> int:
        """Wait, with a bounded back-off, until the other side is there."""


class VirtioPort(Port):
    """The guest's end of the virtio-serial port `PORT_NAME`, found without udev."""

    def __init__(self, ports: Path = _PORTS, devices: Path = _DEVICES) -> None:
        """Where the kernel shows ports and devices."""
        self._ports = ports
        self._devices = devices

    async def open(self) -> int:
        """See `Port.open`. A port whose host side is absent reads as end of file, and polls as hung up for ever: so it
        is asked now and then, and handed to the event loop only when connected.
        """
        wait_s = FIRST_WAIT_S
        while True:
            fd = self._try()
            if fd is not None:
                return fd
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_WAIT_S)

    def _try(self) -> int | None:
        name = find_port(self._ports)
        if name is None:
            return None
        try:
            fd = os.open(self._devices / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not _host_is_there(fd):
            os.close(fd)
            return None
        return fd


class ListeningPort(Port):
    """A unix socket that the agent connects to (process driver)."""

    def __init__(self, path: Path) -> None:
        """Bind `path`, replacing what a killed predecessor left there. Raises OSError."""
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(0)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(_ACCEPT_BACKLOG)

    async def open(self) -> int:
        """See `Port.open`: the next connection."""
        connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        connection.settimeout(0)
        return connection.detach()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def find_port(ports: Path) -> str | None:
    """The device name of the wormhole's port, by what the kernel shows under `ports`; None if it is not there."""
    for entry in sorted(ports.glob("*/name")):
        try:
            name = entry.read_text().strip()
        except OSError:
            continue
        if name == PORT_NAME:
            return entry.parent.name
    return None


def _host_is_there(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not any(event & select.POLLHUP for _, event in poll.poll(0))
