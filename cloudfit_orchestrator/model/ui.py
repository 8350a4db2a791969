"""Unique identifiers (MinBFT, TC'13 §4) as our USIG makes them: one counter an epoch, certified by the wormhole."""

import struct
from dataclasses import dataclass

from cloudfit_orchestrator.model.signing import DIGEST_BYTES, SIGNATURE_BYTES, field, sha256, tagged

_NO_PAYLOAD = sha256()
RECENT_UIS = 64  # the wormhole remembers so many; at most so many bodies wait for their UI


@dataclass(frozen=True, slots=True)
class UI:
    """`certificate` by the USIG key of (replica, c) over `ui_bytes`; `cv` starts at 1 in each epoch."""

    c: int
    replica: str
    cv: int
    certificate: bytes


def message_digest(header: bytes, payload: bytes) -> bytes:
    """H(header ‖ H(payload)): large payloads can be left out and fetched by hash (protocol §2)."""
    return sha256(header, sha256(payload) if payload else _NO_PAYLOAD)


def ui_bytes(group: str, replica: str, c: int, cv: int, digest: bytes) -> bytes:
    """What a UI certificate signs, `digest` being 32 bytes of `message_digest`."""
    if len(digest) != DIGEST_BYTES:
        raise ValueError("digest must be 32 bytes")
    return tagged("ui", field(group.encode()) + field(replica.encode()) + struct.pack(">QQ", c, cv) + digest)


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """EPOCH-END(r, c, cv_end, last digest, last certificate): closes an epoch for good; made by the wormhole alone."""

    replica: str
    c: int
    cv_end: int
    last_digest: bytes  # 32 zero bytes if cv_end is 0
    last_certificate: bytes  # 64 zero bytes if cv_end is 0
    signature: bytes


def epoch_end_bytes(group: str, end: EpochEnd) -> bytes:
    """What the USIG key signs, under a tag that no KSS statement has, to close the epoch."""
    if len(end.last_digest) != DIGEST_BYTES or len(end.last_certificate) != SIGNATURE_BYTES:
        raise ValueError("EPOCH-END needs a 32 byte digest and a 64 byte certificate")
    return tagged(
        "epoch-end",
        field(group.encode())
        + field(end.replica.encode())
        + struct.pack(">QQ", end.c, end.cv_end)
        + end.last_digest
        + end.last_certificate,
    )
