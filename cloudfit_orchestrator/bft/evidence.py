"""Signed facts of one configuration that stand outside the streams: CHECKPOINTs, REQs, attestations, batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudfit_orchestrator.bft.batch import BundleChecker, Checked
from cloudfit_orchestrator.bft.messages import Req, Signed, Stable, StatementMessage, StreamMessage
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

MAX_CHECKPOINT_SLOTS = 16  # slots with CHECKPOINTs under collection; a window has 4
MAX_VIEW = 1 << 62


@dataclass(frozen=True, slots=True)
class Certificate:
    """f+1 members signed CHECKPOINT(c, slot, digest): at least one correct member had that state."""

    slot: int
    digest: bytes
    signatures: tuple[Signed, ...]


class Statements:
    """CHECKPOINTs and REQs of the members, verified; bounded."""

    def __init__(self, record: ConfigRecord, verifier: Verifier) -> None:
        self._record = record
        self._verifier = verifier
        self._needed = record.f + 1
        self._checkpoints: dict[int, dict[str, tuple[bytes, bytes]]] = {}  # slot -> replica -> (digest, signature)
        self.certificates: dict[int, Certificate] = {}
        self.newest: Certificate | None = None
        self.requests: dict[str, tuple[int, bytes]] = {}  # replica -> (highest target, signature)
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
        if len(self._good) > 4096:  # a cache, and nothing more
            self._good.clear()
        self._good.add(name)
        return True

    def add(self, message: StatementMessage, above: int) -> bool:
        """Take a statement in; `above`: slots up to it need no certificate any more. False if it does not verify."""
        if message.kind == Kind.CHECKPOINT and len(message.body) == LAYOUT[Kind.CHECKPOINT].size:
            slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(message.body)
            if slot <= above:
                return True
            if slot % self._record.parameters.checkpoint_period:
                return False  # no correct member signs one there
            if not self.verify(Kind.CHECKPOINT, message.replica, message.body, message.signature):
                return False
            self.checkpoint(message.replica, slot, digest, message.signature)
            return True
        if message.kind == Kind.REQ and len(message.body) == LAYOUT[Kind.REQ].size:
            (target,) = LAYOUT[Kind.REQ].unpack(message.body)
            if target <= self.requests.get(message.replica, (0, b""))[0]:
                return True
            if target >= MAX_VIEW:
                return False
            if not self.verify(Kind.REQ, message.replica, message.body, message.signature):
                return False
            self.requests[message.replica] = (target, message.signature)
            return True
        return False

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
        """f+1 distinct members signed CHECKPOINT(c, slot, digest)."""
        # Exactly f+1, all good: who takes the certificate over must not take anything else with it.
        if len(signatures) != self._needed or len({s.replica for s in signatures}) != len(signatures):
            return False
        if len(digest) != DIGEST_BYTES:
            return False
        body = LAYOUT[Kind.CHECKPOINT].pack(slot, digest)
        return all(self.verify(Kind.CHECKPOINT, s.replica, body, s.signature) for s in signatures)

    def valid_requests(self, g: int, certificate: Sequence[Req]) -> bool:
        """f+1 distinct members signed REQ with targets >= g."""
        # Exactly f+1, all good: what a certificate carries may then be passed on as it is.
        if len(certificate) != self._needed or len({r.replica for r in certificate}) != len(certificate):
            return False
        return all(
            g <= req.target < MAX_VIEW
            and self.verify(Kind.REQ, req.replica, LAYOUT[Kind.REQ].pack(req.target), req.signature)
            for req in certificate
        )

    def take_requests(self, certificate: Sequence[Req]) -> None:
        """Certificates travel: who sees a valid one may join."""
        for req in certificate:
            if req.target > self.requests.get(req.replica, (0, b""))[0]:
                self.requests[req.replica] = (req.target, req.signature)

    def view_wanted(self) -> tuple[int, tuple[Req, ...]]:
        """The highest view that f+1 members ask for (or a higher one), with their REQs; (0, ()) if there is none."""
        ranked = sorted(((t, r, sig) for r, (t, sig) in self.requests.items()), reverse=True)
        if len(ranked) < self._needed:
            return 0, ()
        certificate = tuple(Req(r, t, sig) for t, r, sig in ranked[: self._needed])
        return ranked[self._needed - 1][0], certificate


class Attestations:
    """Which STABLEs f+1 members attest (protocol §4): the owner by sending, others by the vectors of their STABLEs."""

    def __init__(self, record: ConfigRecord) -> None:
        self._f = record.f
        self._members = {member.replica for member in record.members}
        self._said: dict[str, dict[str, tuple[int, StreamMessage]]] = {}  # owner -> attester -> (counter, its STABLE)

    def add(self, message: StreamMessage, stable: Stable) -> None:
        """A STABLE whose UI holds, of whatever stream, ended or not: it is a signed statement."""
        for named in stable.vector:
            if named.replica != message.replica and named.replica in self._members:
                of_owner = self._said.setdefault(named.replica, {})
                if named.cv > of_owner.get(message.replica, (0, None))[0]:
                    of_owner[message.replica] = (named.cv, message)

    def attested(self, owner: str) -> int:
        """The highest counter such that f others attest `owner`'s STABLEs up to it."""
        if self._f == 0:
            return (1 << 63) - 1
        said = sorted((cv for cv, _ in self._said.get(owner, {}).values()), reverse=True)
        return said[self._f - 1] if len(said) >= self._f else 0

    def proof(self, owner: str, cv: int) -> tuple[StreamMessage, ...]:
        """F STABLEs of others that attest `owner`'s STABLE at `cv`; empty if there are not so many."""
        found = [message for named, message in self._said.get(owner, {}).values() if named >= cv]
        return tuple(found[: self._f]) if len(found) >= self._f else ()


