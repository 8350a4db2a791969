"""DSSE envelopes (Dead Simple Signing Envelope 1.0): what is signed is the payload as received, never a re-encoding.

Used for image manifests, configuration records, launch certificates and orders to agents. Verification is small enough
for the agent. JSON: `{"payloadType": …, "payload": base64, "signatures": [{"keyid": hex, "sig": base64}]}`.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes, sha256

MAX_ENVELOPE_BYTES = 1 << 20  # the largest record holds tens of members and client certificates: tens of KB
MAX_SIGNATURES = 16  # checking thousands that fit into an envelope would stop whoever opens it for a second


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: the bytes that are signed."""
    t = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(t), t, len(payload), payload)


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified envelope: its payload bytes and the raw public key that signed them."""

    payload: bytes
    signer: bytes

    def json(self) -> Any:
        """The payload as JSON. Raises BadError if it is none."""
        try:
            return json.loads(self.payload)
        except (ValueError, RecursionError) as error:
            raise BadError(f"signed payload is not JSON: {error}") from error


def key_id(public: bytes) -> str:
    """A key's name: the first 16 bytes of the SHA-256 of the raw key, in hex."""
    return sha256(public)[:16].hex()


def seal(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The envelope bytes (canonical JSON, one line) around `payload`, signed by `key`."""
    signature = key.sign(pae(payload_type, payload))
    doc = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key_id(public_bytes(key)), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()


def open_envelope(envelope: bytes, payload_type: str, trusted: list[bytes]) -> Opened:
    """Verify `envelope` against the raw public keys in `trusted`.

    Raises BadError naming the first thing that is wrong: size, JSON, type, key, signature.
    """
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise BadError(f"envelope of {len(envelope)} bytes, the limit is {MAX_ENVELOPE_BYTES}")
    try:
        doc = json.loads(envelope)
        got_type = doc["payloadType"]
        payload = base64.b64decode(doc["payload"], validate=True)
        signatures = [(s["keyid"], base64.b64decode(s["sig"], validate=True)) for s in doc["signatures"]]
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise BadError(f"envelope is malformed: {type(error).__name__}: {error}") from error
    if got_type != payload_type:
        raise BadError(f"envelope holds {got_type!r:.100}, expected {payload_type!r}")
    if len(signatures) > MAX_SIGNATURES or not all(isinstance(name, str) for name, _ in signatures):
        raise BadError(f"envelope has {len(signatures)} signatures, or a key id that is no text")
    known = {key_id(public): public for public in trusted}
    verifier = Ed25519Verifier()
    for name, signature in signatures:
        public = known.get(name)
        if public is not None and verifier.verify(public, pae(payload_type, payload), signature):
            return Opened(payload, public)
    if not any(name in known for name, _ in signatures):
        raise BadError(f"envelope is signed by {[n[:32] for n, _ in signatures]}, none of which is trusted")
    raise BadError("signature of the envelope does not match its payload")
