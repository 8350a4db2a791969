"""Configuration records (protocol §6): what CONFIG STORAGE orders, the controller signs and every user verifies.

A configuration c has a PREPARED record and at most one ACTIVE record with the same members. Records are DSSE envelopes
around canonical JSON; the chain hashes envelopes, so what is signed is what is chained.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.envelope import open_envelope, seal
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.model.quorum import Quorums, quorums, quorums_without_wormhole
from cloudfit_orchestrator.model.signing import Verifier, sha256
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

RECORD_TYPE = "application/vnd.cloudfit.config-record+json"
NO_DIGEST = bytes(32)
MAX_MEMBERS = 64  # far above any group that makes sense; bounds every per-member table
MAX_CLIENTS = 1024


class Status(StrEnum):
    """PREPARED: members may wedge `base` and confirm. ACTIVE: the one successor of `base`."""

    PREPARED = "PREPARED"
    ACTIVE = "ACTIVE"


class Algorithm(StrEnum):
    """The ordering engines of this package; a record may name another one that is installed (`bft.engines`)."""

    EBAWA = "ebawa"
    MINBFT = "minbft"
    PBFT = "pbft"


WITH_WORMHOLE = frozenset({Algorithm.EBAWA, Algorithm.MINBFT})  # a wormhole numbers their messages: 2f+1 are enough
_ALGORITHM_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


def quorums_of(algorithm: str, n: int, f: int, k: int) -> Quorums:
    """The row of protocol §1 for that algorithm. Raises BadInputError if n is too small for f and k."""
    return quorums(n, f, k) if algorithm in WITH_WORMHOLE else quorums_without_wormhole(n, f, k)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What members must agree on besides membership."""

    checkpoint_period: int = 128  # K, slots: what was changed is hashed and saved once for so many
    window: int = 256  # L >= K, slots; 2K leaves time for a checkpoint, and memory grows with L
    max_batch_requests: int = 1024
    max_batch_bytes: int = 256 << 10  # a window of the largest is 64 MiB, which a small machine's disk and memory hold
    client_window: int = 4096  # W: request numbers per client whose replies are kept
    progress_timeout_ms: int = 2000  # before a view change is asked for; liveness only, doubles while nothing moves


@dataclass(frozen=True, slots=True)
class Member:
    """One replica of a configuration. Keys are raw Ed25519 public keys; `incarnation` never repeats in a group."""

    replica: str
    incarnation: int
    cloud: str
    address: str  # host:port that peers and clients connect to
    usig_key: bytes
    kss_key: bytes
    channel_ca: bytes  # DER certificate; issues this incarnation's TLS certificates (kept in the wormhole)
    image: str  # sha256:… of the image manifest that was measured
    launch: str  # sha256:… of the launch certificate


