"""A client's identity: one Ed25519 key, which signs its bundles and stands in its self-signed TLS certificate."""

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model.record import Client
from cloudfit_orchestrator.model.signing import public_bytes

_VALID_DAYS = 3650  # admission and removal are the configuration's business, not the calendar's
_CLOCK_SKEW = dt.timedelta(days=1)


def self_signed(name: str, key: Ed25519PrivateKey) -> Client:
    """The entry for configuration records that admits `key` under `name` (at most 64 characters)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    return Client(name, public_bytes(key), certificate.public_bytes(serialization.Encoding.DER))
