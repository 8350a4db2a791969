"""What a guest is given where nobody has a hold on its host (`trust: none`), and what both sides derive from it.

The controller makes the content of a config drive from one secret of its home and the machine's identity: a controller
that died makes the same again, and nothing of it need be written down. The cloud reads it. So it holds nothing that is
worth more than this one incarnation, which the cloud has in its hands anyway.
"""

import base64
import datetime as dt
import json
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.signing import KEY_BYTES, public_bytes, sha256, tagged
from cloudfit_orchestrator.model.signing import field as encoded

MAGIC = b'{"cloudfit_drive": 1,'  # how the document begins: other users of config drives put other things there
MAX_DRIVE_BYTES = 48 << 10  # Nova takes 64 KiB of base64
LABEL = "config-2"  # of the file system, as OpenStack has it
USER_DATA = "openstack/latest/user_data"  # the file in it
SECRET_BYTES = 32
# What is not trusted by date holds as long as it stands where it is looked up.
_NOT_BEFORE = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)  # RFC 5280 §4.1.2.5: no expiry


@dataclass(frozen=True, slots=True)
class Drive:
    """The document. Raises BadInputError if it cannot be one."""

    group: str
    replica: str
    incarnation: int
    role: Role
    image: str  # digest of the manifest of what was to boot; nobody has measured it
    seed: bytes = field(repr=False)
    controller: bytes  # DER of the certificate of whoever may give orders
    controller_keys: tuple[bytes, ...]  # whose records are believed
    control_port: int
    lease_s: float
    welcome: dict[str, Any]

    def __post_init__(self) -> None:
        if len(self.seed) != SECRET_BYTES or any(len(k) != KEY_BYTES for k in self.controller_keys):
            raise BadInputError(f"the drive of {self.group}/{self.replica}#{self.incarnation} has malformed keys")

    def encode(self) -> bytes:
        """As it lies on the drive; the same for equal content."""
        doc = {
            "group": self.group,
            "replica": self.replica,
            "incarnation": self.incarnation,
            "role": self.role.value,
            "image": self.image,
            "seed": _text(self.seed),
            "controller": _text(self.controller),
            "controller_keys": [_text(key) for key in self.controller_keys],
            "control_port": self.control_port,
            "lease_s": self.lease_s,
            "welcome": self.welcome,
        }
        data = MAGIC + b" " + json.dumps(doc, sort_keys=True).encode()[1:]
        if len(data) > MAX_DRIVE_BYTES:
            raise BadInputError(f"a config drive of {len(data)} bytes, the limit is {MAX_DRIVE_BYTES}")
        return data

    @classmethod
    def decode(cls, data: bytes) -> "Drive":
        """The inverse of `encode`."""
        if not data.startswith(MAGIC) or len(data) > MAX_DRIVE_BYTES:
            raise BadInputError("the config drive's user data does not begin like ours")
        try:
            doc = json.loads(data)
            return cls(
                group=str(doc["group"]),
                replica=str(doc["replica"]),
                incarnation=int(doc["incarnation"]),
                role=Role(doc["role"]),
                image=str(doc["image"]),
                seed=_raw(doc["seed"]),
                controller=_raw(doc["controller"]),
                controller_keys=tuple(_raw(key) for key in doc["controller_keys"]),
                control_port=int(doc["control_port"]),
                lease_s=float(doc["lease_s"]),
                welcome=dict(doc["welcome"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadInputError(f"the config drive's user data is malformed: {error!r}") from error


def guest_seed(home_secret: bytes, *names: str) -> bytes:
    """The secret of the one machine that bears these names, and no other ones."""
    return _derive(home_secret, "guest-seed", *(encoded(name.encode()) for name in names))


def derived_key(secret: bytes, label: str) -> Ed25519PrivateKey:
    """The key of that label; from another label, or another secret, another key."""
    return Ed25519PrivateKey.from_private_bytes(_derive(secret, "derived-key", encoded(label.encode())))


def control_certificate(key: Ed25519PrivateKey, name: str) -> bytes:
    """The self-signed certificate (DER) of one end of a control connection: the same for the same key and name.

    Both ends know it beforehand and accept these bytes only.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(sha256(public_bytes(key))[:16]))
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def _derive(secret: bytes, tag: str, *parts: bytes) -> bytes:
    return HKDF(hashes.SHA256(), SECRET_BYTES, salt=None, info=tagged(tag, b"".join(parts))).derive(secret)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
