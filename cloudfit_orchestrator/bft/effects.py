"""What the core asks of the world. Effects are ordered; the runtime carries them out in that order.

The durability rule (protocol §2, "the journal goes first"): every `Append` before a `Certify`, `EndEpoch` or `Sign`
that `waits` is on stable storage before that request leaves for the wormhole. Many effects may share one fsync.
"""

from typing import Any

from msgspec import field

from cloudfit_orchestrator.bft.messages import Value
from cloudfit_orchestrator.bft.store import Snapshot
from cloudfit_orchestrator.model.statement import Kind


class Append(Value, frozen=True):
    """Append `record` to the write-ahead log."""

    record: bytes


class Rewrite(Value, frozen=True):
    """Replace the whole write-ahead log by `records`, atomically and durably (truncation after a stable checkpoint)."""

    records: tuple[bytes, ...]


class Certify(Value, frozen=True):
    """CREATE_UI for counter `cv` of epoch `c`. Answer by `Replica.certified` or `Replica.refused`."""

    c: int
    cv: int
    digest: bytes


class Sign(Value, frozen=True):
    """SIGN a statement under `c`. Answer by `Replica.signed(token, signature)`; a refusal is dropped."""

    c: int
    kind: Kind
    body: bytes
    token: int
    waits: bool = True


class EndEpoch(Value, frozen=True):
    """END_EPOCH of `c` after a wedge. Answer by `Replica.epoch_ended`."""

    c: int


class Send(Value, frozen=True):
    """Send `body` to `peer` ("replica#incarnation"). May be lost. Nobody waits for what is not sent `soon`: it may go
    with what follows it, in order, or with the next tick.
    """

    peer: str
    body: bytes
    soon: bool = True


class Answer(Value, frozen=True):
    """Send `body` to the connections of the client with raw key `client`. May be lost."""

    client: bytes
    body: bytes


class SaveSnapshot(Value, frozen=True):
    """Persist `snapshot`, the state after `slot` of configuration `c`: its new chunks, then its index, durably.

    Answer by `Replica.saved(c, slot)`. The runtime keeps it until a `DropSnapshots` names it.
    """

    c: int
    slot: int
    snapshot: Snapshot


class DropSnapshots(Value, frozen=True):
    """Forget all persisted snapshots but those of the (c, slot) in `keep`."""

    keep: tuple[tuple[int, int], ...]


class Report(Value, frozen=True):
    """Tell the controller, through the wormhole's REPORT."""

    topic: str
    body: dict[str, Any] = field(default_factory=dict)


Effect = Append | Rewrite | Certify | Sign | EndEpoch | Send | Answer | SaveSnapshot | DropSnapshots | Report
