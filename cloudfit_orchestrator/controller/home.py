"""The operator's data directory: where everything lives, and the keys that are made on first use.

Private keys are 32 raw bytes in base64 in 0600 files under a 0700 directory; public ones lie beside them as `.pub`.
The directory itself can be passed through (0711), because a hypervisor's own user must reach images and disks.
"""

import base64
import binascii
import contextlib
import datetime as dt
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError
from cloudfit_orchestrator.model.record import Client
from cloudfit_orchestrator.model.signing import private_bytes, public_bytes

SYSTEM_HOME = Path("/var/lib/cloudfit")
MAX_SOCKET_PATH = 107  # sun_path of Linux, without its final zero
DEFAULT_CLIENT = "operator"
_CLIENT_YEARS = 10  # a client's admission ends with its place in the record, not with a date


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """A client's private key and its self-signed certificate."""

    name: str
    key: Ed25519PrivateKey
    certificate: bytes  # DER

    @property
    def public(self) -> Client:
        """What stands in the configuration record."""
        return Client(self.name, public_bytes(self.key), self.certificate)


def default_home() -> Path:
    """`$CLOUDFIT_HOME`; else /var/lib/cloudfit for root and ~/.local/share/cloudfit for others."""
    named = os.environ.get("CLOUDFIT_HOME")
    if named:
        return Path(named)
    return SYSTEM_HOME if os.geteuid() == 0 else Path.home() / ".local/share/cloudfit"


class Home:
    """One data directory."""

    def __init__(self, root: Path) -> None:
        """Make the directory if there is none. Raises PermanentError if it cannot be made."""
        self.root = root.absolute()
        longest = self.agent_dir("x" * 30) / "agent.sock"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise BadInputError(
                f"home {self.root} is too long for unix sockets inside it ({MAX_SOCKET_PATH} bytes at most)",
                next_command="name a shorter one by --home or $CLOUDFIT_HOME",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o711)
            (self.root / "keys").mkdir(exist_ok=True, mode=0o700)
            for name in ("images", "agents", "machines", "evidence"):
                (self.root / name).mkdir(exist_ok=True, mode=0o755)
        except OSError as error:
            raise PermanentError(
                f"cannot make the data directory {self.root}: {error.strerror}",
                next_command="name another by --home or $CLOUDFIT_HOME",
            ) from error

    @property
    def images(self) -> Path:
        """The image store."""
        return self.root / "images"

    @property
    def machines(self) -> Path:
        """Disks, channel sockets and console logs of local machines."""
        return self.root / "machines"

    @property
    def journal(self) -> Path:
        """The controller's journal."""
        return self.root / "journal.sqlite"

    @property
    def config(self) -> Path:
        """Embedded CONFIG STORAGE."""
        return self.root / "config.sqlite"

    def agent_dir(self, cloud: str) -> Path:
        """Socket, log and identity of the agent of a local cloud."""
        return self.root / "agents" / cloud

    def controller_key(self) -> Ed25519PrivateKey:
        """Signs configuration records and orders."""
        return self._key("controller")

    def image_key(self) -> Ed25519PrivateKey:
        """Signs images built here."""
        return self._key("image")

    def guest_secret(self) -> bytes:
        """What everything on config drives is derived from (model/drive.py): as good as all guests of `trust: none`."""
        return private_bytes(self._key("guests"))

    def public_file(self, name: str) -> Path:
        """The file with the public key `controller` or `image`, base64; made if need be."""
        self._key(name)
        return self.root / "keys" / f"{name}.pub"

    def client(self, name: str = DEFAULT_CLIENT) -> ClientIdentity:
        """The identity of a client of this home, made on first use."""
        key = self._key(f"client-{name}")
        path = self.root / "keys" / f"client-{name}.crt"
        with self.lock("keys", wait=True):
            if not path.exists():
                _write_private(path, _self_signed(name, key))
        return ClientIdentity(name, key, path.read_bytes())

    def client_numbers(self, group: str, name: str = DEFAULT_CLIENT) -> Path:
        """Where the request numbers that this client has used in `group` are kept; see gateway/numbers."""
        return self.root / "keys" / f"client-{name}.{group}.number"

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Only one process at a time works on `name`; the lock ends with the process. RefusedError if it is held."""
        path = self.root / f".{name}.lock"
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RefusedError(
                    f"another cloudfit command works on {name} in {self.root}",
                    next_command="wait for it to end, then run this command again",
                ) from error
            yield

    def _key(self, name: str) -> Ed25519PrivateKey:
        path = self.root / "keys" / f"{name}.key"
        with self.lock("keys", wait=True):
            if not path.exists():
                fresh = Ed25519PrivateKey.generate()
                _write_private(path.with_suffix(".pub"), base64.b64encode(public_bytes(fresh)) + b"\n")
                _write_private(path, base64.b64encode(private_bytes(fresh)) + b"\n")
        try:
            return Ed25519PrivateKey.from_private_bytes(base64.b64decode(path.read_bytes().strip(), validate=True))
        except (OSError, ValueError, binascii.Error) as error:
            raise PermanentError(
                f"key file {path} cannot be used: {error}", next_command=f"restore {path} from your backup"
            ) from error


def _write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, 0600, durable."""
    temporary = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:  # noqa: PTH123  fd
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _self_signed(name: str, key: Ed25519PrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=365 * _CLIENT_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)
