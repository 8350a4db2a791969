"""The disk that UEFI boots, read again by others' tools: util-linux, dosfstools, binutils."""

import json
import re
import struct
import subprocess

import pytest

from cloudfit_orchestrator.launcher import boot_disk, uki
from cloudfit_orchestrator.model.errors import PermanentError

ROOT = b"root" * 4096
PARTS = {"cmdline": b"console=ttyS0\0", "initrd": b"initramfs" * 1000, "linux": b"kernel" * 3000}


def stub(sections=1, headers=1024, kind=0x20B):
    """The least that is a PE file: headers and one section, as systemd's stub is aligned."""
    optional = bytearray(240)
    struct.pack_into("<H", optional, 0, kind)
    struct.pack_into("<II", optional, 32, 512, 512)
    struct.pack_into("<II", optional, 56, 0x4200, headers)
    struct.pack_into("<I", optional, 108, 16)  # data directories
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, sections, 0, 0, 0, len(optional), 0x22E)
    section = struct.pack("<8sIIIIIIHHI", b".text", 100, 0x4000, 512, headers, 0, 0, 0, 0, 0x60000020)
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 128)
    return (head.ljust(128, b"\0") + coff + optional + section * sections).ljust(headers, b"\0") + bytes(500)


@pytest.fixture(scope="module")
def program():
    return uki.make_uki(stub(), "console=ttyS0", PARTS["initrd"], PARTS["linux"])


@pytest.fixture
def disk(tmp_path, program):
    before, behind = boot_disk.frame(program, len(ROOT))
    (tmp_path / "disk").write_bytes(before + ROOT + behind)
    (tmp_path / "esp").write_bytes(before[boot_disk.FIRST * boot_disk.SECTOR :])
    return tmp_path


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_the_program_holds_stub_command_line_initramfs_and_kernel(tmp_path, program):
    (tmp_path / "program").write_bytes(program)
    table = run("objdump", "-h", tmp_path / "program")
    found = re.findall(r"^ +\d+ \.(\w+) +(\w+) +(\w+) +\w+ +(\w+)", table, re.MULTILINE)
    assert [name for name, *_ in found] == ["text", "cmdline", "initrd", "linux"]
    ends = 0
    for name, size, address, offset in ((n, *(int(x, 16) for x in rest)) for n, *rest in found):
        assert address >= ends, "sections lie one behind the other in memory"
        ends = address + size
        if name in PARTS:
            assert program[offset : offset + size] == PARTS[name]
            assert address % 4096 == 0


@pytest.mark.parametrize("wrong", [b"", b"MZ" * 40, stub(kind=0x10B), stub(sections=16)])
def test_what_is_no_stub_is_refused(wrong):
    with pytest.raises(PermanentError, match="EFI stub is no"):
        uki.make_uki(wrong, "x", b"", b"")


def test_the_partitions_are_what_sfdisk_reads(disk):
    table = json.loads(run("sfdisk", "--json", disk / "disk"))["partitiontable"]
    assert "No errors detected" in run("sfdisk", "-V", disk / "disk")
    esp, root = table["partitions"]
    assert esp["type"] == "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
    whole = (disk / "disk").read_bytes()
    assert whole[root["start"] * 512 : (root["start"] + root["size"]) * 512] == ROOT
    assert root["start"] % 8 == 0
    assert len(whole) % 4096 == 0
    assert whole[esp["start"] * 512 : (esp["start"] + esp["size"]) * 512] == (disk / "esp").read_bytes()


def test_the_second_table_is_found_where_the_first_is_lost(disk):
    whole = (disk / "disk").read_bytes()
    (disk / "disk").write_bytes(whole[:512] + bytes(512) + whole[1024:])
    assert len(json.loads(run("sfdisk", "--json", disk / "disk"))["partitiontable"]["partitions"]) == 2


def test_the_file_system_holds_the_program_where_firmware_looks(disk, program):
    assert "3 files" in run("fsck.vfat", "-n", disk / "esp")
    esp = (disk / "esp").read_bytes()
    reserved, fats, entries = struct.unpack_from("<HBH", esp, 14)
    (fat_sectors,) = struct.unpack_from("<H", esp, 22)
    root_at = (reserved + fats * fat_sectors) * 512

    def entry(at):
        name, attributes, cluster, size = struct.unpack_from("<11sB14xHI", esp, at)
        return name, attributes, root_at + entries * 32 + (cluster - 2) * boot_disk.CLUSTER, size

    at = root_at
    for name in (b"EFI        ", b"BOOT       "):
        found = entry(at)
        assert found[:2] == (name, 0x10)
        at = found[2] + 64  # behind . and ..
    name, attributes, at, size = entry(at)
    assert (name, attributes) == (b"BOOTX64 EFI", 0x20)
    assert esp[at : at + size] == program


def test_the_same_files_give_the_same_bytes_and_too_large_ones_an_error(program):
    assert boot_disk.frame(program, 4096) == boot_disk.frame(program, 4096)
    assert boot_disk.frame(program, 4096)[0] != boot_disk.frame(program + b"x", 4096)[0]
    with pytest.raises(PermanentError, match="an EFI system partition here holds"):
        boot_disk.fat16(bytes(130 << 20))
