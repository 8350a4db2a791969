"""Signed documents: anything as an envelope, and anything inside a good one. A document that holds, or BadError."""

import base64
import json
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.envelope import open_envelope, seal
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.image import LAUNCH_TYPE, MANIFEST_TYPE, open_launch, open_manifest
from cloudfit_orchestrator.model.orders import RETIRE_TYPE, Retire, open_retire, seal_retire
from cloudfit_orchestrator.model.record import RECORD_TYPE, check_confirmations, open_record
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes
from tests.unit.bft.house import House

KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x09")
TRUSTED = [public_bytes(KEY)]
OPENERS: tuple[tuple[str, Callable[[bytes, list[bytes]], object]], ...] = (
    (RECORD_TYPE, open_record),
    (RETIRE_TYPE, open_retire),
    (LAUNCH_TYPE, open_launch),
    (MANIFEST_TYPE, open_manifest),
)


def run(data: bytes) -> None:
    """The first byte chooses the document, and whether what follows is the envelope or its signed payload."""
    first, rest = (data or b"\0")[0], data[1:]
    kind, opener = OPENERS[first % len(OPENERS)]
    envelope = rest if first & 128 else seal(kind, rest, KEY)
    try:
        found = opener(envelope, TRUSTED)
        if opener is open_record:
            check_confirmations(found, Ed25519Verifier())  # type: ignore[arg-type]
    except BadError as error:
        assert len(str(error)) < 4000
    else:
        assert open_envelope(envelope, kind, TRUSTED).signer == TRUSTED[0]


def seeds() -> list[bytes]:
    """A record, an order, an envelope."""
    house = House()
    record = base64.b64decode(json.loads(house.envelope)["payload"])
    order = seal_retire(Retire("ledger", 1, "r0"), KEY)
    launch = b'{"agent":"","channel_ca":"","domain":"","group":"g","image":"","incarnation":1,"isolated":false,'
    launch += b'"machine":"","measured_at":"","replica":"r0","role":"replica"}'
    manifest = b'{"predicateType":"https://cloudfit.dev/image/v1","predicate":{"name":"","role":"replica",'
    manifest += b'"adversary":false,"command_line":"","verity_root":"","parts":[],"packages":[],"lineage":""}}'
    return [b"\0" + record, b"\x81" + order, b"\2" + launch, b"\3" + manifest]
