"""A disk that loses what was not synced: torn tails, renames and removals that happened or did not."""

import os
import random
import stat
from pathlib import Path


class Crash(BaseException):
    """The machine stops here. Nothing catches it."""


class CrashDisk:
    """What would be found of `directory` after a crash at its n-th fsync.

    Stands in for `os.fsync`. Of a file, what it held when it was last synced is there; of what came later, some of the
    beginning, and then zeros or nothing. Of the names, each is as at the last fsync of the directory or as it is now.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.syncs = 0
        self.crash_at: int | None = None
        self._dice = random.Random(seed)
        self._synced: dict[int, bytes] = {}  # inode -> content
        self._names: dict[str, int] = {}  # as last synced
        self._lost: dict[str, bytes] = {}  # content of names that were synced and may be gone by now
        self._real = os.fsync
        self.left: dict[str, bytes] | None = None

    def fsync(self, fd: int) -> None:
        """As `os.fsync`; on the chosen call it fails half way, for ever."""
        self.syncs += 1
        if self.syncs == self.crash_at:
            self.left = self._what_is_left()
            raise Crash
        self._real(fd)
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            self._names = {path.name: path.stat().st_ino for path in self.directory.iterdir()}
            self._lost = {name: self._synced.get(inode, b"") for name, inode in self._names.items()}
        else:
            self._synced[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def restart(self, where: Path) -> Path:
        """Lay out what is left in a new directory."""
        assert self.left is not None, "there was no crash"
        where.mkdir()
        for name, data in self.left.items():
            (where / name).write_bytes(data)
        return where

    def _what_is_left(self) -> dict[str, bytes]:
        now = {path.name: path for path in self.directory.iterdir()}
        found = {}
        for name in sorted(now.keys() | self._names.keys()):
            before = self._names.get(name)
            same = name in now and now[name].stat().st_ino == before
            if same or (name in now and self._dice.random() < 0.5):
                found[name] = self._torn(now[name])
            elif before is not None and (name in now or self._dice.random() < 0.5):
                found[name] = self._lost[name]
        return found

    def _torn(self, path: Path) -> bytes:
        data, synced = path.read_bytes(), self._synced.get(path.stat().st_ino, b"")
        if not data.startswith(synced):  # cut shorter since, or another file with a number that is used again
            synced = synced[: len(data)] if synced.startswith(data) else b""
        end = self._dice.randint(len(synced), len(data))
        hole = self._dice.randint(len(synced), end)
        return data[:hole] + self._dice.choice([data[hole:end], bytes(end - hole), b""])
