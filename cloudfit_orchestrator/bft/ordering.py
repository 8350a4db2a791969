"""The seam between a replica and what orders its batches: one `Ordering` a configuration, whatever the algorithm.

What every replica does whatever orders is shared, in this package: records, clients, execution, the signatures of
checkpoints, state transfer, succession, the log.
An engine (`bft.usig`, `bft.pbft`, or one of somebody else, see `engines.py`)
decides which batch stands in which slot, and what its members' wedges leave to the next configuration.

What an engine promises (each is a test of `tests/conformance`, for every engine):
- *agreement*: no two correct members' `decision` of a slot differ; *no creation*: a decided digest is NOOP or of a
  batch that is valid; *total order*: slots are decided without a gap in the end;
- *liveness*: what correct members have in their pools is decided in the end, once the network delivers;
- *wedge*: a correct member that is wedged says nothing more that could decide a slot; a member has one last vote;
- *final*: whatever wedges are named, `final` holds every slot that any correct member could have seen decided;
- *restart*: a member that starts again from its log says nothing that contradicts what it said before.

Calls come in one at a time, and never from inside a call to the `Host` or the `Outbox`. What must outlive the process
is journalled before what depends on it is signed (`effects.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.batches import Batches
from cloudfit_orchestrator.bft.checkpoints import Checkpoints
from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.messages import Beacon, Frozen, Named
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pool import Pool
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.model.ui import EpochEnd


class AgreementError(Exception):
    """Two values for one slot: more members are faulty than f, or the protocol is broken. Stop at once."""


class ProtocolError(Exception):
    """The core is about to break its own protocol: a bug. It stops before saying so."""


@dataclass(frozen=True, slots=True)
class Final:
    """S: what a configuration leaves to its successor (protocol §6). `choices`: (slot, batch digest or NOOP), all slots
    of h+1..s_max in order; slots up to `h` are covered by a checkpoint that is certified.
    """

    h: int
    s_max: int
    choices: tuple[tuple[int, bytes], ...]


class Host(Protocol):
    """What an engine may ask of the replica that it orders for."""

    me: str
    controllers: list[bytes]  # keys that sign records and orders
    verifier: Verifier
    execution: Execution  # the executed state: `slot`, `digests` of own checkpoints, `history`
    installed: bool  # the state that the configuration began with, or a later one, is here
    saved: set[tuple[int, int]]  # (c, slot) of durable snapshots
    beacons: dict[str, Beacon]  # the newest of each peer
    pool: Pool  # clients' bundles that wait; `release` it when another may propose
    progress_s: float  # when something was executed or a view entered last

    @property
    def others(self) -> list[str]:
        """Peers that take part or learn."""
        ...

    def is_me(self, record: ConfigRecord) -> bool:
        """Whether this very incarnation is a member of `record`."""
        ...

    def announce(self, kind: Kind, body: bytes) -> None:
        """Have the KSS sign a statement under the present configuration, send it to all, and repeat it until another
        of its kind is announced.
        """
        ...


TakeBatch = Callable[[int], bytes | None]


class Ordering(ABC):
    """Orders batches into the slots of one configuration; for a machine that is no member, listens and tells.

    A method that is not abstract has a meaning that is right for an engine without such a thing.
    """

    MESSAGES: ClassVar[tuple[type[Frozen], ...]] = ()  # peer messages of its own, see `messages.peer_decoder`
    ENTRIES: ClassVar[tuple[type[Frozen], ...]] = ()  # log entries of its own, see `journal.entry_decoder`

    record: ConfigRecord
    batches: Batches
    statements: Checkpoints  # CHECKPOINTs of the members, and statements of the engine's own kinds
    wanted: set[bytes]  # digests of batches to fetch
    ended: bool = False  # the wormhole has closed the own epoch: we say nothing more in it

    @abstractmethod
    def __init__(self, host: Host, out: Outbox, record: ConfigRecord, envelope_hash: bytes) -> None:
        """`record` is ACTIVE, `envelope_hash` is its H. While `out.replaying` the own log is read again."""

    # ------------------------------------------------------------------------------------------------- what it is now
    @property
    @abstractmethod
    def live(self) -> bool:
        """We are a member, know all that we have said, and may speak."""

    @property
    @abstractmethod
    def stable(self) -> int:
        """The slot of the newest certified checkpoint that the own state has reached: what lies before it may go."""

    @property
    @abstractmethod
    def view(self) -> int:
        """The view that we are in, for reports."""

    @property
    def position(self) -> int:
        """How far the own messages go, for beacons: shows others that they have lost a tail."""
        return 0

    @property
    def needs_session(self) -> bool:
        """A session with the wormhole's counter is to be opened; `session` answers."""
        return False

    # ------------------------------------------------------------------------------------------------- what comes in
    @abstractmethod
    def receive(self, peer: str, message: Frozen) -> None:
        """A message of one of `MESSAGES` that is no question. `peer` sent it, and need not be who said it."""

    def answer(self, peer: str, message: Frozen) -> bool:
        """Answer a question of `peer`, also after the configuration is over. False if it is none."""
        del peer, message
        return False

    def offer_batch(self, data: bytes) -> bytes | None:
        """Hold a batch if it is of use. Its digest if it is new."""
        digest = batch_digest(data)
        return digest if digest in self.wanted and self.batches.add(digest, data) else None

    def session(self, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """The session is open; (cv, digest, certificate) of the last <= 64 UIs, and the counter's next value."""

    def certified(self, cv: int, certificate: bytes) -> None:
        """A UI that a `Certify` effect asked for."""

    def refused(self, code: ErrorCode) -> None:
        """The wormhole refused a UI, a session or the epoch's end."""

    def close(self, end: EpochEnd) -> None:
        """The wormhole closed the own epoch."""
        del end
        self.ended = True

    def take_end(self, end: EpochEnd) -> None:
        """The wormhole of another member closed its epoch."""

    @abstractmethod
    def restore(self, entry: Frozen) -> None:
        """One of `ENTRIES`, read from the own log, in the order in which they were written."""

    def restored(self) -> None:
        """The log has been read."""

    # ------------------------------------------------------------------------------------------------------ deciding
    @abstractmethod
    def advance(self) -> None:
        """Process what has come in, as far as it can be. Nothing is said."""

    @abstractmethod
    def decision(self, s: int) -> bytes | None:
        """The digest that is decided for slot `s`, or None. `batches` may not hold the batch yet: see `want_batch`."""

    @abstractmethod
    def decided(self, s: int, digest: bytes) -> None:
        """The own log says that slot `s` was decided so."""

    @abstractmethod
    def settle(self, s: int) -> None:
        """Slots up to `s` are executed, or a state that covers them was taken over."""

    @abstractmethod
    def want_batch(self, digest: bytes) -> None:
        """Take this batch from whoever sends it."""

    @abstractmethod
    def speak(self, take_batch: TakeBatch) -> None:
        """Say all that follows from what is known. `take_batch(s)` makes a batch for slot `s` of what waits in the
        pool, holds and journals it, and returns its digest; None if nothing waits.
        """

    def tick(self) -> None:
        """Time has passed: ask again for what was refused for a time."""

    def fetch(self) -> None:
        """Ask peers for messages that are known to exist and are not here; called at most every 0.1 s."""

    def repeat(self) -> None:
        """Say again what must not be lost; called every quarter of a second."""

    # ------------------------------------------------------------------------------------------------------ liveness
    @property
    @abstractmethod
    def waiting(self) -> bool:
        """Something is under way that the members should finish: a proposal, a change of view."""

    @property
    @abstractmethod
    def may_suspect(self) -> bool:
        """We may ask for another view."""

    @abstractmethod
    def suspect(self) -> None:
        """Nothing has moved for too long: ask for another view."""

    @property
    @abstractmethod
    def proposes(self) -> bool:
        """We are among those who propose in the view that we are in."""

    @abstractmethod
    def forward_to(self, *, behind: bool) -> str | None:
        """The member to hand clients' bundles on to: who may propose, if that is not us or we are too far `behind`."""

    def retire(self, envelope: bytes) -> None:
        """A controller's RETIRE: do without that member's proposals as far as can be. Raises BadError."""
        del envelope

    # ------------------------------------------------------------------------------------------------------ succession
    @abstractmethod
    def wedge(self, prepared: bytes) -> None:
        """The envelope of a PREPARED record on this base: say the last word of this configuration, once, and nothing
        after it. A later one changes nothing: one wedge serves every record on this base.
        """

    @property
    @abstractmethod
    def wedged(self) -> bool:
        """The own last word is said and signed: the epoch may be closed."""

    @abstractmethod
    def wedges(self) -> list[Named]:
        """The members' last words that are here and good, at most one a member."""

    def wedge_sets(self) -> list[tuple[Named, ...]]:
        """Sets of Qv of `wedges` that may give an S now, few of them, as they are tried again with all that comes in;
        among them one that does, as soon as the correct members' wedges and all that they refer to are here.
        """
        needed = self.record.quorums.view_change
        wedges = self.wedges()
        return [tuple(wedges[:needed])] if len(wedges) >= needed else []

    @abstractmethod
    def final(self, names: Sequence[Named]) -> Final | None:
        """S of these wedges: the same for whoever computes it. None if they are not Qv good ones of distinct members,
        or something is missing, which is then fetched.
        """

    # ------------------------------------------------------------------------------------------------------------ log
    @abstractmethod
    def decisions(self) -> list[tuple[int, bytes]]:
        """Decided slots that are not settled, in order, for the log."""

    @abstractmethod
    def entries(self) -> list[Frozen]:
        """Entries that rebuild this engine's state, but for decisions and batches; own ones first said, first kept."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """About how many entries that would be."""

    @abstractmethod
    def truncate(self, floor: int) -> None:
        """Forget what no log, view or slot above `floor` needs."""

    @property
    def figures(self) -> dict[str, Any]:
        """More figures for reports."""
        return {}
