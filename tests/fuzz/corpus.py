"""The targets, and where the inputs lie that each has been given: `corpus/TARGET/`, one file an input."""

from pathlib import Path

HOME = Path(__file__).parent
TARGETS = tuple(sorted(path.stem.removeprefix("fuzz_") for path in HOME.glob("fuzz_*.py")))
MAX_CORPUS_BYTES = 8 << 10  # of one target in the tree: examples, not all that a fuzzer found
MAX_ADOPTED = 24  # inputs
MAX_INPUT_BYTES = 256


def folder(target: str) -> Path:
    """The corpus of a target."""
    return HOME / "corpus" / target


def inputs(target: str) -> list[Path]:
    """All files of it."""
    return sorted(path for path in folder(target).iterdir() if path.is_file())


def adopt(target: str, found: Path) -> int:
    """Copy some of what a fuzzer found (its `--work` directory, each input of which reached new code, and was made
    smaller since) into the corpus: of all sizes, but none that is large. Returns how many.
    """
    small = [path for path in found.iterdir() if path.is_file() and path.stat().st_size <= MAX_INPUT_BYTES]
    small.sort(key=lambda path: (path.stat().st_size, path.name))
    chosen = small[:: max(1, -(-len(small) // MAX_ADOPTED))]
    for path in chosen:
        (folder(target) / path.name).write_bytes(path.read_bytes())
    return len(chosen)
