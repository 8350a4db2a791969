"""`python -m tests.fuzz TARGET --seconds N`: fuzz one target, guided by coverage (docs/fuzzing.md)."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: .venv/bin/pip install -e '.[fuzz]'")

from tests.fuzz.corpus import TARGETS, adopt, folder

MAX_BYTES = 4096  # larger inputs say little more, and slow the fuzzer down
MAX_RSS_MIB = 1500  # an input that needs more is a finding
MAX_RUN_S = 20  # so is one that takes longer


def main() -> None:
    """Fuzzing never returns: libFuzzer ends the process, by 77 (and an input in `--findings`) if something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, help="keep the inputs that reach new code here (default: /tmp/cf-fuzz-TARGET)"
    )
    parser.add_argument("--adopt", action="store_true", help="do not fuzz: copy the smallest of --work to the corpus")
    parser.add_argument("--findings", type=Path, default=Path(), help="where an input that breaks the target goes")
    arguments = parser.parse_args()
    if arguments.adopt:
        print(f"{adopt(arguments.target, arguments.work)} inputs")
        return
    with atheris.instrument_imports(include=["cloudfit_orchestrator"], enable_loader_override=False):
        target = importlib.import_module(f"tests.fuzz.fuzz_{arguments.target}")
    work = arguments.work or Path(tempfile.gettempdir()) / f"cf-fuzz-{arguments.target}"
    work.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (work / f"seed-{i}").write_bytes(seed)
    options = {
        "max_total_time": arguments.seconds,
        "seed": arguments.seed,
        "max_len": MAX_BYTES,
        "rss_limit_mb": MAX_RSS_MIB,
        "timeout": MAX_RUN_S,
        "artifact_prefix": f"{arguments.findings.absolute()}/{arguments.target}-",
        "print_final_stats": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(work), str(folder(arguments.target))], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
