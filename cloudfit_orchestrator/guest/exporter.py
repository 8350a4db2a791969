"""The recovery machine's entry: reads an old state disk, which anybody may have written, and serves it to learners.

Nothing here is believed, least of all by itself: chunks are sent as they lie on the disk, and who receives one checks
it against a certified root. Own checks only make the report `found`, which says what the disk looks like. The machine
has no keys but its TLS key, and speaks only with the peers that the controller names by `learn` commands.
"""

import asyncio
import base64
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.effects import Report
from cloudfit_orchestrator.bft.engines import any_entry_decoder
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import (
    MAX_CHUNKS_ASKED,
    MAX_FETCH,
    BatchMessage,
    Chunk,
    ChunkQuery,
    FetchBatches,
    StateIndex,
    StateQuery,
    encode,
)
from cloudfit_orchestrator.bft.store import BUCKETS
from cloudfit_orchestrator.bft.usig.journal import LogBody, LogMessage, LogUI
from cloudfit_orchestrator.bft.usig.messages import Fetch, PeerMessage, StreamMessage, decode_peer
from cloudfit_orchestrator.guest import machine
from cloudfit_orchestrator.guest.certifier import Certifier, Nobody
from cloudfit_orchestrator.guest.channel import Handlers
from cloudfit_orchestrator.guest.runtime import Greeter, obtain_credentials
from cloudfit_orchestrator.guest.snapshots import Index, SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFailedError, DiskFullError
from cloudfit_orchestrator.guest.transport import Transport
from cloudfit_orchestrator.guest.wal import WriteAheadLog
from cloudfit_orchestrator.model.errors import BadError

MAX_LOG_BYTES = 64 << 20  # of log records kept in memory; more are counted and left on the disk
RECORD_BYTES = 512  # what a record costs beyond its own bytes: a hostile log is made of the smallest
MAX_LEARNERS = 8
MAX_NAMED = 1024  # corrupt chunks named in the report: all chunks of one snapshot
STATE_ERROR = Path("/run/cloudfit/state-error")  # init says there why it could not mount the disk


@dataclass(frozen=True)
class Learner:
    """A peer that a command named."""

    peer_id: str
    address: str
    channel_ca: bytes


@dataclass
class OldDisk:
    """What could be read."""

    replica: str
    files: SnapshotFiles
    newest: Index | None
    streams: dict[tuple[int, str, int], StreamMessage] = field(default_factory=dict)  # (c, replica, cv)
    batches: dict[bytes, bytes] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, state: Path, replica: str) -> "OldDisk":
        """Reads everything once, changing nothing. Blocks; never raises for what a disk may hold."""
        files = SnapshotFiles(state / "snapshots", read_only=True)
        newest = max(files.indexes.values(), key=lambda index: (index.c, index.slot), default=None)
        disk = cls(replica, files, newest)
        disk.found = {"snapshots": len(files.indexes), "damaged": [f"{d.file}: {d.fact}" for d in files.damaged][:64]}
        if newest is not None:
            disk._look_at_chunks(newest)
        disk._read_log(state / "wal")
        if STATE_ERROR.exists():
            disk.found["mount"] = STATE_ERROR.read_text(errors="replace")[:1000]
        return disk

    def index(self, root: bytes) -> Index | None:
        """The snapshot with that root, or the newest one."""
        return next((index for index in self.files.indexes.values() if index.root == root), self.newest)

    def answer(self, question: PeerMessage) -> Iterator[PeerMessage]:
        """What the disk says to one question."""
        match question:
            case StateQuery():
                index = self.index(question.root)
                if index is not None:
                    yield StateIndex(index.root, index.slot, b"".join(index.chunk_hashes))
            case ChunkQuery():
                index = self.index(question.root)
                for i in question.indices[:MAX_CHUNKS_ASKED]:
                    if 0 <= i < BUCKETS:
                        yield self._chunk(index, question.root, i)
            case Fetch():
                for cv in range(question.first, min(question.last, question.first + MAX_FETCH - 1) + 1):
                    message = self.streams.get((question.c, question.replica, cv))
                    if message is not None:
                        yield message
            case FetchBatches():
                for digest in question.digests[:MAX_FETCH]:
                    if digest in self.batches:
                        yield BatchMessage(self.batches[digest])

    def _chunk(self, index: Index | None, root: bytes, i: int) -> Chunk:
        if index is None:
            return Chunk(root, i, b"", missing=True)
        try:
            return Chunk(root, i, self.files.read_unchecked(index, i))
        except BadError:
            return Chunk(root, i, b"", missing=True)

    def _look_at_chunks(self, index: Index) -> None:
        size, corrupt = 0, []
        for i in range(BUCKETS):
            try:
                size += self.files.look_at(index, i)
            except BadError:
                corrupt.append(i)
        self.found |= {
            "c": index.c,
            "slot": index.slot,
            "root": index.root.hex(),
            "chunks": BUCKETS - len(corrupt),
            "bytes": size,
            "corrupt": corrupt[:MAX_NAMED],
        }

    def _read_log(self, path: Path) -> None:
        kept = records = malformed = 0
        bodies: dict[tuple[int, int], LogBody] = {}
        try:
            log = WriteAheadLog(path, read_only=True)
            for data in log.records():
                records += 1
                if kept + len(data) + RECORD_BYTES > MAX_LOG_BYTES:
                    continue
                kept += len(data) + RECORD_BYTES
                try:
                    self._take_entry(data, bodies)
                except (BadError, ValueError):
                    malformed += 1
            log.close()
        except (DiskFailedError, DiskFullError, OSError) as error:
            self.found["log"] = str(error)
        else:
            self.found["log_cut_bytes"] = log.cut_bytes
        self.found |= {"log_records": records, "log_malformed": malformed}

    def _take_entry(self, data: bytes, bodies: dict[tuple[int, int], LogBody]) -> None:
        entry = any_entry_decoder()(data)
        match entry:
            case LogMessage():
                message = entry.message
                self.streams[message.c, message.replica, message.cv] = message
            case LogBody():
                bodies[entry.c, entry.cv] = entry
            case LogUI():
                body = bodies.pop((entry.c, entry.cv), None)
                if body is not None:
                    self.streams[entry.c, self.replica, entry.cv] = StreamMessage(
                        entry.c, self.replica, entry.cv, body.header, body.payload, entry.certificate
                    )
            case LogBatch():
                self.batches[batch_digest(entry.batch)] = entry.batch


