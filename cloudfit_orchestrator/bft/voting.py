"""Which answer is believed: f+1 equal ones of distinct members under one configuration (protocol §2, §3). Sans-IO.

A reply counts only if it proves itself: the replica's KSS signature covers the slot's Merkle root, to which the
client's own results lead. So a wrong result with a good signature is the signer's lie, and can be shown to others.
"""

from collections import Counter, OrderedDict

from cloudfit_orchestrator.bft.clients import reply_root
from cloudfit_orchestrator.bft.messages import Replies, Result, reply_leaf
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, Verifier, sha256
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

MAX_ANSWERED = 8192  # answers remembered to convict those who come later
MAX_HELD = 256  # messages that wait for an equal one of another member; then they are counted number by number
MAX_PATH = 64  # Merkle siblings; a slot has far fewer than 2**64 clients


class Votes:
    """Counts replies to one client's requests."""

    def __init__(self, client: bytes, verifier: Verifier) -> None:
        """`client`: raw key. Nothing counts before a configuration is learnt."""
        self._client = client
        self._records: dict[int, ConfigRecord] = {}
        self._verifier = verifier
        self._open: dict[int, dict[int, dict[str, bytes]]] = {}  # number -> c -> replica -> result
        self._held: dict[tuple[int, bytes], tuple[tuple[Result, ...], set[str]]] = {}  # (c, leaf): who said all that
        self._answered: OrderedDict[int, tuple[int, bytes]] = OrderedDict()  # number -> (c, result as `_brief` has it)
        self._told: OrderedDict[tuple[int, bytes], None] = OrderedDict()  # (c, leaf) of messages that answered all
        self.newest_c = 0
        self.unknown_c: int | None = None  # a later configuration that a reply spoke of
        self.lies: Counter[str] = Counter()
        self.unsigned: Counter[str] = Counter()  # replies that prove nothing, by the connection they came on

    def learn(self, record: ConfigRecord) -> None:
        """Replies under this configuration count as well; the two newest are known."""
        self._records[record.c] = record
        self.newest_c = max(self._records)
        for c in sorted(self._records)[:-2]:
            del self._records[c]

    def expect(self, number: int) -> None:
        """A request was made."""
        self._open[number] = {}

    def give_up(self, number: int) -> None:
        """Nobody waits for it any more."""
        self._open.pop(number, None)
        for name in [n for n, (results, _) in self._held.items() if any(r.number == number for r in results)]:
            del self._held[name]

    def take(self, came_from: str, replies: Replies) -> dict[int, bytes]:
        """Count one message; returns the requests that are answered by it, with their results."""
        record = self._records.get(replies.c)
        if record is None:
            if replies.c > self.newest_c:
                self.unknown_c = replies.c  # unproved: only a reason to look
            return {}
        leaf = reply_leaf(self._client, replies.results)
        if (record.c, leaf) in self._told or all(self._said_already(record, result) for result in replies.results):
            return {}  # tells nothing new, so it need not prove itself
        if not self._proved(record, replies, leaf):
            self.unsigned[came_from] += 1
            return {}
        same = self._hold((record.c, leaf), replies)
        if same is None:
            return self._count_each(record, replies.replica, replies.results)
        if len(same) <= record.f:
            return {}
        del self._held[record.c, leaf]
        self._told[record.c, leaf] = None
        if len(self._told) > MAX_HELD:
            self._told.popitem(last=False)
        return {result.number: self._settle(record, result) for result in replies.results}

    def _hold(self, name: tuple[int, bytes], replies: Replies) -> set[str] | None:
        """Members mostly say the same of the same requests: then one look at the leaf counts for all of them. Who says
        it, this member included; None if some of these numbers are told in other company, or answered: then each
        counts by itself.
        """
        held = self._held.get(name)
        if held is not None:
            held[1].add(replies.replica)
            return held[1]
        alone = all(self._open.get(result.number) == {} for result in replies.results)
        numbers = {result.number for result in replies.results}
        others = [n for n, (results, _) in self._held.items() if any(r.number in numbers for r in results)]
        if alone and not others and len(self._held) < MAX_HELD:
            self._held[name] = replies.results, {replies.replica}
            return self._held[name][1]
        for other in others:
            results, members = self._held.pop(other)
            record = self._records.get(other[0])
            for member in sorted(members):
                if record is not None:
                    self._count_each(record, member, results)
        return None

    def _count_each(self, record: ConfigRecord, replica: str, results: tuple[Result, ...]) -> dict[int, bytes]:
        answers = {}
        for result in results:
            answer = self._count(record, replica, result.number, result.result)
            if answer is not None:
                answers[result.number] = answer
        return answers

    def _settle(self, record: ConfigRecord, result: Result) -> bytes:
        """It is answered; what others say of it later is compared."""
        self._open.pop(result.number, None)
        self._answered[result.number] = record.c, _brief(result.result)
        if len(self._answered) > MAX_ANSWERED:
            self._answered.popitem(last=False)
        return result.result

    def _said_already(self, record: ConfigRecord, result: Result) -> bool:
        return self._answered.get(result.number) == (record.c, _brief(result.result))

    def _proved(self, record: ConfigRecord, replies: Replies, leaf: bytes) -> bool:
        member = record.member(replies.replica)
        if member is None or len(replies.path) > MAX_PATH or not 0 <= replies.slot < 1 << 64:
            return False
        root = reply_root(leaf, replies.path)
        body = LAYOUT[Kind.REPLY].pack(replies.slot, root)
        message = statement_bytes(Kind.REPLY, record.group, replies.replica, record.c, body)
        return self._verifier.verify(member.kss_key, message, replies.signature)

    def _count(self, record: ConfigRecord, replica: str, number: int, result: bytes) -> bytes | None:
        answered = self._answered.get(number)
        if answered is not None:
            if answered[0] == record.c and answered[1] != _brief(result):
                self.lies[replica] += 1
            return None
        votes = self._open.get(number)
        if votes is None:
            return None
        given = votes.setdefault(record.c, {})
        if replica in given:
            return None
        given[replica] = result
        equal = [r for r, other in given.items() if other == result]
        if len(equal) <= record.f:
            return None
        for liar in given.keys() - set(equal):
            self.lies[liar] += 1
        return self._settle(record, Result(number, result))


def _brief(result: bytes) -> bytes:
    """What is remembered of a result: itself, or its digest and one byte more, if that is shorter."""
    return result if len(result) <= DIGEST_BYTES else b"#" + sha256(result)
