"""Typed statements that the KSS signs for a guest (protocol §2): the guest gives a kind and a fixed-size body, the
wormhole itself prefixes tag, group, replica and configuration: a guest signs neither another's words nor another type.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from cloudfit_orchestrator.model.signing import field, tagged


class Kind(IntEnum):
    """The types, with the layout of each body (big endian)."""

    REPLY = 1  # slot u64 ‖ Merkle root of the slot's replies 32
    READ = 2  # client key 32 ‖ number of the read u64 ‖ slot executed last u64 ‖ digest of what was seen 32
    CHECKPOINT = 3  # slot u64 ‖ digest 32
    REQ = 4  # target view u64
    DECIDED = 5  # slot u64 ‖ digest of the batch 32
    CONFIRM = 6  # H(PREPARED) 32 ‖ h u64 ‖ state digest 32
    PBFT = 7  # digest of a message of the PBFT engine 32


LAYOUT: dict[Kind, struct.Struct] = {
    Kind.REPLY: struct.Struct(">Q32s"),
    Kind.READ: struct.Struct(">32sQQ32s"),
    Kind.CHECKPOINT: struct.Struct(">Q32s"),
    Kind.REQ: struct.Struct(">Q"),
    Kind.DECIDED: struct.Struct(">Q32s"),
    Kind.CONFIRM: struct.Struct(">32sQ32s"),
    Kind.PBFT: struct.Struct(">32s"),
}
BEFORE_ACTIVE = frozenset({Kind.CONFIRM})  # what may be signed under c' before ACTIVE(c'); CHANNEL is a certificate


def statement_bytes(kind: Kind, group: str, replica: str, c: int, body: bytes) -> bytes:
    """What the KSS key of (replica, c) signs. Raises ValueError if `body` is not of the kind's layout."""
    if len(body) != LAYOUT[kind].size:
        raise ValueError(f"a {kind.name} body has {LAYOUT[kind].size} bytes, not {len(body)}")
    head = field(group.encode()) + field(replica.encode()) + struct.pack(">Q", c)
    return tagged("kss-" + kind.name.lower(), head + body)


@dataclass(frozen=True, slots=True)
class Statement:
    """A signed statement of `replica` under configuration `c`; `body` in `LAYOUT[kind]`."""

    kind: Kind
    replica: str
    c: int
    body: bytes
    signature: bytes
