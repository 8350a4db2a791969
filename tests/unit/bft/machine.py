"""One real `Replica` among members that a `House` speaks for: its effects are carried out at once, or held back."""

from collections.abc import Iterable, Mapping

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.effects import (
    Answer,
    Append,
    Certify,
    DropSnapshots,
    Effect,
    EndEpoch,
    Report,
    Rewrite,
    SaveSnapshot,
    Send,
    Sign,
)
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import Frozen, encode
from cloudfit_orchestrator.bft.replica import Replica
from cloudfit_orchestrator.bft.store import Snapshot
from cloudfit_orchestrator.bft.usig.journal import LogBody, decode_entry
from cloudfit_orchestrator.bft.usig.messages import Header, StreamMessage, decode_header, decode_peer
from cloudfit_orchestrator.model.statement import Kind, statement_bytes
from cloudfit_orchestrator.services.counter import CounterService
from tests.unit.bft.house import GROUP, House


class Machine:
    """`me` of `house`. `wormhole`, `kss` and `saving` say who answers; what waits is carried out later by `serve`."""

    def __init__(
        self,
        house: House,
        me: str,
        *,
        log: Iterable[bytes] = (),
        snapshots: Mapping[tuple[int, int], Snapshot] | None = None,
        start: bool = True,
        incarnation: int | None = None,
    ) -> None:
        """`incarnation`: another one than the member's, for a machine that is no member yet."""
        self.house, self.me = house, me
        self.log: list[bytes] = list(log)
        self.disk: dict[tuple[int, int], Snapshot] = dict(snapshots or {})
        self.wormhole = self.kss = self.saving = True
        self.sent: list[tuple[str, Frozen]] = []
        self.answers: list[tuple[bytes, bytes]] = []
        self.reports: list[tuple[str, dict[str, object]]] = []
        self.waiting: list[Effect] = []
        self.ends: list[int] = []
        self.rewrites = 0
        self.now_s = 0.0
        member = house.record.member(me)
        assert member is not None
        self.incarnation = member.incarnation if incarnation is None else incarnation
        self.core = Replica(
            group=GROUP, replica=me, incarnation=self.incarnation, service=CounterService(),
            controller_keys=house.controllers, verifier=house.keys, log=self.log, snapshots=self.disk,
        )  # fmt: skip
        if start:
            self.start()

    def start(self) -> None:
        """The record comes, the session opens."""
        self.serve()
        if self.core.status["c"] < self.house.record.c:
            self.core.record(self.house.prepared)
            self.serve()
            self.core.record(self.house.envelope)
            self.serve()
        self.session()

    def session(self) -> None:
        """The wormhole opens a session."""
        stream = self.house.streams[self.me]
        recent = [(m.cv, m.digest, m.certificate) for m in stream[-64:]]
        self.core.session(self.house.record.c, len(stream) + 1, recent)
        self.serve()

    def serve(self) -> None:
        """Carry out all effects, those that waited first, until there are none."""
        while True:
            effects = [*self.waiting, *self.core.effects()]
            self.waiting = []
            held = [e for e in effects if not self._carry_out(e)]
            self.waiting = held
            if len(held) == len(effects):
                return

    def _carry_out(self, effect: Effect) -> bool:
        match effect:
            case Append():
                self.log.append(effect.record)
                entry = decode_entry(effect.record)
                if isinstance(entry, LogBatch):
                    self.house.batches[batch_digest(entry.batch)] = entry.batch
            case Rewrite():
                self.log = list(effect.records)
                self.rewrites += 1
            case Certify():
                if not self.wormhole:
                    return False
                self._certify(effect)
            case Sign():
                if not self.kss:
                    return False
                key = self.house.kss[self.me]
                self.core.signed(
                    effect.token, key.sign(statement_bytes(effect.kind, GROUP, self.me, effect.c, effect.body))
                )
            case EndEpoch():
                self.ends.append(effect.c)
            case Send():
                self.sent.append((effect.peer, decode_peer(effect.body)))
            case Answer():
                self.answers.append((effect.client, effect.body))
            case SaveSnapshot():
                if not self.saving:
                    return False
                self.disk[effect.c, effect.slot] = effect.snapshot
                self.core.saved(effect.c, effect.slot)
            case DropSnapshots():
                self.disk = {name: x for name, x in self.disk.items() if name in effect.keep}
            case Report():
                self.reports.append((effect.topic, effect.body))
        return True

    def _certify(self, effect: Certify) -> None:
        stream = self.house.streams[self.me]
        if effect.cv == len(stream):  # asked again
            assert stream[-1].digest == effect.digest
        else:
            assert effect.cv == len(stream) + 1, "the wormhole never skips a counter"
            bodies = [e for e in map(decode_entry, self.log) if isinstance(e, LogBody) and e.cv == effect.cv]
            body = bodies[-1]
            message = self.house.say(self.me, body.header, body.payload)
            assert message.digest == effect.digest, "a body is in the log before its UI is asked for"
        self.core.certified(effect.c, effect.cv, stream[-1].certificate)

    # ----- inputs
    def hear(self, *messages: Frozen, sender: str = "r1#2", batches: bool = True) -> None:
        """Frames from a peer; a PREPARE brings its batch."""
        for message in messages:
            self.core.receive(sender, encode(self._with_batch(message) if batches else message))
            self.serve()

    def _with_batch(self, message: Frozen) -> Frozen:
        if not isinstance(message, StreamMessage):
            return message
        for digest, data in self.house.batches.items():
            if digest in message.header and len(message.header) < 200:
                return StreamMessage(
                    message.c, message.replica, message.cv, message.header, message.payload, message.certificate, data
                )
        return message

    def ticks(self, seconds: float, step_s: float = 0.05) -> None:
        """Time passes."""
        for _ in range(round(seconds / step_s)):
            self.now_s += step_s
            self.core.tick(self.now_s)
            self.serve()

    def client(self, bundle: bytes, client: int = 0) -> None:
        """A client's frame."""
        self.core.from_client(self.house.client_keys[client].public, bundle)
        self.serve()

    # ----- outputs
    def said(self) -> list[Header]:
        """The headers of the own stream."""
        return [decode_header(m.header) for m in self.house.streams[self.me]]

    def signs(self, kind: Kind) -> list[Sign]:
        """Requests to the KSS that wait."""
        return [e for e in self.waiting if isinstance(e, Sign) and e.kind is kind]

    def restarted(self, log: Iterable[bytes] | None = None, *, start: bool = True) -> "Machine":
        """The machine that starts again from this one's disk."""
        log = self.log if log is None else log
        return Machine(self.house, self.me, log=log, snapshots=self.disk, start=start, incarnation=self.incarnation)
