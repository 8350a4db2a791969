"""A group whose every member can be made to say anything that its USIG certifies, and judges who listen.

Streams are append-only, as the wormhole makes them: one message per counter. A *judge* is a real `Configuration`; what
it hears, and in which order, the test decides.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch
from cloudfit_orchestrator.bft.messages import (
    NOOP,
    Bundle,
    BundleBody,
    Named,
    Request,
    Signed,
    StatementMessage,
    bundle_bytes,
    encode,
)
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.judge import StreamState, judge
from cloudfit_orchestrator.bft.usig.logvotes import WEDGE
from cloudfit_orchestrator.bft.usig.merge import Merged
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Entry,
    Header,
    Merge,
    NewView,
    Prepare,
    Req,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
    decode_header,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import (
    Algorithm,
    Client,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    Status,
    confirm_body,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import public_bytes, sha256
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from cloudfit_orchestrator.model.ui import EpochEnd, epoch_end_bytes, ui_bytes
from cloudfit_orchestrator.testing.crypto import HashKey, KeyRing

GROUP = "ledger"
CONTROLLER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x07")


class House:
    """Members r0…, their keys and streams in one configuration. `k`, `L`: checkpoint period and window in slots."""

    def __init__(
        self,
        n: int = 3,
        *,
        f: int = 1,
        algorithm: str = Algorithm.EBAWA,
        period: int = 1,
        window: int = 2,
        c: int = 1,
        keys: KeyRing | None = None,
        clients: int = 1,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        rng = random.Random(n * 100 + c)
        self.keys = keys or KeyRing()
        self.usig: dict[str, HashKey] = {}
        self.kss: dict[str, HashKey] = {}
        members = []
        for i in range(n):
            name = f"r{i}"
            self.usig[name], self.kss[name] = self.keys.generate(rng), self.keys.generate(rng)
            members.append(
                Member(
                    name, i + 1, f"cloud{i}", f"10.0.0.{i}:7000", self.usig[name].public, self.kss[name].public,
                    b"ca%d" % i, "sha256:" + "0" * 64, "sha256:" + "1" * 64,
                )
            )  # fmt: skip
        crng = random.Random(77)
        self.client_keys = [self.keys.generate(crng) for _ in range(clients)]
        settings = {"checkpoint_period": period, "window": window, **(parameters or {})}
        prepared = ConfigRecord(
            GROUP, c, None if c == 1 else c - 1, tuple(members),
            tuple(Client(f"c{i}", key.public, b"cert") for i, key in enumerate(self.client_keys)),
            "counter", f, 0, algorithm, Parameters(**settings), bytes(32),
        )  # fmt: skip
        self.prepared = seal_record(prepared, CONTROLLER)
        self.record, self.envelope = self.activate(prepared, 0, StateStore().root())
        self.controllers = [public_bytes(CONTROLLER)]
        self.streams: dict[str, list[StreamMessage]] = {m.replica: [] for m in members}
        self.order: list[StreamMessage] = []
        self.batches: dict[bytes, bytes] = {}
        self.names = [m.replica for m in members]
        self._number = 0

    # ----- records and judges
    def activate(self, prepared: ConfigRecord, h: int, digest: bytes) -> tuple[ConfigRecord, bytes]:
        """The ACTIVE record of `prepared`, confirmed by all members, and its envelope."""
        name = record_hash(seal_record(prepared, CONTROLLER))
        body = confirm_body(name, h, digest)
        confirmations = tuple(
            Confirmation(r, self.kss[r].sign(statement_bytes(Kind.CONFIRM, GROUP, r, prepared.c, body)))
            for r in (m.replica for m in prepared.members)
        )  # fmt: skip
        active = prepared.activated(prepared=name, previous=bytes(32), h=h, digest=digest, confirmations=confirmations)
        return active, seal_record(active, CONTROLLER)

    def successor(self, c: int = 2, **changes: Any) -> bytes:
        """The envelope of a PREPARED(c) on this base."""
        record = replace(
            self.record, c=c, base=self.record.c, status=Status.PREPARED, h=0, digest=bytes(32), confirmations=(),
            prepared=bytes(32), **changes,
        )  # fmt: skip
        return seal_record(record, CONTROLLER)

    def judge(self) -> Configuration:
        """A judge who has heard nothing."""
        return Configuration(self.record, record_hash(self.envelope), self.keys, self.controllers)

    def full_judge(self) -> Configuration:
        """A judge who has heard everything."""
        judge = self.judge()
        self.tell(judge)
        return judge

    def tell(self, judge: Configuration, messages: Sequence[StreamMessage] | None = None) -> None:
        """Hand messages (all that were said) and their batches to a judge."""
        for message in self.order if messages is None else messages:
            judge.offer(message)
            header = _header(message)
            if isinstance(header, Prepare) and header.batch in self.batches:
                judge.offer_batch(self.batches[header.batch], named_by=message.header)
        for _ in range(3):  # what a merge misses is asked for, and comes
            judge.advance()
            for digest in list(judge.wanted.batches):
                if digest in self.batches:
                    judge.offer_batch(self.batches[digest])

    # ----- saying things
    def say(self, who: str, header: Header | bytes, payload: bytes = b"") -> StreamMessage:
        """Certify anything as the next message of a stream."""
        data = header if isinstance(header, bytes) else encode(header)
        cv = len(self.streams[who]) + 1
        message = StreamMessage(self.record.c, who, cv, data, payload, b"")
        message = replace_certificate(message, self.certify(who, cv, message.digest))
        self.streams[who].append(message)
        self.order.append(message)
        return message

    def certify(self, who: str, cv: int, digest: bytes) -> bytes:
        """A UI certificate."""
        return self.usig[who].sign(ui_bytes(GROUP, who, self.record.c, cv, digest))

    def statement(self, who: str, kind: Kind, *fields: Any) -> StatementMessage:
        """A KSS-signed statement."""
        body = LAYOUT[kind].pack(*fields)
        signature = self.kss[who].sign(statement_bytes(kind, GROUP, who, self.record.c, body))
        return StatementMessage(self.record.c, who, kind, body, signature)

    def checkpoint(self, h: int, digest: bytes, *who: str) -> tuple[Signed, ...]:
        """A checkpoint certificate."""
        signers = who or tuple(self.names[: self.record.f + 1])
        return tuple(Signed(r, self.statement(r, Kind.CHECKPOINT, h, digest).signature) for r in signers)

    def requests(self, g: int, *who: str) -> tuple[Req, ...]:
        """A REQ certificate."""
        signers = who or tuple(self.names[: self.record.f + 1])
        return tuple(Req(r, g, self.statement(r, Kind.REQ, g).signature) for r in signers)

    def epoch_end(self, who: str) -> EpochEnd:
        """The wormhole closes `who`'s epoch."""
        stream = self.streams[who]
        digest = stream[-1].digest if stream else bytes(32)
        certificate = stream[-1].certificate if stream else bytes(64)
        end = EpochEnd(who, self.record.c, len(stream), digest, certificate, b"")
        return replace(end, signature=self.usig[who].sign(epoch_end_bytes(GROUP, end)))

    def batch(self, *, client: int = 0, valid: bool = True) -> bytes:
        """The digest of a new batch with one request."""
        self._number += 1
        data = make_batch([self.bundle([(self._number, self._number.to_bytes(8, "big"))], client=client)])
        if not valid:
            data = make_batch([b"no bundle %d" % self._number])
        digest = batch_digest(data)
        self.batches[digest] = data
        return digest

    def bundle(self, requests: Sequence[tuple[int, bytes]], *, client: int = 0) -> bytes:
        """A signed bundle."""
        key = self.client_keys[client]
        body = encode(BundleBody(self.record.life, key.public, tuple(Request(n, op) for n, op in requests)))
        return encode(Bundle(body, key.sign(bundle_bytes(body))))

    # ----- the messages by name
    def prepare(self, who: str, g: int, s: int, batch: bytes | None = None) -> StreamMessage:
        return self.say(who, Prepare(self.record.c, g, s, self.batch() if batch is None else batch))

    def skip(self, who: str, g: int, s1: int, s2: int) -> StreamMessage:
        return self.say(who, Skip(self.record.c, g, s1, s2))

    def commit(self, who: str, *proposals: StreamMessage) -> StreamMessage:
        header = _header(proposals[0])
        assert isinstance(header, Prepare | Skip)
        return self.say(who, Commit(self.record.c, header.g, tuple(entry_of(p) for p in proposals)))

    def stable(self, who: str, h: int, **false: Any) -> StreamMessage:
        """STABLE(h): states the truth of its stream, but for what `false` says; attests all last STABLEs that stand."""
        listener = self.full_judge()
        state = listener.streams[who].state
        digest = sha256(b"state", h.to_bytes(8, "big"))
        vector = tuple(s.last_stable for r, s in listener.streams.items() if r != who)
        told: dict[str, Any] = {
            "digest": digest, "certificate": self.checkpoint(h, digest), "v": state.v, "e": state.e, "p": state.p,
            "blacklist": state.blacklist, "retired": state.retired, "vector": vector,
        }  # fmt: skip
        return self.say(who, Stable(self.record.c, h, **{**told, **false}))

    def view_change(self, who: str, g: int, retires: tuple[bytes, ...] = ()) -> StreamMessage:
        return self.say(who, ViewChange(self.record.c, g, self.requests(g), retires))

    def wedge(self, who: str, prepared: bytes | None = None) -> StreamMessage:
        return self.say(who, Wedge(self.record.c, prepared or self.successor()))

    def merged(self, g: int, votes: Sequence[StreamMessage], judge: Configuration | None = None) -> Merged:
        """What a judge computes from these VIEW-CHANGEs (g = WEDGE: wedges)."""
        listener = judge or self.full_judge()
        names = {v.replica for v in votes}
        found = [vote for vote in listener.votes.of(g) if vote.name.replica in names]
        assert len(found) == len(votes), f"only {[v.name.replica for v in found]} count"
        for _ in range(3):
            outcome = listener.try_merge(found)
            if outcome is not None:
                return outcome
            for digest in list(listener.wanted.batches):
                if digest in self.batches:
                    listener.offer_batch(self.batches[digest])
        raise AssertionError(f"the merge misses {listener.wanted}")

    def new_view(self, who: str, g: int, votes: Sequence[StreamMessage], **false: Any) -> StreamMessage:
        """NEW-VIEW(g) computed from `votes` by one who has heard everything, but for what `false` says."""
        m = self.merged(g, votes)
        names = tuple(Named(v.replica, v.cv, v.digest) for v in votes)
        choices = false.pop("choices", m.choices)
        header = NewView(self.record.c, g, m.h, m.s_max, m.blacklist, m.retired)
        fields = {name: getattr(header, name) for name in header.__struct_fields__}
        return self.say(who, NewView(**{**fields, **false}), encode(Merge(names, choices)))

    def commit_view(self, who: str, view: StreamMessage) -> StreamMessage:
        header = _header(view)
        assert isinstance(header, NewView)
        return self.say(
            who,
            CommitNewView(self.record.c, header.g, view.cv, view.header, sha256(view.payload), view.certificate),
        )

    # ----- what follows
    def accepts(self, who: str, header: Header, payload: bytes = b"", judge_: Configuration | None = None) -> bool:
        """Whether a judge's rules allow `who` to say this next (a correct replica asks itself first)."""
        listener = judge_ or self.full_judge()
        stream = listener.streams[who]
        cv = stream.cursor + 1
        message = StreamMessage(self.record.c, who, cv, encode(header), payload, b"")
        outcome = judge(self.record, stream.state, who, cv, header, message, listener)
        return stream.ended is None and isinstance(outcome, StreamState)

    def decisions(self, *judges: Configuration) -> dict[int, set[bytes]]:
        """What each slot was decided as, by all these judges."""
        found: dict[int, set[bytes]] = {}
        for judge_ in judges:
            for s, digest in judge_.slots.decisions():
                found.setdefault(s, set()).add(digest)
        return found


def _header(message: StreamMessage) -> Header | None:
    try:
        return decode_header(message.header)
    except BadError:  # tests may say bytes that are no header
        return None


def replace_certificate(message: StreamMessage, certificate: bytes) -> StreamMessage:
    """The same message with another certificate."""
    return StreamMessage(message.c, message.replica, message.cv, message.header, message.payload, certificate)


def entry_of(proposal: StreamMessage, **false: Any) -> Entry:
    """The COMMIT entry that carries a PREPARE or SKIP."""
    header = decode_header(proposal.header)
    assert isinstance(header, Prepare | Skip)
    ends = (header.s, header.s) if isinstance(header, Prepare) else (header.s1, header.s2)
    told = {
        "s1": ends[0], "s2": ends[1], "proposer": proposal.replica, "cv": proposal.cv, "header": proposal.header,
        "certificate": proposal.certificate,
    }  # fmt: skip
    return Entry(**{**told, **false})


__all__ = ["CONTROLLER", "GROUP", "NOOP", "WEDGE", "House", "entry_of", "replace_certificate"]
