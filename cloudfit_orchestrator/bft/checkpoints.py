"""CHECKPOINTs of the members of one configuration, and the certificates that they make (protocol §4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudfit_orchestrator.bft.messages import Signed, StatementMessage
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

MAX_CHECKPOINT_SLOTS = 16  # slots with CHECKPOINTs under collection; a window has 4
MAX_VERIFIED = 4096  # signatures that need not be checked again


@dataclass(frozen=True, slots=True)
class Certificate:
    """As many members as the engine needs signed CHECKPOINT(c, slot, digest): a correct one had that state."""

    slot: int
    digest: bytes
    signatures: tuple[Signed, ...]


class Checkpoints:
    """Statements of the members, verified; bounded."""

    def __init__(self, record: ConfigRecord, verifier: Verifier, needed: int) -> None:
        """`needed`: matching CHECKPOINTs of distinct members that make a certificate."""
        self._record = record
        self._verifier = verifier
        self._needed = needed
        self._checkpoints: dict[int, dict[str, tuple[bytes, bytes]]] = {}  # slot -> replica -> (digest, signature)
        self.certificates: dict[int, Certificate] = {}
        self.newest: Certificate | None = None
        self._good: set[tuple[Kind, str, bytes, bytes]] = set()

    def verify(self, kind: Kind, replica: str, body: bytes, signature: bytes) -> bool:
        """Whether that member's KSS signed it under this configuration."""
        member = self._record.member(replica)
        if member is None or len(body) != LAYOUT[kind].size:
            return False
        name = (kind, replica, body, signature)
        if name in self._good:
            return True
        message = statement_bytes(kind, self._record.group, replica, self._record.c, body)
        if not self._verifier.verify(member.kss_key, message, signature):
            return False
        if len(self._good) > MAX_VERIFIED:  # a cache, and nothing more
            self._good.clear()
        self._good.add(name)
        return True

    def add(self, message: StatementMessage, above: int) -> bool:
        """Take a statement in; `above`: slots up to it need no certificate any more. False if it is not good."""
        if message.kind != Kind.CHECKPOINT or len(message.body) != LAYOUT[Kind.CHECKPOINT].size:
            return False
        slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(message.body)
        if slot <= above:
            return True
        if slot % self._record.parameters.checkpoint_period:
            return False  # no correct member signs one there
        if not self.verify(Kind.CHECKPOINT, message.replica, message.body, message.signature):
            return False
        self.checkpoint(message.replica, slot, digest, message.signature)
        return True

    def checkpoint(self, replica: str, slot: int, digest: bytes, signature: bytes) -> None:
        """Count a verified CHECKPOINT. A member's second word for a slot replaces its first: neither was proof."""
        if slot in self.certificates:
            return
        if slot not in self._checkpoints and len(self._checkpoints) >= MAX_CHECKPOINT_SLOTS:
            # Keep the lowest slots: a faulty member's STABLE 10^9 must not push out what correct members will reach.
            highest = max(self._checkpoints)
            if slot > highest:
                return
            del self._checkpoints[highest]
        votes = self._checkpoints.setdefault(slot, {})
        votes[replica] = (digest, signature)
        same = [Signed(r, sig) for r, (d, sig) in sorted(votes.items()) if d == digest]
        if len(same) >= self._needed:
            self.certify(Certificate(slot, digest, tuple(same[: self._needed])))

    def certify(self, certificate: Certificate) -> None:
        """A verified certificate."""
        self.certificates[certificate.slot] = certificate
        if self.newest is None or certificate.slot > self.newest.slot:
            self.newest = certificate
        for slot in [s for s in self._checkpoints if s <= certificate.slot]:
            del self._checkpoints[slot]
        for slot in sorted(self.certificates)[:-MAX_CHECKPOINT_SLOTS]:
            del self.certificates[slot]

    def valid_certificate(self, slot: int, digest: bytes, signatures: Sequence[Signed]) -> bool:
        """As many distinct members as are needed signed CHECKPOINT(c, slot, digest)."""
        # Exactly so many, all good: who takes the certificate over must not take anything else with it.
        if len(signatures) != self._needed or len({s.replica for s in signatures}) != len(signatures):
            return False
        if len(digest) != DIGEST_BYTES:
            return False
        body = LAYOUT[Kind.CHECKPOINT].pack(slot, digest)
        return all(self.verify(Kind.CHECKPOINT, s.replica, body, s.signature) for s in signatures)
