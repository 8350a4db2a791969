"""Requests from clients and replies to them (protocol §3)."""

from collections import Counter

from cloudfit_orchestrator.bft.batch import (
    BATCH_BYTES,
    Checked,
    batch_digest,
    bundle_body,
    bundle_name,
    fits,
    make_batch,
)
from cloudfit_orchestrator.bft.clients import MAX_SLOT_RESULTS, ClientWindow, Executed, reply_tree
from cloudfit_orchestrator.bft.effects import Answer
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import Forward, Overloaded, Replies, Result, encode
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.reads import ReadDesk
from cloudfit_orchestrator.bft.situation import Situation, peer_id
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

AGAIN_S = 0.05  # repeated requests are gathered for so long: the answer to all of them costs one signature
MAX_ANSWER_BYTES = 1 << 20  # results in one frame to a client; more become leaves and frames of their own
MAX_AGAIN = 256  # repeated requests of one client that are answered at once


class ClientDesk:
    """Takes bundles in, proposes them, answers."""

    def __init__(self, situation: Situation, outbox: Outbox, reads: ReadDesk) -> None:
        self._at = situation
        self._out = outbox
        self._reads = reads
        self._again: dict[bytes, dict[int, Result]] = {}  # client -> results to send again
        self._again_bytes: Counter[bytes] = Counter()  # of them

    def take(self, data: bytes, client: bytes | None = None) -> None:
        """A bundle, from its `client` or (None) handed on by a peer. Executed requests are answered from the table."""
        ordering = self._at.ordering
        if ordering is None or not self._at.installed or not self._at.member:
            self._turn_away(data, client)
            return
        limits = ordering.record.parameters
        try:
            name = bundle_name(data)
            body = ordering.batches.checker.check(data, name)
        except BadError:
            self._out.count("bad_bundle")
            return
        if not fits(data, body, limits) or (client is not None and body.client != client):
            self._out.count("bad_bundle")
            return
        row = ClientWindow(self._at.execution.store, body.client)
        known: list[Result] = []
        fresh: list[int] = []
        for request in body.requests:
            result = row.cached(request.number)
            if result is not None:
                known.append(Result(request.number, result))
            elif row.acceptable(request.number, limits.client_window):
                fresh.append(request.number)
        if known and client is not None:
            self._gather(body.client, known)
        if fresh and not self._at.pool.add(name, data, body, self._out.now_s) and client is not None:
            self._out.count("overloaded")
            self._out.put(Answer(client, encode(Overloaded(tuple(fresh)))))

    def _gather(self, client: bytes, known: list[Result]) -> None:
        """To be sent again. Where it is too much for one answer to all, who asks for most gives way, and asks again."""
        again = self._again.setdefault(client, {})
        again.update((result.number, result) for result in known[:MAX_AGAIN])
        while len(again) > MAX_AGAIN:
            del again[next(iter(again))]
        sizes = self._again_bytes
        sizes[client] = sum(len(result.result) for result in again.values())
        while sizes.total() > MAX_SLOT_RESULTS:
            ((most, _),) = sizes.most_common(1)
            sizes[most] -= len(self._again[most].pop(next(iter(self._again[most]))).result)

    def _turn_away(self, data: bytes, client: bytes | None) -> None:
        """Say at once that nothing can be done for it here now: the client need not wait to ask others."""
        if client is None:
            return
        try:
            _, body = bundle_body(data)
        except BadError:
            self._out.count("bad_bundle")
            return
        self._out.put(Answer(client, encode(Overloaded(tuple(request.number for request in body.requests)))))

    def answer_again(self) -> None:
        """Answer what was executed before and is asked for again: one signature for all clients together."""
        if self._again and self._out.every("again", AGAIN_S):
            waiting = [Executed(client, tuple(again.values())) for client, again in self._again.items() if again]
            self._again.clear()
            self._again_bytes.clear()
            self.reply(self._at.execution.slot, waiting)

    def reply(self, slot: int, executed: list[Executed]) -> None:
        """One signature for all replies of a slot."""
        if not self._at.member or self._out.replaying:
            return
        c, me = self._at.c, self._at.me
        executed = [part for item in executed for part in _frames(item)]
        root, paths = reply_tree(executed)

        def send(signature: bytes) -> None:
            for item, path in zip(executed, paths, strict=True):
                self._out.put(Answer(item.client, encode(Replies(me, c, slot, item.results, path, signature))))

        # A reply shows a slot that Qc members have logged before they voted: it need not wait for our own log.
        size = sum([len(result.result) for item in executed for result in item.results])
        self._reads.sign(c, Kind.REPLY, LAYOUT[Kind.REPLY].pack(slot, root), send, size)

    def executed(self, batch: Checked) -> None:
        """A batch was executed: its bundles wait no more."""
        if self._at.ordering is not None:
            self._at.ordering.batches.executed(batch.digest)
        for name in batch.names:
            self._at.pool.remove(name)

    def take_batch(self, slot: int) -> bytes | None:
        """See `ordering.TakeBatch`."""
        ordering = self._at.ordering
        if ordering is None or not self._at.installed or not self._at.pool.unproposed:
            return None
        limits = ordering.record.parameters
        bundles = self._at.pool.take(limits.max_batch_requests, limits.max_batch_bytes - BATCH_BYTES)
        if not bundles:
            return None
        batch = make_batch(bundles)
        digest = batch_digest(batch)
        if ordering.batches.add(digest, batch):
            self._out.journal(LogBatch(ordering.record.c, batch))
        ordering.batches.name(digest, slot)
        return digest

    def hand_on(self, ordering: Ordering) -> None:
        """Who does not propose at all hands bundles on as they come: until the next tick a slot would be over."""
        if self._at.pool.kept and not ordering.proposes and ordering.may_suspect and self._at.installed:
            self.forward(ordering, behind=False)

    def forward(self, ordering: Ordering, *, behind: bool) -> None:
        """Who may not propose, or is too far `behind` to, hands bundles on to one who may."""
        replica = ordering.forward_to(behind=behind)
        chosen = ordering.record.member(replica) if replica is not None else None
        if chosen is not None:
            for waiting in self._at.pool.to_forward():
                self._out.send(peer_id(chosen.replica, chosen.incarnation), Forward(waiting.data))

    def prune(self, record: ConfigRecord) -> None:
        """Bundles that were executed under another wrapping, or left their client's window, wait for nothing."""
        width = record.parameters.client_window
        for waiting in self._at.pool.bundles():
            row = ClientWindow(self._at.execution.store, waiting.body.client)
            numbers = [request.number for request in waiting.body.requests]
            if all(row.cached(n) is not None or not row.acceptable(n, width) for n in numbers):
                self._at.pool.remove(waiting.name)

    def recheck(self, ordering: Ordering) -> None:
        """A new configuration may have other clients, and other limits."""
        for waiting in self._at.pool.bundles():
            try:
                body = ordering.batches.checker.check(waiting.data, waiting.name)
            except BadError:
                self._at.pool.remove(waiting.name)
                continue
            if not fits(waiting.data, body, ordering.record.parameters):
                self._at.pool.remove(waiting.name)
        self._at.pool.release()


def _frames(item: Executed) -> list[Executed]:
    """One client's results, in parts that fit into a frame each."""
    if sum([len(result.result) for result in item.results]) <= MAX_ANSWER_BYTES:
        return [item]
    parts: list[list[Result]] = [[]]
    size = 0
    for result in item.results:
        size += len(result.result)
        if size > MAX_ANSWER_BYTES and parts[-1]:
            parts.append([])
            size = len(result.result)
        parts[-1].append(result)
    return [Executed(item.client, tuple(part)) for part in parts]
