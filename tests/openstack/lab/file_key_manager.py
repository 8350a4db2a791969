"""A key manager for Castellan, in place of Barbican: one file a secret.

Nova keeps secrets of virtual TPMs in it; certificates of signed images are put into its directory as UUID.der.
"""

import os
import uuid
from pathlib import Path

from castellan.common import exception
from castellan.common.objects import passphrase, x_509
from castellan.key_manager import key_manager


class FileKeyManager(key_manager.KeyManager):
    """Keeps passphrases, which are all that Nova stores, and finds certificates; whoever asks gets them."""

    def __init__(self, configuration=None):
        """Castellan's interface; the directory comes from the environment."""
        super().__init__(configuration)
        self._directory = Path(os.environ["CLOUDFIT_LAB_KEYS"])
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, object_id):
        return self._directory / str(uuid.UUID(str(object_id)))

    def store(self, context, managed_object, expiration=None):
        """Keep a secret and name it."""
        name = str(uuid.uuid4())
        self._path(name).write_bytes(managed_object.get_encoded())
        return name

    def get(self, context, managed_object_id, metadata_only=False):  # noqa: FBT002  Castellan's
        """A secret or a certificate by its name."""
        certificate = self._path(managed_object_id).with_suffix(".der")
        if certificate.exists():
            return x_509.X509(certificate.read_bytes(), id=managed_object_id)
        try:
            return passphrase.Passphrase(self._path(managed_object_id).read_bytes(), id=managed_object_id)
        except FileNotFoundError as error:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id) from error

    def delete(self, context, managed_object_id):
        """Forget a secret."""
        try:
            self._path(managed_object_id).unlink()
        except FileNotFoundError as error:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id) from error

    def create_key(self, context, algorithm, length, expiration=None, name=None):
        """Not asked for by Nova."""
        raise exception.KeyManagerError(reason="this key manager only keeps what it is given")

    def create_key_pair(self, context, algorithm, length, expiration=None, name=None):
        """Not asked for by Nova."""
        raise exception.KeyManagerError(reason="this key manager only keeps what it is given")

    def list(self, context, object_type=None, metadata_only=False):  # noqa: FBT002  Castellan's
        """Nobody lists."""
        return []

    def list_options_for_discovery(self):
        """No options."""
        return []
