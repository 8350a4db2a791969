"""The targets, and where the inputs lie that each has been given: `corpus/TARGET/`, one file an input."""

from pathlib import Path

HOME = Path(__file__).parent
TARGETS = tuple(sorted(path.stem.removeprefix("fuzz_") for path in HOME.glob("fuzz_*.py")))
MAX_CORPUS_BYTES = 16 << 10  # of one target in the tree: what reaches new code, minimised


def folder(target: str) -> Path:
    """The corpus of a target."""
    return HOME / "corpus" / target


def inputs(target: str) -> list[Path]:
    """All files of it."""
    return sorted(path for path in folder(target).iterdir() if path.is_file())
