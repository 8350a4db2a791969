"""A unified kernel image: systemd's EFI stub, as Debian has it, with command line, initramfs and kernel as sections.

Written here and not by objcopy, so that the same files give the same bytes on any machine. Layout: Microsoft's "PE
Format", and systemd-stub(7), which finds its sections by name.
"""

import struct
from collections.abc import Sequence

from cloudfit_orchestrator.model.errors import PermanentError

_PE_OFFSET = 0x3C  # where a DOS header says at which offset the PE header is
_COFF = struct.Struct("<4sHHIIIHH")
_SECTION = struct.Struct("<8sIIIIIIHHI")
_SECTION_ALIGNMENT, _FILE_ALIGNMENT, _SIZE_OF_IMAGE, _SIZE_OF_HEADERS, _CHECKSUM = 32, 36, 56, 60, 64
_PE32_PLUS = 0x20B
_DATA = 0x40000040  # initialised data, readable
_PAGE = 4096  # of memory: each section begins on one


def make_uki(stub: bytes, command_line: str, initramfs: bytes, kernel: bytes) -> bytes:
    """The EFI program. The kernel comes last, as it is unpacked beyond its own end. Raises PermanentError."""
    words = command_line.encode("ascii") + b"\0"
    return _with_sections(stub, ((b".cmdline", words), (b".initrd", initramfs), (b".linux", kernel)))


def _with_sections(stub: bytes, added: Sequence[tuple[bytes, bytes]]) -> bytes:
    try:
        (pe,) = struct.unpack_from("<I", stub, _PE_OFFSET)
        magic, _, count, _, _, _, optional_size, _ = _COFF.unpack_from(stub, pe)
        optional = pe + _COFF.size
        (kind,) = struct.unpack_from("<H", stub, optional)
        section_alignment, file_alignment = struct.unpack_from("<II", stub, optional + _SECTION_ALIGNMENT)
        (image_size,) = struct.unpack_from("<I", stub, optional + _SIZE_OF_IMAGE)
        (headers_size,) = struct.unpack_from("<I", stub, optional + _SIZE_OF_HEADERS)
    except struct.error as error:
        raise PermanentError(f"the EFI stub is no PE file: {error}") from error
    table = optional + optional_size + count * _SECTION.size
    if magic != b"PE\0\0" or kind != _PE32_PLUS or table + len(added) * _SECTION.size > headers_size:
        raise PermanentError("the EFI stub is no 64-bit PE file with room for further sections")
    page = max(_PAGE, section_alignment)
    out = bytearray(stub.ljust(_up(len(stub), file_alignment), b"\0"))
    for name, content in added:
        address = _up(image_size, page)
        raw = content.ljust(_up(len(content), file_alignment), b"\0")
        _SECTION.pack_into(out, table, name, len(content), address, len(raw), len(out), 0, 0, 0, 0, _DATA)
        out += raw
        image_size = address + _up(len(content), section_alignment)
        table += _SECTION.size
    struct.pack_into("<H", out, pe + 6, count + len(added))
    struct.pack_into("<I", out, optional + _SIZE_OF_IMAGE, image_size)
    struct.pack_into("<I", out, optional + _CHECKSUM, 0)  # of the stub alone it would be wrong, and nobody needs one
    return bytes(out)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
