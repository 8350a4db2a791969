"""Signatures for simulations: Ed25519, or keyed hashes that cost a hundredth and that only their `KeyRing` can check.

Keyed hashes are no signatures: whoever could read the ring could forge. Nothing in a simulation reads it but the ring.
"""

import hashlib
import random
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.signing import KEY_BYTES, SIGNATURE_BYTES, Ed25519Verifier, Verifier, public_bytes


class Signer(Protocol):
    """A private key. Its holder alone can sign."""

    @property
    def public(self) -> bytes:
        """The raw public key, 32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes over already tagged bytes."""
        ...


class Keys(Verifier, Protocol):
    """Makes keys and checks what they signed."""

    def generate(self, rng: random.Random) -> Signer:
        """A new key, chosen by `rng` alone."""
        ...


class HashKey:
    """A key of a `KeyRing`."""

    __slots__ = ("_secret", "public")

    def __init__(self, secret: bytes) -> None:
        """`secret`: 32 bytes."""
        self._secret = secret
        self.public = hashlib.blake2b(secret, digest_size=KEY_BYTES, person=b"public").digest()

    def sign(self, message: bytes) -> bytes:
        """See `Signer`."""
        return hashlib.blake2b(message, digest_size=SIGNATURE_BYTES, key=self._secret).digest()


class KeyRing:
    """Keyed hashes: the ring knows every key that it made, and so can check them all."""

    def __init__(self) -> None:
        """Empty."""
        self._keys: dict[bytes, HashKey] = {}

    def generate(self, rng: random.Random) -> HashKey:
        """See `Keys`."""
        key = HashKey(rng.randbytes(KEY_BYTES))
        self._keys[key.public] = key
        return key

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """See `Verifier`."""
        key = self._keys.get(public)
        return key is not None and key.sign(message) == signature


class Ed25519Key:
    """A real key."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Around `key`."""
        self._key = key
        self.public = public_bytes(key)

    def sign(self, message: bytes) -> bytes:
        """See `Signer`."""
        return self._key.sign(message)


class RealKeys(Ed25519Verifier):
    """Ed25519, as outside a simulation."""

    def generate(self, rng: random.Random) -> Ed25519Key:
        """See `Keys`."""
        return Ed25519Key(Ed25519PrivateKey.from_private_bytes(rng.randbytes(KEY_BYTES)))
