"""What the controller derives for machines with `trust: none`: config drives, and the way in (model/drive.py).

All of it comes from one key of the home. So nothing of it stands in the journal, and a controller that died makes the
same again.
"""

import socket
import ssl

from cloudfit_orchestrator.controller.agents import Dialer, Stream
from cloudfit_orchestrator.controller.journal import MachineRow
from cloudfit_orchestrator.model.drive import control_certificate, derived_key, guest_seed
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole.tls import Credentials

CONTROL_OFFSET = 1  # the agent inside a guest listens on the port after the replica's
DIAL_TIMEOUT_S = 5.0  # the kernel of a machine that is there answers at once; one that is gone must hold up nobody
HANDSHAKE_TIMEOUT_S = 20.0  # an emulated guest on a busy host needs seconds


class GuestSecrets:
    """The secrets of all guests of one home."""

    def __init__(self, home_secret: bytes, deployment: str) -> None:
        self._secret = home_secret
        self._deployment = deployment
        self._key = derived_key(home_secret, "controller")
        self.certificate = control_certificate(self._key, "controller")
        self._credentials = Credentials(self._key, self.certificate)

    def __repr__(self) -> str:
        return f"GuestSecrets({self._deployment!r})"

    def seed(self, row: MachineRow) -> bytes:
        """The seed of that machine and of no other one there ever is."""
        return guest_seed(
            self._secret, self._deployment, row.group, row.replica, str(row.incarnation), row.role, row.operation
        )

    def agent_key(self, row: MachineRow) -> bytes:
        """Raw public key with which the machine's agent signs its launch certificate."""
        return public_bytes(derived_key(self.seed(row), "identity"))

    def dialer(self, row: MachineRow) -> Dialer:
        """Connections to that machine's agent, and to nobody who only says so."""
        certificate = control_certificate(derived_key(self.seed(row), "control"), f"{row.group}/{row.peer_id}")
        return TlsDialer(row.host, row.port + CONTROL_OFFSET, self._credentials, certificate)


class TlsDialer(Dialer):
    """An agent behind TLS, known by its certificate."""

    help = "cloudfit group list, then group show: it may be booting, or gone"

    def __init__(self, host: str, port: int, credentials: Credentials, certificate: bytes) -> None:
        """`certificate`: the only one (DER) that is accepted there."""
        self._where = (host, port)
        self._context = credentials.client_context(certificate)
        self._certificate = certificate

    def dial(self) -> Stream:
        """See `Dialer`. Raises BadError if somebody else answers."""
        plain = socket.create_connection(self._where, DIAL_TIMEOUT_S)
        try:
            plain.settimeout(HANDSHAKE_TIMEOUT_S)
            stream = self._context.wrap_socket(plain)
        except ssl.SSLCertVerificationError as error:
            plain.close()
            raise BadError(f"{self}: who answers is not the guest that was booted from our drive") from error
        except BaseException:
            plain.close()
            raise
        if stream.getpeercert(binary_form=True) != self._certificate:
            stream.close()
            raise BadError(f"{self}: who answers is not the guest that was booted from our drive")
        return stream

    def __str__(self) -> str:
        return "{}:{}".format(*self._where)