class Exporter:
    """Serves an `OldDisk`."""

    def __init__(self, where: machine.Machine) -> None:
        """Starts nothing."""
        self._where = where
        self._learners: dict[str, Learner] = {}
        self.counters: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled, or until something unexpected happens."""
        greeter = Greeter(self._where.port)
        channel_task = asyncio.get_running_loop().create_task(greeter.channel.run())
        welcome = await greeter.welcome()
        host = self._where.prepare_network(welcome)
        self._disk = await asyncio.to_thread(OldDisk.read, self._where.state, welcome.replica)
        credentials = await obtain_credentials(greeter.channel)
        self._transport = Transport(
            group=welcome.group, credentials=credentials, from_peer=self._asked, from_client=lambda _, __: None
        )
        await self._transport.listen(host, welcome.port)
        self._requests = Certifier(welcome.replica, greeter.channel, Nobody(), lambda *_: None, self.counters)
        greeter.attach(
            Handlers(
                opened=lambda _: self._requests.channel_opened(),
                lost=self._requests.channel_lost,
                record=lambda _: None,
                command=self._command,
            )
        )
        for doc in welcome.options.get("peers", ()):
            self._command({"op": "learn", "peer": doc})
        self._requests.report(Report("found", self._disk.found))
        machine.log("exporter serves", **{k: v for k, v in self._disk.found.items() if k not in ("corrupt", "damaged")})
        try:
            await channel_task
        finally:
            await self._requests.close()
            await self._transport.close()

    def _command(self, body: dict[str, Any]) -> None:
        try:
            if body.get("op") == "learn" and len(self._learners) < MAX_LEARNERS:
                doc = body["peer"]
                ca = base64.b64decode(doc["channel_ca"], validate=True)
                learner = Learner(str(doc["peer_id"]), str(doc["address"]), ca)
                self._learners[learner.peer_id] = learner
            elif body.get("op") == "forget":
                self._learners.pop(str(body["peer_id"]), None)
            self._transport.configure(self._learners.values(), [])
        except (KeyError, TypeError, ValueError) as error:
            self.counters["bad command"] += 1
            machine.log("bad command", why=repr(error))

    def _asked(self, peer: str, body: bytes) -> None:
        try:
            question = decode_peer(body)
        except (BadError, msgspec.MsgspecError, ValueError):
            self.counters["malformed question"] += 1
            return
        for answer in self._disk.answer(question):
            data = encode(answer)
            self.counters["bytes sent"] += len(data)
            self._transport.send(peer, data)


async def exporter(where: machine.Machine) -> None:
    """Run the exporter of this machine."""
    await Exporter(where).run()


if __name__ == "__main__":
    sys.exit(machine.run(exporter))
