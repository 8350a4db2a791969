"""What the lab says while it works, how it fails, and how it waits."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

POLL_S = 0.2
LAST_WORDS = 1500  # characters of a failed program's log that go into the error
_BEGAN = time.monotonic()


class LabError(Exception):
    """A fact, its object, and the command to run next."""


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, log: Path) -> None:
    """Wait for other processes' work. Raises LabError naming `what` and the log to read."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not so after {timeout_s:.0f} s; see {log}{last_words(log)}")
        time.sleep(POLL_S)  # other processes' state can only be looked at


def last_words(log: Path) -> str:
    """The end of a log file, to be put behind an error."""
    try:
        text = log.read_text(errors="replace").strip()
    except OSError:
        return ""
    return f":\n{text[-LAST_WORDS:]}"


def run(
    command: Sequence[str | Path],
    *,
    log: Path | None = None,
    timeout_s: float = 60.0,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end; its output goes to `log`, or is returned. Raises LabError if it fails."""
    words = [str(word) for word in command]
    with contextlib.ExitStack() as stack:
        output = subprocess.PIPE if log is None else stack.enter_context(log.open("ab"))
        try:
            done = subprocess.run(
                words,
                input=stdin.encode() if stdin is not None else None,
                stdin=subprocess.DEVNULL if stdin is None else None,
                stdout=output,
                stderr=output,
                env=env,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise LabError(f"the program {words[0]} is not installed; run: make openstack-lab") from error
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(words[:3])}: still running after {timeout_s:.0f} s") from error
    if done.returncode != 0:
        said = f":\n{done.stderr.decode(errors='replace')[-LAST_WORDS:]}" if log is None else last_words(log)
        raise LabError(f"{' '.join(words[:3])} failed with exit code {done.returncode}{said}")
    return (done.stdout or b"").decode(errors="replace")


def write(path: Path, text: str, mode: int = 0o644) -> bool:
    """Have `text` in the file, changed only if it differs: True then."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.touch(mode=mode)
    fresh.write_text(text)
    fresh.chmod(mode)
    fresh.replace(path)
    return True


@contextlib.contextmanager
def once(marker: Path) -> Iterator[bool]:
    """True where the step that `marker` stands for has still to be done; the marker is made when it succeeded."""
    todo = not marker.exists()
    yield todo
    if todo:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
