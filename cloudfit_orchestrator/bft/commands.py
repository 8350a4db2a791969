"""What a controller's commands carry, as JSON (docs/contracts.md). Raises KeyError, TypeError or ValueError."""

import base64
from typing import Any

from cloudfit_orchestrator.bft.situation import Peer
from cloudfit_orchestrator.model.ui import EpochEnd


def parse_bytes(text: str) -> bytes:
    """Bytes in base64."""
    return base64.b64decode(text, validate=True)


def parse_peer(doc: dict[str, Any]) -> Peer:
    """Whom to dial and accept."""
    return Peer(str(doc["peer_id"]), str(doc["address"]), parse_bytes(doc["channel_ca"]))


def parse_end(doc: dict[str, Any]) -> EpochEnd:
    """EPOCH-END as a controller hands it on."""
    fields = (parse_bytes(doc[k]) for k in ("last_digest", "last_certificate", "signature"))
    return EpochEnd(str(doc["replica"]), int(doc["c"]), int(doc["cv_end"]), *fields)
