"""Where effects gather, and the clock that the core is told. While a log is read again, nothing leaves."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from cloudfit_orchestrator.bft.effects import Append, Effect, Report, Send, Sign
from cloudfit_orchestrator.bft.journal import encode_entry
from cloudfit_orchestrator.bft.messages import Frozen, encode
from cloudfit_orchestrator.model.statement import Kind

MAX_REPLY_SIGNS = 4096  # replies waiting for their signature; the oldest is given up: clients ask again
MAX_REPLY_BYTES = 32 << 20  # of results in them
MAX_ANSWERS = 32 << 20  # bytes made for one peer before the effects are drained, as many as its queue takes
MAX_OTHER_SIGNS = 256  # checkpoints, REQs, confirmations: few are under way; a refused one leaves its place here


_Awaited = tuple[Kind, Callable[[bytes], None], int]  # of what kind, what to do then, bytes that wait with it


class Outbox:
    """Effects in order; signatures that are awaited; counters; intervals."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.replaying = True
        self.log_size = 0  # records
        self.log_bytes = 0
        self.kept_bytes = 0  # of the log when it was last written anew
        self.counters: dict[str, int] = {}
        self._effects: list[Effect] = []
        self._awaited: dict[bool, dict[int, _Awaited]] = {True: {}, False: {}}  # replies?
        self._reply_bytes = 0
        self._answered: Counter[str] = Counter()  # peer -> bytes since the effects were drained
        self._token = 0
        self._due: dict[str, float] = {}
        self._blamed: set[tuple[str, str]] = set()  # (replica, kind): members, and rules that can be broken

    def drain(self) -> list[Effect]:
        """The effects since the last time."""
        effects, self._effects = self._effects, []
        self._answered.clear()
        return effects

    def put(self, effect: Effect) -> None:
        """One effect."""
        if not self.replaying:
            self._effects.append(effect)

    def journal(self, entry: Frozen) -> None:
        """Append to the write-ahead log."""
        if not self.replaying:
            data = encode_entry(entry)
            self.logged(data)
            self._effects.append(Append(data))

    def logged(self, *records: bytes) -> None:
        """So much is in the log now."""
        self.log_size += len(records)
        self.log_bytes += sum(map(len, records))

    def send(self, peer: str, message: Frozen) -> None:
        """One message to one peer."""
        self.put(Send(peer, encode(message)))

    def answer(self, peer: str, answers: Iterable[Frozen]) -> None:
        """Answers to a question of a peer, as far as there is room for them: it asks again for the rest."""
        made = iter(answers)
        while self._answered[peer] < MAX_ANSWERS and (message := next(made, None)) is not None:
            data = encode(message)
            self._answered[peer] += len(data)
            self.put(Send(peer, data))

    def broadcast(self, peers: Iterable[str], message: Frozen, awaited: Callable[[str], bool] = lambda _: True) -> None:
        """One message to many; `awaited` tells of a peer whether it waits for it."""
        data = encode(message)
        for peer in peers:
            self.put(Send(peer, data, awaited(peer)))

    def sign(
        self, c: int, kind: Kind, body: bytes, then: Callable[[bytes], None], *, waits: bool = True, size: int = 0
    ) -> None:
        """Ask the KSS, once the log is on the disk or, if it need not wait for that, at once; `then(signature)` when
        it is there. `size`: bytes that wait with it.
        """
        if self.replaying:
            return
        reply = kind in (Kind.REPLY, Kind.READ)
        awaited = self._awaited[reply]
        while awaited and (
            len(awaited) >= (MAX_REPLY_SIGNS if reply else MAX_OTHER_SIGNS)
            or (reply and self._reply_bytes + size > MAX_REPLY_BYTES)
        ):
            self._reply_bytes -= awaited.pop(next(iter(awaited)))[2]
        self._token += 1
        self._reply_bytes += size
        awaited[self._token] = kind, then, size
        self._effects.append(Sign(c, kind, body, self._token, waits))

    def signed(self, token: int, signature: bytes) -> Kind | None:
        """A signature arrived. Of what kind of statement; None if nobody waits for it."""
        for awaited in self._awaited.values():
            if token in awaited:
                kind, then, size = awaited.pop(token)
                self._reply_bytes -= size
                then(signature)
                return kind
        return None

    def forget_signs(self) -> None:
        """What is awaited belongs to an epoch that is over."""
        for awaited in self._awaited.values():
            awaited.clear()
        self._reply_bytes = 0

    def report(self, topic: str, body: dict[str, Any]) -> None:
        """Tell the controller."""
        self.put(Report(topic, body))

    def count(self, name: str) -> None:
        """Count an event."""
        self.counters[name] = self.counters.get(name, 0) + 1

    def blame(self, replica: str, kind: str, slot: int = 0) -> None:
        """`replica` lied or is wrong, provably; told once a kind. A member by its name; another incarnation of one by
        its peer id, and the report says which.
        """
        if (replica, kind) not in self._blamed:
            self._blamed.add((replica, kind))
            self.count(f"lies_{replica}")
            name, _, incarnation = replica.partition("#")
            which = {"incarnation": int(incarnation)} if incarnation else {}
            self.report("liar", {"replica": name, **which, "kind": kind, "slot": slot})

    # ---------------------------------------------------------------------------------------------------------- time
    def every(self, name: str, seconds: float) -> bool:
        """True at most once in so many seconds."""
        if self.now_s < self._due.get(name, 0.0):
            return False
        self._due[name] = self.now_s + seconds
        return True

    def later(self, name: str, seconds: float) -> None:
        """Something falls due, if it is not planned already."""
        self._due.setdefault(name, self.now_s + seconds)

    def due(self, name: str) -> bool:
        """It was planned, and its time has come; then it is planned no more."""
        if name in self._due and self.now_s >= self._due[name]:
            del self._due[name]
            return True
        return False
