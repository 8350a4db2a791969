"""What the agent inside a guest must find again after a restart. It lies beside the replica's log, in one file.

A replica without its log could contradict what it has said, and no counter outside would notice. So half of the secret
that its keys come from lies on the disk that the log lies on, made there at the first start: who loses the log loses
the keys, as with an agent at the hypervisor, and a disk that is kept as evidence gives none away.
"""

import base64
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.model.drive import SECRET_BYTES
from cloudfit_orchestrator.model.errors import TemporaryError

MAX_MEMORY_BYTES = 32 << 20  # two records, 64 numbers and 64 commands


@dataclass
class Memory:
    """Everything that is kept. `secret`: this disk's half."""

    secret: bytes = field(repr=False, default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    prepared: list[int] = field(default_factory=list)  # configurations of which keys were given out
    records: list[bytes] = field(default_factory=list)  # envelopes: ACTIVE, then PREPARED, as far as there are any
    commands: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Memory":
        """What is kept at `path`; a fresh one, which is then kept, if there is nothing or if it is spoilt.

        Raises OSError if the disk cannot be read or written.
        """
        found = None
        if path.exists():
            with path.open("rb") as file:
                found = _decode(file.read(MAX_MEMORY_BYTES + 1))
        if found is not None:
            return found
        fresh = cls()
        fresh.save(path)
        return fresh

    def save(self, path: Path) -> None:
        """Keep it, durably, whole or not at all. Raises TemporaryError: the same order may be given again."""
        doc = {
            "secret": _text(self.secret),
            "prepared": self.prepared,
            "records": [_text(envelope) for envelope in self.records],
            "commands": self.commands,
        }
        fresh = path.with_name(path.name + ".new")
        try:
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(file, "wb") as out:
                out.write(json.dumps(doc).encode())
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(path)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise TemporaryError(f"the guest's disk does not take {path.name}: {error.strerror}") from error


def _decode(data: bytes) -> Memory | None:
    try:
        doc = json.loads(data)
        secret = _raw(doc["secret"])
        if len(secret) != SECRET_BYTES:
            return None
        return Memory(
            secret=secret,
            prepared=[int(c) for c in doc["prepared"]],
            records=[_raw(text) for text in doc["records"]],
            commands=[dict(command) for command in doc["commands"]],
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
