"""Signatures of images as Glance, Nova and Cinder check them: RSA-PSS, SHA-256, the certificate in a key manager."""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from cloudfit_orchestrator.model.errors import PermanentError

KEY_BITS = (2048, 8192)
MAX_KEY_BYTES = 64 << 10
METHOD, KEY_TYPE = "SHA-256", "RSA-PSS"  # as the image's properties name them


def properties(certificate: str) -> dict[str, str]:
    """The properties of an image that is signed for that certificate, but for the signature itself."""
    return {
        "img_signature_hash_method": METHOD,
        "img_signature_key_type": KEY_TYPE,
        "img_signature_certificate_uuid": certificate,
    }


def load_key(path: Path) -> rsa.RSAPrivateKey:
    """The operator's key: RSA in PEM, not encrypted, nobody else's to read. Raises PermanentError."""
    fix = f"ln -s FILE {path}; FILE: an RSA key in PEM, mode 0600"
    try:
        if path.stat().st_mode & 0o077:
            raise PermanentError(f"signing key {path.name} can be read by others", next_command=f"chmod 600 {path}")
        with path.open("rb") as file:
            key = serialization.load_pem_private_key(file.read(MAX_KEY_BYTES), None)
    except OSError as error:
        raise PermanentError(f"signing key {path.name}: {error.strerror}", next_command=fix) from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PermanentError(f"signing key {path.name} is no key in PEM without a password", next_command=fix) from None
    if not isinstance(key, rsa.RSAPrivateKey) or not KEY_BITS[0] <= key.key_size <= KEY_BITS[1]:
        raise PermanentError(f"signing key {path.name} is no RSA key of {KEY_BITS[0]} bits or more", next_command=fix)
    return key


def sign(image: Path, key: rsa.RSAPrivateKey) -> str:
    """The signature of a file, as the property `img_signature` holds it."""
    with image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    # The longest salt, because that is the only one that OpenStack's verifier (cursive) accepts.
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
    return base64.b64encode(key.sign(digest, scheme, utils.Prehashed(hashes.SHA256()))).decode()
