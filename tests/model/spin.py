"""Runs the Promela models of docs/model: which settings there are, what each must show, and one of them at a time.

`python -m tests.model.spin` lists the settings; with the name of one it runs that, and prints the violation that pan
found as a sequence of messages. The searches are exhaustive; what the models leave out is in docs/model/README.md.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parents[2] / "docs" / "model"
TOOLS = ("spin", "gcc")
INSTALL = "apt-get install --no-install-recommends spin gcc libc6-dev"
STEP_TIMEOUT_S = 300  # a tool that takes longer hangs: the slowest needs some seconds on an idle core
MEMORY_LIMIT_MIB = 1024  # of pan; the largest setting needs a sixth of it
DEPTH_LIMIT = 200  # messages of one execution; streams are short, and a search that is cut off is no success


class CheckerError(Exception):
    """A tool is missing or failed, or a search did not end: nothing is known about the setting."""


@dataclass(frozen=True)
class Setting:
    """One model with preprocessor definitions. `rule` names the rule left out and its section of docs/protocol.md."""

    model: str
    defines: tuple[str, ...] = ()
    rule: str = ""
    violates: str = ""  # what pan must find; empty: nothing
    depth: int = 0  # look for any violation within so many steps; 0: for the shortest, which costs far more


@dataclass(frozen=True)
class Result:
    """What pan found: violating executions, distinct states, CPU and memory, the shortest violation as text."""

    errors: int
    states: int
    seconds: float
    memory_mib: float
    trail: str


def ordering(*defines: str, rule: str = "", violates: str = "", depth: int = 0) -> Setting:
    return Setting("ordering", defines, rule, violates, depth)


def reconfiguration(*defines: str, rule: str = "", violates: str = "") -> Setting:
    return Setting("reconfiguration", defines, rule, violates)


AGREEMENT = "agreement on slot 1"
NEW_VIEW_LOSES = r"NEW-VIEW\(\d\) has lost slot \d"
ACTIVE_LOSES = r"ACTIVE\(c\d\) has lost slot 1"

# All rules on: no violation.
WHOLE = {
    "minbft": ordering("SLOTS=2"),
    "minbft-four": ordering("N=4"),
    "minbft-f2": ordering("N=5", "F=2", "VIEWS=2"),
    "ebawa": ordering("EBAWA", "SLOTS=2"),
    "ebawa-four": ordering("N=4", "EBAWA"),
    "windows": ordering("WINDOW=1", "SLOTS=3", "VIEWS=2"),
    "two-records": reconfiguration(),
    "two-records-two-slots": reconfiguration("SLOTS=2"),
    "view-change-and-wedge": reconfiguration("VIEWS=2", "ONE_SUCCESSOR", "SLOTS=2", "ROTATE"),
}

# One rule left out: pan must find the violation.
BROKEN = {
    "votes-after-view-change": ordering(
        "VOTES_AFTER_VIEW_CHANGE", rule="§3 R1: PREPARE, SKIP, COMMIT only for g = e >= v", violates=NEW_VIEW_LOSES
    ),
    "votes-without-entering": ordering(
        "VOTES_WITHOUT_ENTERING", rule="§3 R1: only for the view entered, g = e", violates=AGREEMENT
    ),
    "new-view-after-view-change": ordering(
        "NEW_VIEW_AFTER_VIEW_CHANGE",
        rule="§3 R1: NEW-VIEW and COMMIT(NEW-VIEW) only for g >= v",
        violates=NEW_VIEW_LOSES,
    ),
    "proposes-twice": ordering("PROPOSES_TWICE", rule="§3 R3: only for s > p", violates=AGREEMENT),
    "votes-beyond-window": ordering(
        "VOTES_BEYOND_WINDOW",
        *("WINDOW=1", "SLOTS=3", "VIEWS=2"),
        rule="§3 R2: every slot voted for only <= h'+L",
        violates=NEW_VIEW_LOSES,
        depth=32,
    ),
    "log-from-last-stable": ordering(
        "LOG_FROM_LAST_STABLE",
        *("WINDOW=2", "SLOTS=2", "VIEWS=2"),
        rule="§4: a log starts at a STABLE(h') with h' <= h-L",
        violates=NEW_VIEW_LOSES,
    ),
    "stable-without-view": ordering(
        "STABLE_WITHOUT_VIEW",
        *("WINDOW=1", "SLOTS=3"),
        rule="§4: STABLE states the view e that its sender is in",
        violates=NEW_VIEW_LOSES,
        depth=32,
    ),
    "bare-commits": ordering(
        "BARE_COMMITS", rule="§3 Messages: COMMIT carries the PREPARE header", violates=NEW_VIEW_LOSES
    ),
    "skip-learned-early": ordering(
        "SKIP_LEARNED_EARLY",
        "EBAWA",
        rule="§3 Messages: a SKIP is decided like a PREPARE, at Qc",
        violates=NEW_VIEW_LOSES,
    ),
    "own-commit-counts": ordering(
        "OWN_COMMIT_COUNTS", rule="§3 Messages: decide at Qc distinct members", violates=NEW_VIEW_LOSES
    ),
    "leader-skips-blacklist": ordering(
        "LEADER_SKIPS_BLACKLIST", "EBAWA", rule="§3: leader(c,g) = members(c)[g mod n], always", violates=AGREEMENT
    ),
    "quorums-disjoint": ordering("N=4", "QC=2", "QV=2", rule="§1: Qc + Qv > n", violates=NEW_VIEW_LOSES),
    "new-view-of-f": ordering("QV=F", rule="§5 step 3: NEW-VIEW from Qv VIEW-CHANGEs", violates=NEW_VIEW_LOSES),
    "log-not-contiguous": ordering(
        "LOG_NOT_CONTIGUOUS",
        rule="§5 step 2: O is contiguous up to UI-1 (decision 0001)",
        violates=NEW_VIEW_LOSES,
    ),
    "new-view-not-recomputed": ordering(
        "NEW_VIEW_NOT_RECOMPUTED", rule="§3 R4, form: a NEW-VIEW recomputes from its VCs", violates=NEW_VIEW_LOSES
    ),
    "lowest-view": ordering(
        "LOWEST_VIEW", rule="§5 step 3: the eligible proposal of the highest view", violates=NEW_VIEW_LOSES
    ),
    "commits-not-eligible": ordering(
        "COMMITS_NOT_ELIGIBLE", rule="§5 step 3, eligible: a PREPARE carried by a COMMIT in O", violates=NEW_VIEW_LOSES
    ),
    "new-views-not-eligible": ordering(
        "NEW_VIEWS_NOT_ELIGIBLE",
        rule="§5 step 3, eligible: a NEW-VIEW or COMMIT(NEW-VIEW) in O",
        violates=NEW_VIEW_LOSES,
    ),
    "votes-after-wedge": reconfiguration(
        "VOTES_AFTER_WEDGE", rule="§3 R1: a wedge is above all views of c", violates=ACTIVE_LOSES
    ),
    "old-configuration-resumes": reconfiguration(
        "OLD_CONFIGURATION_RESUMES",
        rule="§6: the old configuration never resumes after one wedge",
        violates=ACTIVE_LOSES,
    ),
    "wedge-without-epoch-end": reconfiguration(
        "WEDGE_WITHOUT_EPOCH_END", rule="§2 EPOCH-END: a wedge ends with it", violates=r"f\+1 signers"
    ),
    "epoch-end-by-kss": reconfiguration(
        "EPOCH_END_BY_KSS",
        rule="§2 EPOCH-END: the wormhole alone makes it, from its own counter",
        violates=ACTIVE_LOSES,
    ),
    "counters-carried-over": reconfiguration(
        "COUNTERS_CARRIED_OVER", rule="§2: one epoch per configuration", violates=AGREEMENT
    ),
    "r1-across-epochs": reconfiguration(
        "R1_ACROSS_EPOCHS", rule="§3 R1: only the same stream counts", violates=ACTIVE_LOSES
    ),
    "two-wedges-of-one": reconfiguration(
        "TWO_WEDGES_OF_ONE", rule="§6: S from Qv wedges, one a member", violates=ACTIVE_LOSES
    ),
    "log-copied": reconfiguration(
        "LOG_COPIED", rule="§6 step 5: a log is a vote with EPOCH-END only", violates=ACTIVE_LOSES
    ),
    "log-without-tail": reconfiguration(
        "LOG_WITHOUT_TAIL", rule="§6 step 4: the log is contiguous up to the counter", violates=ACTIVE_LOSES
    ),
    "epoch-end-of-another-epoch": reconfiguration(
        "EPOCH_END_OF_ANOTHER_EPOCH", rule="§6 step 5: never in another configuration", violates=ACTIVE_LOSES
    ),
    "answers-before-active": reconfiguration(
        "ANSWERS_BEFORE_ACTIVE", rule="§6: until ACTIVE nothing of S leaves a member", violates=ACTIVE_LOSES
    ),
    "confirmations-of-f": reconfiguration(
        "CONFIRMATIONS_F", rule="§6: f'+k'+1 confirmations", violates=ACTIVE_LOSES
    ),
    "confirms-unverified": reconfiguration(
        "CONFIRMS_UNVERIFIED", rule="§6: members confirm an S that they have verified", violates=ACTIVE_LOSES
    ),
    "cas-without-base": reconfiguration(
        "CAS_WITHOUT_BASE", rule="§6: the CAS succeeds only while ACTIVE is still base", violates="both successors"
    ),
}  # fmt: skip
SETTINGS = WHOLE | BROKEN


def tool(arguments: Sequence[str], directory: Path) -> str:
    """The standard output of one step. Raises CheckerError where it fails, or where its program is not there."""
    if arguments[0] in TOOLS and shutil.which(arguments[0]) is None:
        raise CheckerError(f"{arguments[0]} is not installed: the models cannot be checked\n  next: as root, {INSTALL}")
    done = subprocess.run(arguments, cwd=directory, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise CheckerError(f"{' '.join(arguments)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise CheckerError(f"pan's report has no line like {pattern!r}:\n{text}")
    return float(found[1])


def check(setting: Setting, directory: Path) -> Result:
    """Search all executions of the setting; `directory` (empty) takes the files of the tools.

    Where a violation must be found, the search ends with one. Raises CheckerError where the search was
    cut off.
    """
    source = f"{setting.model}.pml"
    shutil.copy(MODELS / source, directory)
    defines = [f"-D{define}" for define in setting.defines]
    tool(["spin", "-a", *defines, source], directory)
    # All of a step is one action on shared state: partial-order reduction finds nothing to leave out.
    options = ["-w", "-DSAFETY", "-DNOREDUCE", f"-DMEMLIM={MEMORY_LIMIT_MIB}"]
    if not setting.violates:
        build, search = ["-O1"], [f"-m{DEPTH_LIMIT}", "-w22"]
    elif setting.depth:
        # -DREVERSE only changes the order of the search: in this one the violations come early.
        build, search = ["-O0", "-DREVERSE"], [f"-m{setting.depth}", "-w20"]
    else:
        # -DREACH: an execution that meets a known state sooner is followed again, so that -i really finds the shortest.
        build, search = ["-O0", "-DREACH"], [f"-m{DEPTH_LIMIT}", "-w18", "-i"]
    tool(["gcc", *build, *options, "-o", "pan", "pan.c"], directory)
    report = tool(["./pan", "-n", *search], directory)
    cut_off = re.search("max search depth too small|Search not completed", report)
    if cut_off and not setting.violates and "assertion violated" not in report:
        raise CheckerError(f"the search was cut off:\n{report}")
    trail = tool(["spin", "-t", "-T", *defines, source], directory) if (directory / f"{source}.trail").exists() else ""
    return Result(
        errors=int(number(r"errors: (\d+)", report)),
        states=int(number(r"(\d+) states, stored", report)),
        seconds=number(r"elapsed time ([\d.e+-]+) seconds", report),
        memory_mib=number(r"([\d.]+)\s+total actual memory usage", report),
        # Spin warns first where a coarse clock makes the model look newer than its trail; what it says at the end goes.
        trail=re.split("^spin: (?!warning)", trail, maxsplit=1, flags=re.MULTILINE)[0],
    )


def main(names: Sequence[str]) -> int:
    if not names:
        for name, setting in SETTINGS.items():
            print(f"{name:28}{setting.rule or 'all rules on: ' + setting.model + ' ' + ' '.join(setting.defines)}")
        return 0
    unknown = set(names) - SETTINGS.keys()
    if unknown:
        print(f"no such setting: {', '.join(sorted(unknown))}\n  next: python -m tests.model.spin", file=sys.stderr)
        return 2
    for name in names:
        setting = SETTINGS[name]
        with tempfile.TemporaryDirectory() as directory:
            try:
                result = check(setting, Path(directory))
            except CheckerError as error:
                print(error, file=sys.stderr)
                return 1
        print(f"{name}: {f'left out: {setting.rule}' if setting.rule else 'all rules on'}")
        print(f"{result.states} states, {result.seconds} s, {result.memory_mib:.0f} MiB, {result.errors} errors")
        print(result.trail, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
