"""Ed25519 over domain-separated bytes: every signed string begins with `cloudfit/<tag>/v1` and a zero byte."""

import hashlib
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32


def sha256(*parts: bytes) -> bytes:
    """SHA-256 of the concatenation, 32 bytes. Callers make the concatenation unambiguous."""
    return hashlib.sha256(b"".join(parts)).digest()


def tagged(tag: str, body: bytes) -> bytes:
    """The bytes that are really signed for `body` under the domain `tag`."""
    return b"cloudfit/" + tag.encode("ascii") + b"/v1\0" + body


def field(value: bytes) -> bytes:
    """A length-prefixed field (u16, big endian), so that no two field lists share an encoding."""
    return len(value).to_bytes(2, "big") + value


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The raw public key, 32 bytes."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def private_bytes(key: Ed25519PrivateKey) -> bytes:
    """The raw private key (seed), 32 bytes."""
    return key.private_bytes(serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())


class Verifier(Protocol):
    """Checks a signature over already tagged bytes. A parameter, so that a simulator can run on cheap signatures."""

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """True if `signature` (64 bytes) by the raw key `public` (32 bytes) covers `message`; never raises."""
        ...


class Ed25519Verifier:
    """The real one. Parsed keys are kept (bounded): parsing costs a third of a verification."""

    MAX_KEYS = 1024  # members x epochs in use at once are tens; clients are thousands at most

    def __init__(self) -> None:
        self._keys: dict[bytes, Ed25519PublicKey] = {}

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """See `Verifier`."""
        try:
            key = self._keys.get(public)
            if key is None:
                key = Ed25519PublicKey.from_public_bytes(public)
                if len(self._keys) >= self.MAX_KEYS:
                    self._keys.clear()
                self._keys[public] = key
            key.verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def verify(public: bytes, tag: str, body: bytes, signature: bytes) -> bool:
    """One-off check of `signature` over `tagged(tag, body)`."""
    return Ed25519Verifier().verify(public, tagged(tag, body), signature)
