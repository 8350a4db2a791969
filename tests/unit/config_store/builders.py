"""Records with real signatures for tests of the chain."""

from collections.abc import Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.record import (
    NO_DIGEST,
    Algorithm,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    confirm_body,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.statement import Kind, statement_bytes


class Author:
    """Stands for a controller and the wormholes of one group of three."""

    def __init__(self, group: str = "ledger") -> None:
        self.group = group
        self.key = Ed25519PrivateKey.generate()
        self.trusted = [public_bytes(self.key)]
        self._kss: dict[tuple[str, int], Ed25519PrivateKey] = {}

    def prepared(self, c: int, base: int | None, previous: bytes = NO_DIGEST) -> bytes:
        members = []
        for i in range(3):
            kss = self._kss.setdefault((f"r{i}", c), Ed25519PrivateKey.generate())
            usig = public_bytes(Ed25519PrivateKey.generate())
            members.append(
                Member(
                    f"r{i}", i + 1, f"cloud{i}", f"10.84.{i}.10:7000", usig, public_bytes(kss), b"ca", "sha256:0", ""
                )
            )
        record = ConfigRecord(
            group=self.group, c=c, base=base, members=tuple(members), clients=(), service="kv", f=1, k=0,
            algorithm=Algorithm.EBAWA, parameters=Parameters(), previous=previous,
        )  # fmt: skip
        return seal_record(record, self.key)

    def active(
        self, envelope: bytes, record: ConfigRecord, *, previous: bytes | None = None,
        replicas: Sequence[str] = ("r0", "r1"), h: int = 7, **other: object,
    ) -> bytes:  # fmt: skip
        prepared = record_hash(envelope)
        digest = bytes([record.c]) * 32
        confirmations = []
        for replica in replicas:
            body = confirm_body(prepared, h, digest)
            message = statement_bytes(Kind.CONFIRM, self.group, replica, record.c, body)
            confirmations.append(Confirmation(replica, self._kss[replica, record.c].sign(message)))
        active = record.activated(
            prepared=prepared, previous=previous or prepared, h=h, digest=digest, confirmations=confirmations
        )
        return seal_record(replace(active, **other), self.key)  # type: ignore[arg-type]