@dataclass(slots=True)
class _Held:
    data: bytes
    checked: Checked | None
    slot: int  # the highest slot that a proposal names it for; -1 if none yet


class Batches:
    """Batches by digest, valid or not, with their verdict."""

    def __init__(self, checker: BundleChecker, max_loose: int) -> None:
        """`max_loose`: batches held that no standing proposal names yet; a log that is read again has 2L at most."""
        self._checker = checker
        self._max_loose = max_loose
        self._held: dict[bytes, _Held] = {}

    def add(self, digest: bytes, data: bytes) -> bool:
        """Hold a batch whose digest the caller computed. False if it is held already."""
        if digest in self._held:
            return False
        loose = [d for d, held in self._held.items() if held.slot < 0]
        if len(loose) >= self._max_loose:
            del self._held[loose[0]]
        self._held[digest] = _Held(data, self._checker.valid(data), -1)
        return True

    def name(self, digest: bytes, slot: int) -> None:
        """A proposal names the batch for `slot`."""
        held = self._held.get(digest)
        if held is not None:
            held.slot = max(held.slot, slot)

    def data(self, digest: bytes) -> bytes | None:
        """The batch, or None."""
        held = self._held.get(digest)
        return held.data if held else None

    def checked(self, digest: bytes) -> Checked | None:
        """The decoded batch if it is held and valid."""
        held = self._held.get(digest)
        return held.checked if held else None

    def valid(self, digest: bytes) -> bool | None:
        """The verdict on a batch, or None if it is not held."""
        held = self._held.get(digest)
        return None if held is None else held.checked is not None

    def drop(self, below: int) -> None:
        """Forget batches that only slots up to `below` name."""
        for digest in [d for d, held in self._held.items() if 0 <= held.slot <= below]:
            del self._held[digest]

    def all(self) -> list[bytes]:
        """All batches held, also those whose proposal waits: it may be voted for before the log is cut again."""
        return [held.data for held in self._held.values()]
