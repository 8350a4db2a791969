"""Running Debian's tools: argument lists, never a shell; a failure names the tool, its last words and what to do."""

import errno
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cloudfit_orchestrator.model.errors import PermanentError

PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "mkfs.erofs": "erofs-utils",
    "modprobe": "kmod",
    "veritysetup": "cryptsetup-bin",
}
LAST_WORDS = 800  # characters of a failed tool's output that go into the error
TIMEOUT_S = 600  # the slowest is a download over a poor line
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # an ordinary user's PATH lacks the last two


class ToolError(PermanentError):
    """A tool failed. `output` is what it said."""

    def __init__(self, fact: str, output: str) -> None:
        """`fact` already holds the end of `output`."""
        super().__init__(fact)
        self.output = output


def run(tool: str, *args: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run `tool` to its end and return its standard output. Raises PermanentError (ToolError if it ran and failed)."""
    binary = shutil.which(tool, path=_PATH)
    if binary is None:
        package = PACKAGES.get(tool, tool)
        raise PermanentError(f"the program {tool} is not installed", next_command=f"apt-get install {package}")
    command = [binary, *map(str, args)]
    environment = {"PATH": _PATH, "LC_ALL": "C", **{k: v for k, v in os.environ.items() if k not in ("PATH", "LC_ALL")}}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PermanentError(f"{tool} did not end within {TIMEOUT_S} s") from error
    if done.returncode != 0:
        output = (done.stderr + done.stdout).strip()
        raise ToolError(f"{tool} failed with exit code {done.returncode}: {output[-LAST_WORDS:]}", output)
    return done.stdout


def is_disk_full(error: BaseException) -> bool:
    """True if `error`, ours or the system's, says that a disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, ToolError) and os.strerror(errno.ENOSPC) in error.output
