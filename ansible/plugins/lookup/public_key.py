"""Lookup `public_key`: reads what will be laid open on hosts and in logs, and refuses whatever might be a secret."""

import base64
import hashlib
from pathlib import Path

from ansible.errors import AnsibleLookupError

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: public_key
author: CloudFIT maintainers
short_description: Ed25519 public keys of files on the control node
description:
  - Reads files as cloudfit keeps public keys, 32 raw bytes in base64, and nothing else.
  - A raw private key has the same form. So the file's name must end in C(.pub), also behind symbolic links; no file
    beside it with another name may hold the same; and it must be a point of the group that public keys belong to, as
    one private key of sixteen is by chance.
  - No message shows a file's content.
options:
  _terms:
    description: Files on the control node.
    required: true
    type: list
    elements: path
"""

EXAMPLES = """
- name: Show which key this is
  ansible.builtin.debug:
    msg: "{{ lookup('cloudfit.orchestrator.public_key', '/var/lib/cloudfit/keys/controller.pub').id }}"
"""

RETURN = """
_raw:
  description: One dictionary a file.
  type: list
  elements: dict
  contains:
    key:
      description: The key in base64.
      type: str
    id:
      description: 16 hexadecimal digits, the beginning of the SHA-256 of the raw key.
      type: str
"""

SUFFIX = ".pub"
KEY_BYTES = 32
MAX_BYTES = 1024  # of a file with a key: this is no place to read a whole disk
MAX_NEIGHBOURS = 10_000  # files of the directory that are looked at
# Ed25519 (RFC 8032): the field, the order of the group of public keys, the curve's constant, a root of -1.
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT = pow(2, (P - 1) // 4, P)


class LookupModule(LookupBase):
    """See DOCUMENTATION."""

    def run(self, terms, variables=None, **kwargs):  # noqa: ARG002  the interface
        """One key a term. Raises AnsibleLookupError."""
        return [read(Path(str(term)).expanduser()) for term in terms]


def read(path):
    """`{key, id}` of one file. Raises AnsibleLookupError: what is wrong, with which file, and what to name instead."""
    try:
        real = path.resolve(strict=True)
        if not real.is_file():
            raise refused(path, "is no file")
        if path.suffix != SUFFIX or real.suffix != SUFFIX:
            raise refused(path, f"does not end in {SUFFIX}, nor then does anything say that it is public")
        content = beginning(real)
        if b"PRIVATE KEY" in content:
            raise refused(path, "holds a private key")
        raw = decode(content)
        if raw is None:
            raise refused(path, "does not hold 32 bytes in base64, a raw Ed25519 public key, and nothing else")
        for other in neighbours(real):
            if decode(beginning(other)) == raw:
                raise refused(path, f"holds the same as {other.name} beside it, which does not end in {SUFFIX}")
    except OSError as error:
        raise refused(path, f"cannot be read: {error.strerror}") from error
    if not is_public(raw):
        raise refused(path, "holds 32 bytes that are no Ed25519 public key; a private key looks like that")
    return {"key": base64.b64encode(raw).decode(), "id": hashlib.sha256(raw).hexdigest()[:16]}


def refused(path, why):
    """The error."""
    hint = "name the public key, NAME.pub in the directory keys/ of cloudfit's data directory"
    return AnsibleLookupError(f"{path} {why}; {hint}")


def beginning(path):
    """The file's content; of a longer one only so much that it is seen to be no key."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def decode(content):
    """The raw key, or None."""
    try:
        raw = base64.b64decode(content.strip(), validate=True)
    except ValueError:
        return None
    return raw if len(raw) == KEY_BYTES else None


def neighbours(path):
    """Files beside it that are not public by their name and may be read."""
    found = []
    for other in list(path.parent.iterdir())[:MAX_NEIGHBOURS]:
        try:
            if other.suffix != SUFFIX and other.is_file() and other.stat().st_size <= MAX_BYTES:
                other.open("rb").close()
                found.append(other)
        except OSError:  # what cannot be read was not copied by this user either
            continue
    return found


def is_public(raw):
    """Whether it is a point of the group's prime order, as each seed's public key is, in its one encoding."""
    point = decompressed(raw)
    return point is not None and point != IDENTITY and multiplied(ORDER, point) == IDENTITY


IDENTITY = (0, 1)


def decompressed(raw):
    """The point (x, y), or None if there is none (RFC 8032, 5.1.3)."""
    number = int.from_bytes(raw, "little")
    sign, y = number >> 255, number & ((1 << 255) - 1)
    if y >= P:
        return None
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    if v * x * x % P != u:
        x = x * ROOT % P
    if v * x * x % P != u or (x == 0 and sign):
        return None
    return (P - x if x & 1 != sign else x), y


def added(a, b):
    """The sum of two points in extended coordinates (X, Y, Z, T)."""
    e = (a[1] - a[0]) * (b[1] - b[0]) % P
    f = (a[1] + a[0]) * (b[1] + b[0]) % P
    g = 2 * a[3] * b[3] * D % P
    h = 2 * a[2] * b[2] % P
    i, j, k, m = f - e, h - g, h + g, f + e
    return i * j % P, k * m % P, j * k % P, i * m % P


def multiplied(times, point):
    """`times` the point (x, y). Public values only: its time tells of them."""
    x, y = point
    term, total = (x, y, 1, x * y % P), (0, 1, 1, 0)
    while times:
        if times & 1:
            total = added(total, term)
        term = added(term, term)
        times >>= 1
    inverse = pow(total[2], -1, P)
    return total[0] * inverse % P, total[1] * inverse % P
