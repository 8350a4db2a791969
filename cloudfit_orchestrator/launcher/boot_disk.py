"""What makes a disk that UEFI boots of an image's root: a GPT and an EFI system partition before it, a GPT behind it.

The disk is `esp` ‖ `root` ‖ `verity` ‖ `gpt`. Partition 1 is a FAT16 with one file, the unified kernel image where
firmware looks for it unasked; partition 2 is `root` ‖ `verity`, byte for byte as in `root.img`. All identifiers and
times are fixed. Layout: UEFI specification 2.10, §5.3 and §13.3; Microsoft's "FAT: General Overview".
"""

import binascii
import struct
import uuid

from cloudfit_orchestrator.model.errors import PermanentError

SECTOR = 512
FIRST = 2048  # sectors before the first partition, as every tool leaves them
ENTRIES, ENTRY_BYTES = 128, 128
TABLE_SECTORS = ENTRIES * ENTRY_BYTES // SECTOR
BEHIND = 40  # sectors of the second table and header: whole blocks of 4096 bytes
CLUSTER = 2048
RESERVED, FATS, ROOT_ENTRIES = 4, 2, 512
FAT16_CLUSTERS = (4085, 65524)  # fewer make it a FAT12, more a FAT32
DISK_ID, ESP_ID, ROOT_ID = (uuid.UUID(f"c10dcf17-0000-4000-8000-00000000001{n}") for n in range(3))
_ESP_TYPE = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_LINUX_TYPE = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_DATE = (2024 - 1980) << 9 | 1 << 5 | 1  # of every file in an image: 2024-01-01
_DIRECTORY, _ARCHIVE = 0x10, 0x20


def frame(uki: bytes, root_bytes: int) -> tuple[bytes, bytes]:
    """What stands before and behind `root` ‖ `verity` of so many bytes on the disk. Raises PermanentError."""
    esp = fat16(uki)
    root_first = FIRST + len(esp) // SECTOR
    behind = root_first + root_bytes // SECTOR
    entries = (
        _entry(_ESP_TYPE, ESP_ID, FIRST, root_first - 1, "ESP")
        + _entry(_LINUX_TYPE, ROOT_ID, root_first, behind - 1, "root")
    ).ljust(TABLE_SECTORS * SECTOR, b"\0")
    last = behind + BEHIND - 1
    usable = (FIRST, behind - 1)
    first_header = _header(1, last, 2, usable, entries)
    second_header = _header(last, 1, last - TABLE_SECTORS, usable, entries)
    before = (_protective(last) + first_header + entries).ljust(FIRST * SECTOR, b"\0") + esp
    return before, bytes((BEHIND - 1 - TABLE_SECTORS) * SECTOR) + entries + second_header


def _entry(kind: uuid.UUID, identity: uuid.UUID, first: int, last: int, name: str) -> bytes:
    head = kind.bytes_le + identity.bytes_le + struct.pack("<QQQ", first, last, 0)
    return head + name.encode("utf-16-le").ljust(72, b"\0")


def _header(here: int, other: int, table: int, usable: tuple[int, int], entries: bytes) -> bytes:
    def fields(checksum: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, checksum, 0, here, other, *usable, DISK_ID.bytes_le, table,
            ENTRIES, ENTRY_BYTES, binascii.crc32(entries),
        )  # fmt: skip

    return fields(binascii.crc32(fields(0))).ljust(SECTOR, b"\0")


def _protective(last: int) -> bytes:
    """The first sector: one partition over the whole disk, for whoever knows no GPT."""
    partition = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    return (bytes(446) + partition).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def fat16(program: bytes) -> bytes:
    r"""A file system that holds `program` as \EFI\BOOT\BOOTX64.EFI and nothing else. Raises PermanentError."""
    chains = (1, 1, max(1, -(-len(program) // CLUSTER)))  # clusters of \EFI, \EFI\BOOT and the program
    clusters = max(FAT16_CLUSTERS[0] + 16, sum(chains))
    clusters += -clusters % 2  # whole blocks of 4096 bytes
    if clusters > FAT16_CLUSTERS[1]:
        raise PermanentError(
            f"kernel and initramfs have {len(program)} bytes, an EFI system partition here holds "
            f"{FAT16_CLUSTERS[1] * CLUSTER}",
            next_command="load fewer modules in the image's recipe",
        )
    fat_sectors = -(-(clusters + 2) * 2 // SECTOR)
    fat_sectors += -fat_sectors % 2  # so that the clusters begin at a block of 4096 bytes
    reserved = RESERVED + -(RESERVED + FATS * fat_sectors) % 8
    total = reserved + FATS * fat_sectors + ROOT_ENTRIES * 32 // SECTOR + clusters * CLUSTER // SECTOR
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s", b"\xeb\x3c\x90", b"CLOUDFIT", SECTOR, CLUSTER // SECTOR, reserved, FATS,
        ROOT_ENTRIES, total if total < 1 << 16 else 0, 0xF8, fat_sectors, 63, 255, FIRST,
        total if total >= 1 << 16 else 0, 0x80, 0, 0x29, 0xC10DCF17, b"NO NAME    ", b"FAT16   ",
    )  # fmt: skip
    table, first = [0xFFF8, 0xFFFF], 2
    for length in chains:
        table += [*range(first + 1, first + length), 0xFFFF]
        first += length
    fat = struct.pack(f"<{len(table)}H", *table).ljust(fat_sectors * SECTOR, b"\0")
    root = _file(b"EFI        ", _DIRECTORY, 2).ljust(ROOT_ENTRIES * 32, b"\0")
    efi = _file(b".          ", _DIRECTORY, 2) + _file(b"..         ", _DIRECTORY, 0)
    efi += _file(b"BOOT       ", _DIRECTORY, 3)
    within = _file(b".          ", _DIRECTORY, 3) + _file(b"..         ", _DIRECTORY, 2)
    within += _file(b"BOOTX64 EFI", _ARCHIVE, 4, len(program))
    data = efi.ljust(CLUSTER, b"\0") + within.ljust(CLUSTER, b"\0") + program
    head = boot.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    return head.ljust(reserved * SECTOR, b"\0") + fat * FATS + root + data.ljust(clusters * CLUSTER, b"\0")


def _file(name: bytes, attributes: int, cluster: int, size: int = 0) -> bytes:
    return struct.pack("<11sBBBHHHHHHHI", name, attributes, 0, 0, 0, _DATE, _DATE, 0, 0, _DATE, cluster, size)
