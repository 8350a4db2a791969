"""Measuring files: SHA-256 of a file or of a range of one, in bounded memory."""

import hashlib
from pathlib import Path

from cloudfit_orchestrator.model.errors import BadError

CHUNK = 1 << 20  # bytes hashed at a time: large enough for the hash to be the cost, small enough for any host


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def range_digest(path: Path, offset: int, size: int) -> str:
    """SHA-256, in hex, of the bytes [offset, offset + size) of `path`. Raises BadError if the file is shorter."""
    digest = hashlib.sha256()
    left = size
    with path.open("rb") as file:
        file.seek(offset)
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise BadError(f"{path.name} ends {left} bytes before the end of the measured part")
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
