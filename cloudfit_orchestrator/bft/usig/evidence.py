"""Signed facts of one configuration that stand outside the streams: REQs beside CHECKPOINTs, attestations."""

from collections.abc import Sequence

from cloudfit_orchestrator.bft.checkpoints import Checkpoints
from cloudfit_orchestrator.bft.messages import StatementMessage
from cloudfit_orchestrator.bft.usig.messages import Req, Stable, StreamMessage
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

MAX_VIEW = 1 << 62


class Statements(Checkpoints):
    """CHECKPOINTs and REQs: f+1 of either are a certificate."""

    def __init__(self, record: ConfigRecord, verifier: Verifier) -> None:
        super().__init__(record, verifier, record.f + 1)
        self.requests: dict[str, tuple[int, bytes]] = {}  # replica -> (highest target, signature)

    def add(self, message: StatementMessage, above: int) -> bool:
        """See `Checkpoints.add`."""
        if message.kind != Kind.REQ or len(message.body) != LAYOUT[Kind.REQ].size:
            return super().add(message, above)
        (target,) = LAYOUT[Kind.REQ].unpack(message.body)
        if target <= self.requests.get(message.replica, (0, b""))[0]:
            return True
        if target >= MAX_VIEW:
            return False
        if not self.verify(Kind.REQ, message.replica, message.body, message.signature):
            return False
        self.requests[message.replica] = (target, message.signature)
        return True

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
        self._attested: dict[str, int] = {}

    def add(self, message: StreamMessage, stable: Stable) -> None:
        """A STABLE whose UI holds, of whatever stream, ended or not: it is a signed statement."""
        for named in stable.vector:
            if named.replica != message.replica and named.replica in self._members:
                of_owner = self._said.setdefault(named.replica, {})
                if named.cv > of_owner.get(message.replica, (0, None))[0]:
                    of_owner[message.replica] = (named.cv, message)
                    said = sorted((cv for cv, _ in of_owner.values()), reverse=True)
                    self._attested[named.replica] = said[self._f - 1] if 0 < self._f <= len(said) else 0

    def attested(self, owner: str) -> int:
        """The highest counter such that f others attest `owner`'s STABLEs up to it."""
        if self._f == 0:
            return (1 << 63) - 1
        return self._attested.get(owner, 0)

    def proof(self, owner: str, cv: int) -> tuple[StreamMessage, ...]:
        """F STABLEs of others that attest `owner`'s STABLE at `cv`; empty if there are not so many."""
        found = [message for named, message in self._said.get(owner, {}).values() if named >= cv]
        return tuple(found[: self._f]) if len(found) >= self._f else ()
