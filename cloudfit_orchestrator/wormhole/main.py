"""`cloudfit-agent`: starts the wormhole of one host. Its keys live in this process; with it all its epochs end."""

import argparse
import asyncio
import base64
import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.errors import BadInputError, CloudfitError, RefusedError
from cloudfit_orchestrator.model.signing import KEY_BYTES, private_bytes
from cloudfit_orchestrator.wormhole.control import MAX_LINE_BYTES, Control
from cloudfit_orchestrator.wormhole.host import HostAgent

MAX_SOCKET_PATH_BYTES = 107  # sun_path has 108, the last is zero
LOG_BYTES = 16 << 20  # of one log file; the one before it is kept
_FIELDS = ("op", "code", "why", "group", "replica", "incarnation", "c", "guest", "reason", "agent", "socket")

_log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message and the few fields that this package uses."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        doc = {"at": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        doc |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            doc["trace"] = self.formatException(record.exc_info)
        return json.dumps(doc)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("cloudfit-agent", description="Run the trusted wormhole of this host.")
    p.add_argument("--name", required=True, help="name of this agent, for people")
    p.add_argument("--socket", required=True, type=Path, help="unix socket for the controller, made with mode 0600")
    p.add_argument("--identity", required=True, type=Path, help="file of the agent's own key; made if there is none")
    p.add_argument(
        "--controller-key", required=True, action="append", type=Path, metavar="FILE", help="raw Ed25519, base64"
    )
    p.add_argument("--image-key", required=True, action="append", type=Path, metavar="FILE", help="raw Ed25519, base64")
    p.add_argument("--log", type=Path, help="log file; standard error without it")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run until SIGTERM or SIGINT. Exit codes: 0 stopped, 1 cannot start, 2 bad usage."""
    options = parser().parse_args(argv)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold keys
    try:
        _log_to(options.log)
        agent_keys = {
            "controller_keys": [read_public(path) for path in options.controller_key],
            "image_keys": [read_public(path) for path in options.image_key],
        }
        identity = read_identity(options.identity)
        with listening(options.socket) as listener:
            asyncio.run(_run(options.name, identity, agent_keys, listener))
    except CloudfitError as error:
        print(f"cloudfit-agent: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"cloudfit-agent: {error.filename or options.socket}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


async def _run(name: str, identity: Ed25519PrivateKey, keys: dict[str, list[bytes]], listener: socket.socket) -> None:
    agent = HostAgent(name, identity, controller_keys=keys["controller_keys"], image_keys=keys["image_keys"])
    control = Control(agent)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_unix_server(control.serve, sock=listener, limit=MAX_LINE_BYTES)
    _log.info("started", extra={"agent": name, "socket": listener.getsockname()})
    await stop.wait()
    server.close()
    await control.stop()
    await agent.stop()
    _log.info("stopped", extra={"agent": name})


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening unix socket of mode 0600, removed at the end. Raises RefusedError if another agent has this path."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise BadInputError(f"{path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes a socket's path may have")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(f"an agent serves {path} already", next_command="cloudfit agent status") from error
        path.unlink(missing_ok=True)  # of an agent that was killed: the lock says that none lives
        with socket.socket(socket.AF_UNIX) as listener:
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
            listener.listen()
            listener.settimeout(0)
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def read_public(path: Path) -> bytes:
    """A raw Ed25519 public key from a file, in base64."""
    try:
        raw = base64.b64decode(path.read_bytes().strip(), validate=True)
    except ValueError as error:
        raise BadInputError(f"{path} holds no base64") from error
    if len(raw) != KEY_BYTES:
        raise BadInputError(f"{path} holds {len(raw)} bytes, a raw Ed25519 key has {KEY_BYTES}")
    return raw


def read_identity(path: Path) -> Ed25519PrivateKey:
    """The agent's own key, made at the first start. Raises RefusedError if others may read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        made = path.with_name(path.name + ".new")
        file = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(base64.b64encode(private_bytes(Ed25519PrivateKey.generate())) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        made.rename(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise RefusedError(
            f"{path} has mode {mode:o}: others may read the agent's key", next_command=f"chmod 600 {path}"
        )
    return Ed25519PrivateKey.from_private_bytes(read_public(path))


def _log_to(path: Path | None) -> None:
    if path is None:
        handler: logging.Handler = logging.StreamHandler()
    else:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


if __name__ == "__main__":
    main()
