"""TLS 1.3 with certificates on both sides, or no connection; who it is, the caller decides after the handshake."""

import os
import ssl
from collections.abc import Iterable

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.errors import BadError


class Credentials:
    """A TLS key, which never leaves this process, and the certificate made for it."""

    def __init__(self, key: Ed25519PrivateKey, certificate: bytes) -> None:
        """`certificate`: DER, over the public half of `key`."""
        self._key = key
        self._certificate = certificate

    @staticmethod
    def request(key: Ed25519PrivateKey) -> bytes:
        """What an authority is given: the DER SubjectPublicKeyInfo."""
        return key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def server_context(self, trusted: Iterable[bytes]) -> ssl.SSLContext:
        """Accepts what chains to one of `trusted` (DER). Raises BadError if a certificate is malformed."""
        return self._context(ssl.PROTOCOL_TLS_SERVER, trusted)

    def client_context(self, authority: bytes) -> ssl.SSLContext:
        """Dials who chains to `authority` (DER). Raises BadError."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, [authority])

    def _context(self, protocol: int, trusted: Iterable[bytes]) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # certificates name incarnations, not hosts
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # connections last; nobody resumes
        for certificate in trusted:
            try:
                context.load_verify_locations(cadata=certificate)
            except (ssl.SSLError, ValueError) as error:
                raise BadError(f"an authority's certificate is malformed: {error}") from error
        self._load_key(context)
        return context

    def _load_key(self, context: ssl.SSLContext) -> None:
        """Python's ssl reads keys from files only: an anonymous one in memory, gone before anybody else can look."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain = ssl.DER_cert_to_PEM_cert(self._certificate).encode()
        fd = os.memfd_create("tls", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(chain + pem)
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