@dataclass(frozen=True, slots=True)
class Client:
    """An admitted client: its Ed25519 key is inside its self-signed TLS certificate (DER)."""

    name: str
    key: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A member's KSS-signed CONFIRM over (H(PREPARED), h, digest)."""

    replica: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class ConfigRecord:
    """One record. `base` is None for the first configuration; `h`, `digest` and `confirmations` are set when ACTIVE."""

    group: str
    c: int
    base: int | None
    members: tuple[Member, ...]
    clients: tuple[Client, ...]
    service: str
    f: int
    k: int
    algorithm: str  # an `Algorithm`, or the name of an engine from elsewhere
    parameters: Parameters
    previous: bytes  # hash of the envelope before this one in the chain; NO_DIGEST for the first
    status: Status = Status.PREPARED
    prepared: bytes = NO_DIGEST  # ACTIVE: hash of the PREPARED envelope of the same c
    h: int = 0
    digest: bytes = NO_DIGEST
    confirmations: tuple[Confirmation, ...] = field(default=())
    born: int = 0  # c of the group's first configuration: a group made anew under an old name is another group

    @property
    def life(self) -> str:
        """What clients sign their requests for: a request to a destroyed group is none to its successor in name."""
        return f"{self.group}@{self.born}"

    @property
    def n(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def quorums(self) -> Quorums:
        """Qc and Qv of this configuration. Of an engine from elsewhere nothing is known but that it works without a
        wormhole's counter: those quorums are safe for any.
        """
        return quorums_of(self.algorithm, self.n, self.f, self.k)

    @property
    def confirmations_needed(self) -> int:
        """f'+k'+1 (protocol §6)."""
        return self.f + self.k + 1

    def member(self, replica: str) -> Member | None:
        """The member with that id, or None."""
        return next((m for m in self.members if m.replica == replica), None)

    def client(self, key: bytes) -> Client | None:
        """The client with that raw key, or None."""
        return next((x for x in self.clients if x.key == key), None)

    def activated(
        self, *, prepared: bytes, previous: bytes, h: int, digest: bytes, confirmations: Sequence[Confirmation]
    ) -> "ConfigRecord":
        """The ACTIVE record that pins `h` and `digest` for this PREPARED one."""
        return replace(
            self,
            status=Status.ACTIVE,
            prepared=prepared,
            previous=previous,
            h=h,
            digest=digest,
            confirmations=tuple(confirmations),
        )


def confirm_body(prepared: bytes, h: int, digest: bytes) -> bytes:
    """The body of a CONFIRM statement."""
    return LAYOUT[Kind.CONFIRM].pack(prepared, h, digest)


def check_confirmations(record: ConfigRecord, verifier: Verifier) -> None:
    """Raises BadError unless f'+k'+1 members confirmed the pinned state. Every user of an ACTIVE record calls it."""
    if record.status is not Status.ACTIVE:
        raise BadError(f"record c={record.c} of {record.group} is {record.status}, not ACTIVE")
    body = confirm_body(record.prepared, record.h, record.digest)
    good = set()
    for confirmation in record.confirmations:
        member = record.member(confirmation.replica)
        if member is None:
            continue
        message = statement_bytes(Kind.CONFIRM, record.group, member.replica, record.c, body)
        if verifier.verify(member.kss_key, message, confirmation.signature):
            good.add(member.replica)
    if len(good) < record.confirmations_needed:
        raise BadError(
            f"ACTIVE record c={record.c} of {record.group} has {len(good)} valid confirmations, "
            f"{record.confirmations_needed} are needed"
        )


def record_hash(envelope: bytes) -> bytes:
    """The hash by which records are chained and confirmed: SHA-256 of the envelope bytes."""
    return sha256(envelope)


def seal_record(record: ConfigRecord, key: Ed25519PrivateKey) -> bytes:
    """The envelope of `record`, signed by a controller."""
    return seal(RECORD_TYPE, _encode(record), key)


def open_record(envelope: bytes, trusted: list[bytes]) -> ConfigRecord:
    """Verify and decode. Raises BadError on a bad signature or content. Confirmations are checked apart."""
    doc = open_envelope(envelope, RECORD_TYPE, trusted).json()
    try:
        record = _decode(doc)
        _check(record)
    except (KeyError, TypeError, ValueError, AttributeError, BadInputError) as error:
        raise BadError(f"configuration record is malformed: {type(error).__name__}: {error}") from error
    return record


def _check(record: ConfigRecord) -> None:
    names = [m.replica for m in record.members]
    if not 1 <= len(names) <= MAX_MEMBERS or len(record.clients) > MAX_CLIENTS:
        raise BadError(f"record c={record.c}: {len(names)} members, {len(record.clients)} clients: out of bounds")
    if len(set(names)) != len(names) or len({m.incarnation for m in record.members}) != len(names):
        raise BadError(f"record c={record.c}: a replica or incarnation appears twice: {names}")
    if len({m.usig_key for m in record.members} | {m.kss_key for m in record.members}) != 2 * len(names):
        raise BadError(f"record c={record.c}: two members share a key")
    p = record.parameters
    if not 1 <= p.checkpoint_period <= p.window or min(p.max_batch_requests, p.max_batch_bytes, p.client_window) < 1:
        raise BadError(f"record c={record.c}: parameters out of bounds: {p}")
    if record.c < 1 or (record.base is not None and not 1 <= record.base < record.c):
        raise BadError(f"record c={record.c}: base {record.base} is not an earlier configuration")
    record.quorums  # noqa: B018  raises if n is too small


_BYTES = frozenset(
    {"usig_key", "kss_key", "channel_ca", "key", "certificate", "signature", "previous", "prepared", "digest"}
)


def _encode(record: ConfigRecord) -> bytes:
    def plain(name: str, value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        if isinstance(value, dict):
            return {k: plain(k, v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(name, v) for v in value]
        return value

    return json.dumps(plain("", asdict(record)), sort_keys=True, separators=(",", ":")).encode()


def _decode(doc: Any) -> ConfigRecord:
    def rich(item: dict[str, Any]) -> dict[str, Any]:
        return {k: base64.b64decode(v, validate=True) if k in _BYTES else v for k, v in item.items()}

    top = rich(doc)
    for name in ("c", "f", "k", "h", "born"):
        if type(top[name]) is not int:
            raise TypeError(f"{name} is not an integer")
    top["members"] = tuple(Member(**rich(m)) for m in top["members"])
    top["clients"] = tuple(Client(**rich(x)) for x in top["clients"])
    top["confirmations"] = tuple(Confirmation(**rich(x)) for x in top["confirmations"])
    top["parameters"] = Parameters(**top["parameters"])
    if not _ALGORITHM_NAME.fullmatch(top["algorithm"]):
        raise ValueError(f"algorithm is {top['algorithm']!r}")
    top["status"] = Status(top["status"])
    return ConfigRecord(**top)
