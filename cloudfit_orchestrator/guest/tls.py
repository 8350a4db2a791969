"""Who is at the other end of a TLS connection.

Rules: (1) TLS 1.3 with certificates on both sides, or no connection. (2) OpenSSL checks the chain against all
authorities known at that moment; that only keeps strangers out. (3) Who it is, is decided here, after the handshake: a
client if the certificate's bytes stand in the list of clients; a peer if the authority *of the very incarnation that
its common name claims* signed it: each incarnation has an authority of its own, none speaks for another. (4) Nothing
is believed because of TLS: votes and replies carry signatures of their own.
"""

from collections.abc import Iterable
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model.record import Client


class Peer(Protocol):
    """Whom to dial and to accept: `replica#incarnation`, `host:port`, DER of its channel CA."""

    @property
    def peer_id(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def channel_ca(self) -> bytes: ...


class Directory:
    """Whom this program accepts now, and the judge of rule 3."""

    def __init__(self, group: str, peers: Iterable[Peer] = (), clients: Iterable[Client] = ()) -> None:
        """Malformed authorities are left out: nobody can prove to be that peer."""
        self.group = group
        self.peers: dict[str, Peer] = {}
        self.malformed: list[str] = []
        self._authorities: dict[str, x509.Certificate] = {}
        for peer in peers:
            try:
                self._authorities[peer.peer_id] = x509.load_der_x509_certificate(peer.channel_ca)
            except ValueError:
                self.malformed.append(peer.peer_id)
                continue
            self.peers[peer.peer_id] = peer
        self.clients = {client.certificate: client.key for client in clients}

    @property
    def trusted(self) -> list[bytes]:
        """Everything that a chain may end in, DER."""
        return [*(peer.channel_ca for peer in self.peers.values()), *self.clients]

    def client(self, certificate: bytes) -> bytes | None:
        """The raw key of the client with that certificate (DER), or None."""
        return self.clients.get(certificate)

    def peer(self, certificate: bytes) -> str | None:
        """The peer id that this certificate (DER) proves, or None."""
        try:
            leaf = x509.load_der_x509_certificate(certificate)
            names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            group, slash, peer_id = str(names[0].value).rpartition("/")
        except (ValueError, IndexError):
            return None
        authority = self._authorities.get(peer_id)
        if not slash or group != self.group or authority is None or not _issued(authority, leaf):
            return None
        return peer_id


def _issued(authority: x509.Certificate, leaf: x509.Certificate) -> bool:
    key = authority.public_key()
    if not isinstance(key, Ed25519PublicKey) or leaf.issuer != authority.subject:
        return False
    try:
        key.verify(leaf.signature, leaf.tbs_certificate_bytes)
    except InvalidSignature:
        return False
    return True
