"""The client's side (protocol §3): f+1 equal replies under one c are an answer; who answered otherwise lied."""

from collections import Counter
from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.clients import reply_root
from cloudfit_orchestrator.bft.messages import Replies, reply_leaf
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes


@dataclass(slots=True)
class _Poll:
    votes: dict[tuple[int, bytes], set[str]] = field(default_factory=dict)  # (c, result) -> replicas


@dataclass(frozen=True, slots=True)
class Answered:
    """A request's result, with the replicas that signed another one under the same configuration."""

    number: int
    result: bytes
    against: tuple[str, ...]


class Ballot:
    """Collects the replies to one client's requests. `records`: ACTIVE configurations the client has verified, by c."""

    MAX_ANSWERED = 8192  # results remembered to catch late liars

    def __init__(self, client: bytes, verifier: Verifier) -> None:
        """`client`: its raw key."""
        self._client = client
        self._verifier = verifier
        self.records: dict[int, ConfigRecord] = {}
        self._polls: dict[int, _Poll] = {}
        self._answered: dict[int, tuple[int, bytes]] = {}  # number -> (c, result)
        self.lies: Counter[str] = Counter()
        self.unsigned: Counter[str] = Counter()

    def open(self, number: int) -> None:
        """A request was sent."""
        self._polls[number] = _Poll()

    def add(self, replica: str, message: Replies) -> list[Answered]:
        """Count a reply that arrived from `replica`. Returns the requests that it decides."""
        record = self.records.get(message.c)
        member = record.member(replica) if record is not None else None
        if record is None or member is None or message.replica != replica or len(message.path) > 16:
            self.unsigned[replica] += 1
            return []
        root = reply_root(reply_leaf(self._client, message.results), message.path)
        body = LAYOUT[Kind.REPLY].pack(message.slot, root)
        statement = statement_bytes(Kind.REPLY, record.group, replica, record.c, body)
        if not self._verifier.verify(member.kss_key, statement, message.signature):
            self.unsigned[replica] += 1
            return []
        return [a for r in message.results if (a := self._vote(record, replica, r.number, r.result)) is not None]

    def _vote(self, record: ConfigRecord, replica: str, number: int, result: bytes) -> Answered | None:
        done = self._answered.get(number)
        if done is not None:
            if done[1] != result:
                self.lies[replica] += 1
            return None
        poll = self._polls.get(number)
        if poll is None:
            return None
        voters = poll.votes.setdefault((record.c, result), set())
        voters.add(replica)
        if len(voters) <= record.f:
            return None
        del self._polls[number]
        against = {r for (_, other), who in poll.votes.items() if other != result for r in who}
        for liar in against:
            self.lies[liar] += 1
        self._answered[number] = (record.c, result)
        if len(self._answered) > self.MAX_ANSWERED:
            del self._answered[next(iter(self._answered))]
        return Answered(number, result, tuple(sorted(against)))
