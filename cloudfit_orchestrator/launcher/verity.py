"""The root: a reproducible erofs with its dm-verity hash tree behind it in the same file.

Built by Debian's tools and checked by a second implementation of the tree (format 1 of dm-verity, SHA-256, blocks of
4096 bytes), which needs neither privilege nor tools: kernel documentation, admin-guide/device-mapper/verity.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.launcher.tools import run
from cloudfit_orchestrator.model.errors import BadError, PermanentError

BLOCK = 4096
SALT = hashlib.sha256(b"cloudfit image salt").hexdigest()  # fixed: the same root has the same root hash everywhere
EROFS_UUID = "c10dcf17-0000-4000-8000-000000000001"
VERITY_UUID = "c10dcf17-0000-4000-8000-000000000002"
TIMESTAMP = 1_704_067_200  # of every file in an image, and SOURCE_DATE_EPOCH of every tool: 2024-01-01
ARGUMENT = "cloudfit.verity="
_HASHES_PER_BLOCK = BLOCK // 32
_VALUE = re.compile(r"^(\d{1,10}),(\d{1,10}),([0-9a-f]{64}),([0-9a-f]{64})$")


@dataclass(frozen=True, slots=True)
class Verity:
    """What the kernel is told of a tree: sizes in blocks of 4096 bytes, hashes in hex."""

    blocks: int  # of data
    start: int  # first block of the hash tree proper: one behind the superblock
    root: str
    salt: str

    def argument(self) -> str:
        """The word of the kernel command line that the initramfs reads."""
        return f"{ARGUMENT}{self.blocks},{self.start},{self.root},{self.salt}"


def parse_command_line(command_line: str) -> Verity:
    """The verity parameters of a kernel command line. Raises BadError unless they are there exactly once."""
    words = [w.removeprefix(ARGUMENT) for w in command_line.split() if w.startswith(ARGUMENT)]
    if len(words) != 1:
        raise BadError(f"command line names {len(words)} verity roots, expected one {ARGUMENT}BLOCKS,START,ROOT,SALT")
    match = _VALUE.match(words[0])
    if match is None:
        raise BadError(f"command line has malformed verity parameters {words[0]!r}")
    return Verity(int(match[1]), int(match[2]), match[3], match[4])


def make_root(tree: Path, image: Path) -> Verity:
    """Write `tree` as erofs and hash tree into the new file `image`. Raises PermanentError."""
    epoch = {"SOURCE_DATE_EPOCH": str(TIMESTAMP)}
    run(
        "mkfs.erofs", "--quiet", "-zlz4hc", "-x-1", f"-T{TIMESTAMP}", f"-U{EROFS_UUID}", "--all-root", image, tree,
        env=epoch,
    )  # fmt: skip
    size = image.stat().st_size
    if size == 0 or size % BLOCK:
        raise PermanentError(f"mkfs.erofs left {size} bytes, which are not whole blocks of {BLOCK}")
    blocks = size // BLOCK
    text = run(
        "veritysetup", "format", "--hash=sha256", f"--salt={SALT}", f"--uuid={VERITY_UUID}",
        f"--data-block-size={BLOCK}", f"--hash-block-size={BLOCK}", f"--data-blocks={blocks}", f"--hash-offset={size}",
        image, image, env=epoch,
    )  # fmt: skip
    found = re.search(r"^Root hash:\s*([0-9a-f]{64})$", text, re.MULTILINE)
    if found is None:
        raise PermanentError(f"veritysetup printed no root hash: {text[-200:]!r}")
    return Verity(blocks, blocks + 1, found[1], SALT)


def check_tree(image: Path, verity: Verity) -> None:
    """Recompute the tree over the data of `image` and compare it, block by block, with the one that is stored.

    Raises BadError naming the part (root or verity) that does not agree with the parameters.
    """
    salt = bytes.fromhex(verity.salt)
    with image.open("rb") as file:
        level = _hashes((file.read(BLOCK) for _ in range(verity.blocks)), salt)
        levels = []  # from the leaves upwards, each in whole blocks
        while len(level) > 1:
            blocks = [
                b"".join(level[i : i + _HASHES_PER_BLOCK]).ljust(BLOCK, b"\0")
                for i in range(0, len(level), _HASHES_PER_BLOCK)
            ]
            levels.append(blocks)
            level = _hashes(blocks, salt)
        if not level or level[0].hex() != verity.root:
            raise BadError("root: its blocks do not hash to the verity root of the command line")
        file.seek(verity.start * BLOCK)
        for blocks in reversed(levels):  # the top level is stored first
            for block in blocks:
                if file.read(BLOCK) != block:
                    raise BadError("verity: the stored hash tree is not the tree of the root")
        if file.read(1):
            raise BadError("verity: there are bytes behind the hash tree")


def _hashes(blocks: Iterable[bytes], salt: bytes) -> list[bytes]:
    base = hashlib.sha256(salt)
    hashes = []
    for block in blocks:
        digest = base.copy()
        digest.update(block)
        hashes.append(digest.digest())
    return hashes
