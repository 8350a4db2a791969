"""What firmware could boot instead of the measured disk: blocks that a guest wrote over it, or what a variable names.

A Nova server's disk and its firmware's variables are files that its guest writes to. What is found in them holds for
the start that they are read after, and `nova` sees to it that there is no second one (docs/decisions/0015).
"""

import contextlib
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cloudfit_orchestrator.model.errors import BadError, UnknownError

MAX_VARIABLES_BYTES = 16 << 20  # of a file of variables: those that there are have 128 KiB or 528 KiB
_QCOW2 = struct.Struct(">4sIQIIQIIQ")
_FEATURES_AT = 72
_KNOWN_FEATURES = 0b1001  # that leave the tables as they are: unclean reference counts, a kind of compression
_ADDRESS = 0x00FF_FFFF_FFFF_FE00  # in a level 1 entry: where its level 2 table is
_VOLUME_SIGNATURE_AT, _VOLUME_HEADER_AT = 40, 48
_STORE = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792").bytes_le  # authenticated variables, as OVMF keeps them
_STORE_HEADER_BYTES = 28
_VARIABLE = struct.Struct("<HBBIQ16sIII16s")
_STARTED, _LIVE = 0x55AA, (0x3F, 0x3E)
_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c").bytes_le
_FOUND = uuid.UUID("8108ac4e-9f11-4d59-850e-e21a522c59b2").bytes_le  # firmware's mark on entries that it made itself
_ORDERS = ("BootNext", "Driver", "SysPrep", "OsRecovery")  # what runs before the first boot entry, or instead of it
_HARDWARE, _ACPI, _MESSAGING, _MEDIA, _END = 1, 2, 3, 4, 0x7F
_URI = (_MESSAGING, 24)
_IN_FIRMWARE = ((_MEDIA, 6), (_MEDIA, 7))  # a program of the firmware's own, and the volume that it is in


def own_block(overlay: str, size: int) -> int | None:
    """Where, below `size`, a qcow2 overlay has a first block of its own; None if all are those of its base.

    A block once written never is the base's again, discarded or not. So None holds also for the moment when the
    hypervisor opened the file, whatever the guest did since. Raises BadError if it is a file of another kind.
    """
    bits: int
    with _reading(overlay) as file:
        magic, version, _, _, bits, virtual, crypt, entries, table_at = _QCOW2.unpack(file.read(_QCOW2.size))
        if magic != b"QFI\xfb" or version not in (2, 3) or crypt or not 9 <= bits <= 21 or virtual < size:
            raise BadError(f"root: {overlay} is no plain qcow2 of the image's size or more")
        if version == 3:
            file.seek(_FEATURES_AT)
            (features,) = struct.unpack(">Q", file.read(8))
            if features & ~_KNOWN_FEATURES:
                raise BadError(f"root: {overlay} has qcow2 features {features:#x}, not all of which are known")
        in_table = 1 << bits - 3
        blocks = -(-size // (1 << bits))
        for first in range(0, min(blocks, entries * in_table), in_table):
            file.seek(table_at + 8 * (first // in_table))
            (entry,) = struct.unpack(">Q", file.read(8))
            if entry & _ADDRESS:
                file.seek(entry & _ADDRESS)
                count = min(in_table, blocks - first)
                for block, own in enumerate(struct.unpack(f">{count}Q", file.read(8 * count)), start=first):
                    if own:
                        return block << bits
    return None


def check_variables(path: str) -> None:
    """Raise BadError unless the firmware's variables hold nothing but what firmware itself puts there.

    A guest can restore what it wrote, so this shows a careless intruder only. What bars the others is that the machine
    does not start again.
    """
    with _reading(path) as file:
        data = file.read(MAX_VARIABLES_BYTES)
        (at,) = struct.unpack_from("<H", data, _VOLUME_HEADER_AT)
        if data[_VOLUME_SIGNATURE_AT:][:4] != b"_FVH" or data[at : at + 16] != _STORE:
            raise BadError(f"firmware variables: {path} is of a kind that is not known here")
        at += _STORE_HEADER_BYTES
        while True:
            started, state, _, _, _, _, _, name_size, size, vendor = _VARIABLE.unpack_from(data, at)
            if started != _STARTED:
                return
            at += _VARIABLE.size
            if state in _LIVE and vendor == _GLOBAL:
                name = data[at : at + name_size].decode("utf-16-le", "replace").rstrip("\0")
                _check_variable(name, data[at + name_size : at + name_size + size])
            at += -(-(name_size + size) // 4) * 4


def _check_variable(name: str, value: bytes) -> None:
    if name.startswith(_ORDERS):
        raise BadError(f"firmware variables: there is {name}, which runs what nobody measured")
    if name.startswith("Boot") and len(name) == 8 and (why := _foreign(value)):
        raise BadError(f"firmware variables: {name} {why}")


def _foreign(option: bytes) -> str:
    """What in a boot entry firmware does not put there itself; empty if there is nothing."""
    _, length = struct.unpack_from("<IH", option)
    at = 6
    while option[at : at + 2] != b"\0\0":  # the description
        if at >= len(option):
            raise BadError("firmware variables: a boot entry has no end")
        at += 2
    at += 2
    end = at + length
    if option[end:] not in (b"", _FOUND):
        return "gives what it boots words of its own"
    while at < end:
        kind, sub, size = struct.unpack_from("<BBH", option, at)
        if (kind == _MEDIA and (kind, sub) not in _IN_FIRMWARE) or ((kind, sub) == _URI and size > 4):
            return "names a file, a partition or an address, not a device"
        if kind not in (_HARDWARE, _ACPI, _MESSAGING, _MEDIA, _END) or size < 4:
            return f"has a device path with a part of kind {kind}.{sub}"
        at += size
    return ""


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    """The file; what cannot be read is unknown, what ends too early is bad."""
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise UnknownError(f"cannot read {path}: {error.strerror}") from error
    except struct.error as error:
        raise BadError(f"{path} is cut short or damaged: {error}") from error
