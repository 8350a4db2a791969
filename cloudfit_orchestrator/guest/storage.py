"""What log and snapshots share: errors of the state disk, and files that appear whole or not at all."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cloudfit_orchestrator.model.errors import PermanentError, TemporaryError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
PART = ".part"  # ends the name of a file that is not whole yet


class DiskFullError(TemporaryError):
    """No room on the state disk; nothing was changed. A replica that sees it stops voting and tries again."""


class DiskFailedError(PermanentError):
    """The disk lost or refused a write. What is on it is unknown until the next start, so nothing may be voted for."""


@contextmanager
def disk_errors(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError into DiskFullError or DiskFailedError that says what was tried on which file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"{what} {path.name}: no room on the state disk", next_command="give the replicas larger state disks"
            ) from error
        raise DiskFailedError(
            f"{what} {path.name}: {error.strerror}", next_command="recover the replica: cloudfit recovery start"
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; OSError for a link, a pipe or a device, which a hostile disk may hold."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(fd, "rb", buffering=1 << 20)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, parts: Iterable[bytes]) -> None:
    """Write a new file whole, or leave what was there: part file, fsync, rename, fsync of the directory."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb", buffering=1 << 20) as file:
            for data in parts:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
