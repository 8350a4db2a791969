"""The KSS (protocol §2): typed statements under an epoch's key, and the channel CA and lease of one incarnation."""

import datetime as dt
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.signing import public_bytes, sha256
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes
from cloudfit_orchestrator.wormhole.refusal import Malformed, Refusal

MAX_SPKI_BYTES = 1024  # the keys that are accepted have 44 (Ed25519) or 91 (P-256)
# A certificate holds as long as a record names its incarnation, not until a time: guests need no right clock.
_NOT_BEFORE = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)  # RFC 5280 §4.1.2.5: no expiry


class Kss:
    """The statement key of one epoch."""

    def __init__(self, group: str, replica: str, c: int, key: Ed25519PrivateKey | None = None) -> None:
        """Make the key, unless it is given."""
        self._group = group
        self._replica = replica
        self._c = c
        self._key: Ed25519PrivateKey | None = key or Ed25519PrivateKey.generate()
        self.public_key = public_bytes(self._key)

    def sign(self, kind: Kind, body: bytes) -> bytes:
        """The signature of a statement; tag, group, replica and configuration are put before `body` here."""
        if self._key is None:
            raise Refusal(ErrorCode.ENDED, f"epoch {self._c} has ended")
        if len(body) != LAYOUT[kind].size:
            raise Malformed("statement-body")
        return self._key.sign(statement_bytes(kind, self._group, self._replica, self._c, body))

    def destroy(self) -> None:
        """Drop the key."""
        self._key = None


@dataclass(frozen=True, slots=True)
class Lease:
    """How long an incarnation may speak, on a clock that counts suspend (CLOCK_BOOTTIME), from its measured launch."""

    started_s: float
    length_s: float

    def left_s(self, now_s: float) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.started_s + self.length_s - now_s)

    def check(self, now_s: float) -> None:
        """Raises Refusal when it is over."""
        if self.left_s(now_s) <= 0:
            raise Refusal(ErrorCode.LEASE_OVER, f"the lease of {self.length_s:g} s is over")


class ChannelCA:
    """Issues the TLS certificates of one incarnation; its key signs nothing else."""

    def __init__(self, name: str, key: Ed25519PrivateKey | None = None) -> None:
        """`name`: `group/replica#incarnation`, at most 61 characters (a common name has 64). Makes the key unless it is
        given: the same key has the same certificate.
        """
        self._name = name
        self._key = key or Ed25519PrivateKey.generate()
        subject = _common_name(f"{name} CA")
        serial = int.from_bytes(sha256(public_bytes(self._key))[:16])  # as unique as the key
        builder = _builder(subject, subject, self._key.public_key(), self._key.public_key(), serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(ca=True), critical=True)
        self._subject = subject
        self.certificate = builder.sign(self._key, None).public_bytes(serialization.Encoding.DER)

    def issue(self, spki: bytes) -> bytes:
        """The DER certificate for the key in `spki` (DER). Raises Malformed for what is no Ed25519 or P-256 key."""
        key = _load_spki(spki)
        serial = x509.random_serial_number()
        builder = _builder(_common_name(self._name), self._subject, key, self._key.public_key(), serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.sign(self._key, None).public_bytes(serialization.Encoding.DER)


def _load_spki(spki: bytes) -> Ed25519PublicKey | EllipticCurvePublicKey:
    if len(spki) > MAX_SPKI_BYTES:
        raise Malformed("public-key")
    try:
        key = serialization.load_der_public_key(spki)
    except Exception as error:  # the library raises many kinds for hostile DER, UnsupportedAlgorithm and more
        raise Malformed("public-key") from error
    if isinstance(key, Ed25519PublicKey) or (
        isinstance(key, EllipticCurvePublicKey) and key.curve.name == SECP256R1.name
    ):
        return key
    raise Malformed("public-key")


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey | EllipticCurvePublicKey,
    issuer_key: Ed25519PublicKey,
    serial: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
