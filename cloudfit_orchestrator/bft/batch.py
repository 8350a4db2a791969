"""Batches: an encoded list of signed client bundles. `valid` is deterministic (protocol §3): every judge agrees."""

from dataclasses import dataclass

import msgspec

from cloudfit_orchestrator.bft.messages import (
    Bundle,
    BundleBody,
    bundle_bytes,
    decode_bundle_body,
    decode_client,
    encode,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord, Parameters
from cloudfit_orchestrator.model.signing import Verifier, sha256

BATCH_BYTES = 16  # of a batch's encoding, generously, beside its bundles
BUNDLE_BYTES = 8  # and beside each bundle

_list = msgspec.msgpack.Decoder(list[bytes])
_encode = msgspec.msgpack.Encoder().encode


def make_batch(bundles: list[bytes]) -> bytes:
    """A batch of encoded `Bundle`s."""
    return _encode(bundles)


def batch_digest(batch: bytes) -> bytes:
    """D: how PREPAREs name the batch."""
    return sha256(b"cloudfit/batch/v1\0", batch)


def bundle_name(data: bytes) -> bytes:
    """What this replica knows an encoded bundle by."""
    return sha256(data)


def split_batch(batch: bytes) -> list[bytes]:
    """The encoded bundles. Raises BadError."""
    try:
        return _list.decode(batch)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadError(f"batch is malformed: {error}") from error


def fits(data: bytes, body: BundleBody, limits: Parameters) -> bool:
    """Whether the bundle fits into a batch alone. One that fits into none would block all that wait behind it."""
    size = BATCH_BYTES + BUNDLE_BYTES + len(data)
    return len(body.requests) <= limits.max_batch_requests and size <= limits.max_batch_bytes


def bundle_body(data: bytes) -> tuple[Bundle, BundleBody]:
    """Decode one encoded bundle, signature unchecked. Raises BadError."""
    bundle = decode_client(data)
    if not isinstance(bundle, Bundle) or encode(bundle) != data:
        raise BadError("not a canonical bundle")
    return bundle, decode_bundle_body(bundle.body)


@dataclass(frozen=True, slots=True)
class Checked:
    """A valid batch, decoded: the bodies in order, and the names of the bundles."""

    digest: bytes
    bodies: tuple[BundleBody, ...]
    names: tuple[bytes, ...] = ()


class BundleChecker:
    """Verifies bundles against one configuration; remembers those seen, as each comes from a client and in a batch."""

    MAX_SEEN = 4096  # bundles: a few hundred slots' worth
    MAX_SEEN_BYTES = 16 << 20  # of them together

    def __init__(self, record: ConfigRecord, verifier: Verifier) -> None:
        """`record` names the admitted clients."""
        self._record = record
        self._verifier = verifier
        self._keys = {client.key for client in record.clients}
        self._seen: dict[bytes, BundleBody] = {}
        self._seen_bytes = 0
        self.max_bytes = record.parameters.max_batch_bytes  # of a valid batch

    def check(self, data: bytes, name: bytes | None = None) -> BundleBody:
        """The body of an encoded bundle whose client is admitted and whose signature holds. `name`: its `bundle_name`,
        where the caller has it. Raises BadError.
        """
        if name is None:
            name = bundle_name(data)
        body = self._seen.get(name)
        if body is not None:
            return body
        bundle, body = bundle_body(data)
        if body.group != self._record.life:
            raise BadError(f"bundle is for group {body.group!r}, this is {self._record.life!r}")
        if body.client not in self._keys:
            raise BadError(f"client {body.client[:8].hex()}… is not admitted in c={self._record.c}")
        numbers = [request.number for request in body.requests]
        if not numbers or numbers != sorted(set(numbers)) or not 0 < numbers[0] <= numbers[-1] < 1 << 62:
            raise BadError("bundle's request numbers do not increase from 1")
        if not self._verifier.verify(body.client, bundle_bytes(bundle.body), bundle.signature):
            raise BadError(f"bundle of client {body.client[:8].hex()}… has a wrong signature")
        self._seen_bytes += len(data)
        if len(self._seen) >= self.MAX_SEEN or self._seen_bytes > self.MAX_SEEN_BYTES:
            self._seen.clear()
            self._seen_bytes = len(data)
        self._seen[name] = body
        return body

    def valid(self, batch: bytes) -> Checked | None:
        """Whether the batch is valid (protocol §3): format, size, client signatures, against c. None if it is not."""
        limits = self._record.parameters
        if len(batch) > limits.max_batch_bytes:
            return None
        try:
            bundles = split_batch(batch)
            names = tuple([bundle_name(data) for data in bundles])
            bodies = tuple([self.check(data, name) for data, name in zip(bundles, names, strict=True)])
        except BadError:
            return None
        if not bodies or sum(len(body.requests) for body in bodies) > limits.max_batch_requests:
            return None
        return Checked(batch_digest(batch), bodies, names)
