"""Orders that a controller signs for the replicas of a group."""

import json
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.envelope import open_envelope, seal
from cloudfit_orchestrator.model.errors import BadError

RETIRE_TYPE = "application/vnd.cloudfit.retire+json"


@dataclass(frozen=True, slots=True)
class Retire:
    """RETIRE(c, r) (protocol §6): r is about to be replaced; the next view shall neither be led nor fed by it."""

    group: str
    c: int
    replica: str


def seal_retire(order: Retire, key: Ed25519PrivateKey) -> bytes:
    """The signed order."""
    doc = {"group": order.group, "c": order.c, "replica": order.replica}
    return seal(RETIRE_TYPE, json.dumps(doc, sort_keys=True, separators=(",", ":")).encode(), key)


def open_retire(envelope: bytes, trusted: list[bytes]) -> Retire:
    """Verify and decode. Raises BadError."""
    doc = open_envelope(envelope, RETIRE_TYPE, trusted).json()
    try:
        order = Retire(doc["group"], doc["c"], doc["replica"])
    except (KeyError, TypeError) as error:
        raise BadError(f"RETIRE order is malformed: {error}") from error
    if type(order.c) is not int or not isinstance(order.replica, str):
        raise BadError("RETIRE order is malformed: wrong types")
    return order
