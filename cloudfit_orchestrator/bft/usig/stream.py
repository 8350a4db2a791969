"""One member's stream in one configuration, as a receiver holds it (protocol §3 R0, §4).

`cursor` is the last counter processed in FIFO order; everything up to it stands unless the stream ended. What precedes
the newest attested STABLE that may start a log is dropped; what is ahead of a gap waits in a bounded buffer.
"""

from dataclasses import dataclass
from enum import Enum

from cloudfit_orchestrator.bft.messages import Named, Value
from cloudfit_orchestrator.bft.usig.judge import StreamState
from cloudfit_orchestrator.bft.usig.messages import (
    Choice,
    Header,
    NewView,
    Prepare,
    Skip,
    Stable,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.model.errors import BadError

MAX_AHEAD = 2048  # counters beyond the cursor that may wait: several windows of an honest sender
MAX_WAITING_BYTES = 4 << 20  # of headers and payloads that wait (and decoded thrice that); a full NEW-VIEW: 20 KiB


class Citation(Value, frozen=True):
    """A COMMIT entry that is what it claims: its UI is the proposer's. It counts if the proposal stands."""

    proposer: str
    cv: int
    header: Prepare | Skip


class Kept(Value, frozen=True):
    """A processed message that stands, and the state after it."""

    message: StreamMessage
    header: Header
    digest: bytes
    state: StreamState
    entries: tuple[Citation, ...] = ()  # of a COMMIT


class Weighed(Value, frozen=True):
    """What who judges a NEW-VIEW must hold beside the logs: batches that these name above h*, valid or not, and the
    earlier views whose choices count there.
    """

    batches: frozenset[bytes] = frozenset()
    views: frozenset[int] = frozenset()


NOTHING_WEIGHED = Weighed()


@dataclass(frozen=True, slots=True)
class NewViewKept:
    """A NEW-VIEW that stands."""

    message: StreamMessage
    header: NewView
    choices: tuple[Choice, ...]
    logs: tuple[tuple[StreamMessage, ...], ...] = ()  # of the VIEW-CHANGEs that it was computed from, if they were read
    weighed: Weighed = NOTHING_WEIGHED


class Waiting(Value, frozen=True):
    """A message whose UI holds, before its turn, decoded once. `header`: None if it does not decode."""

    message: StreamMessage
    header: Header | None
    digest: bytes


def waiting(message: StreamMessage, digest: bytes | None = None) -> Waiting:
    """What is to be remembered of a message, without its batch, until its turn comes."""
    try:
        header: Header | None = decode_header(message.header)
    except BadError:
        header = None
    return Waiting(bare(message), header, message.digest if digest is None else digest)


class Offered(Enum):
    """What became of a message that was offered."""

    TAKEN = "taken"  # its UI holds, and it waits for its turn
    NOT_WANTED = "not wanted"  # known, or too far ahead: its UI was not looked at
    BAD = "bad"  # its UI is wrong: blame who sent it


class Stream:
    """See the module. Counters begin at 1."""

    def __init__(self, replica: str, start: StreamState, start_digest: bytes) -> None:
        """`start_digest`: H(record), which stands for counter 0 in vectors."""
        self.replica = replica
        self.cursor = 0
        self.state = start
        self.ended: int | None = None  # the counter of the message that ended it
        self.end_rule = ""
        self.breach: Waiting | None = None  # that message: who has not got it cannot tell that the stream ended
        self.held = ""  # why the message after the cursor waits, if it does
        self.kept: dict[int, Kept] = {}
        self.waiting: dict[int, Waiting] = {}
        self.last_stable = Named(replica, 0, start_digest)
        self.base_state = start  # the state before the first kept message
        self.base = 0  # the counter before the first kept message
        self.base_digest = start_digest
        self._waiting_bytes = 0

    def stands(self, cv: int) -> bool | None:
        """Whether message `cv` stands; None if that cannot be told yet."""
        if self.ended is not None and cv >= self.ended:
            return False
        return True if cv <= self.cursor else None

    def wants(self, cv: int) -> bool:
        """Whether a message with that counter is of use."""
        return self.ended is None and self.cursor < cv <= self.cursor + MAX_AHEAD and cv not in self.waiting

    def wait(self, item: Waiting) -> bool:
        """Buffer a message whose UI was verified. False if there is no room."""
        message = item.message
        size = len(message.header) + len(message.payload)
        if message.cv != self.cursor + 1 and self._waiting_bytes + size > MAX_WAITING_BYTES:
            return False
        self.waiting[message.cv] = item
        self._waiting_bytes += size
        return True

    def unwait(self, cv: int) -> None:
        """Take a message out of the buffer."""
        item = self.waiting.pop(cv, None)
        if item is not None:
            self._waiting_bytes -= len(item.message.header) + len(item.message.payload)

    def accept(self, kept: Kept) -> None:
        """The next message stands."""
        self.cursor = kept.message.cv
        self.state = kept.state
        self.kept[self.cursor] = kept
        self.held = ""
        if isinstance(kept.header, Stable):
            self.last_stable = Named(self.replica, self.cursor, kept.digest)

    def end(self, item: Waiting, rule: str) -> None:
        """Message `item` broke a rule: it and all after it count for nothing."""
        self.ended = item.message.cv
        self.end_rule = rule
        self.breach = item
        self.held = ""
        self.waiting.clear()
        self._waiting_bytes = 0

    def jump(self, kept: Kept) -> None:
        """Go on from an attested STABLE ahead of the cursor; all before it stands, but is not held."""
        self.kept.clear()
        for cv in [cv for cv in self.waiting if cv <= kept.message.cv]:
            self.unwait(cv)
        self.base = kept.message.cv - 1
        self.base_state = kept.state
        self.base_digest = b""
        self.accept(kept)

    def truncate(self, attested: int, window: int) -> None:
        """Drop what comes before the newest STABLE that is attested and L or more behind the last one (§4)."""
        for cv in range(min(attested, self.cursor), self.base, -1):
            kept = self.kept.get(cv)
            if kept is None:
                return
            if isinstance(kept.header, Stable) and kept.header.h <= self.state.h - window:
                for old in range(self.base + 1, cv):
                    del self.kept[old]
                self.base = cv - 1
                self.base_state = kept.state
                return

    def complete(self, window: int) -> bool:
        """Whether what is kept is a whole log O: it begins with the epoch, or with a STABLE L or more behind (§4)."""
        anchor = self.anchor()
        return anchor is None or anchor.state.h <= self.state.h - window

    def anchor(self) -> Kept | None:
        """The attested STABLE that the kept messages begin with; None if they begin with the epoch."""
        return self.kept.get(self.base + 1) if self.base else None


def bare(message: StreamMessage) -> StreamMessage:
    """The message without its batch, as it is kept."""
    if not message.batch:
        return message
    return StreamMessage(message.c, message.replica, message.cv, message.header, message.payload, message.certificate)
