"""What goes wrong in a simulated run, and how often. A profile is data; `plan.py` draws from it and a seed."""

import random
from dataclasses import dataclass, replace

from cloudfit_orchestrator.testing.network import Weather

CALM = Weather()
DROPS = Weather(drop=0.05)
DELAYS = Weather(jitter_s=0.02, late=0.02, late_s=2.0)
REORDERS = Weather(delay_s=0.0005, jitter_s=0.03, duplicate=0.1)
STORM = Weather(drop=0.03, duplicate=0.05, jitter_s=0.01, late=0.01, late_s=1.5)
MIXED, PUPPETS, READS = "mixed", "puppets", "reads"
DRAWN = (MIXED, PUPPETS, READS)  # each seed draws its own profile


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates are per virtual second of the group; 0 never."""

    weather: Weather = CALM
    crashes: float = 0.0  # of some machine, which starts again
    boot_s: float = 0.3  # mean of how long it is off
    partitions: float = 0.0  # some of them in one direction only
    partition_s: float = 1.0
    freezes: float = 0.0  # of a wormhole's epoch, in the middle of whatever is pipelined; then it is thawed
    freeze_s: float = 0.4
    clocks: float = 0.0  # that stop, crawl or race for a while
    clock_s: float = 1.5
    lapses: int = 0  # wormholes that lose their keys, or whose lease ends; disks that are lost: each counts in f
    byzantine: bool = False  # f machines (less the lapses) are taken over from the beginning
    attacks: str = ""  # of whoever is taken, by plus signs; empty: the seed chooses
    replacements: int = 0  # machines replaced by reconfiguration, one after the other
    staged: bool = False  # replacements go by stages: RETIRE, freeze, EPOCH-END vote, exporter of the old disk
    reshapes: int = 0  # reconfigurations to other parameters, or the other algorithm
    mobile: bool = False  # after each replacement another machine is taken over
    rogues: int = 0  # Byzantine clients
    trouble_s: float = 12.0  # virtual seconds of all this; then the network heals and all correct machines run
    clients: int = 3
    operations: int = 40  # of each client
    busy: int = 12  # the load is multiplied by 1, by so much or by something between
    keys: int = 3
    reads: float = 0.0  # share of turns in which a client reads without ordering


PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "drop": Profile(weather=DROPS),
    "delay": Profile(weather=DELAYS),
    "reorder": Profile(weather=REORDERS),
    "crash": Profile(crashes=0.5),
    "partition": Profile(partitions=0.3),
    "freeze": Profile(freezes=0.5, weather=DROPS),
    "clock": Profile(clocks=0.4, weather=DROPS),
    "lapse": Profile(lapses=1, replacements=1, weather=DROPS),
    "byzantine": Profile(byzantine=True),
    "rogue": Profile(rogues=2, byzantine=True),
    "replace": Profile(replacements=2),
    "stages": Profile(replacements=3, staged=True, byzantine=True, mobile=True, trouble_s=18.0),
    "reshape": Profile(reshapes=2, crashes=0.1),
    "replace-crash": Profile(replacements=2, crashes=0.3, weather=DROPS),
    "chaos": Profile(weather=STORM, crashes=0.3, partitions=0.1, byzantine=True),
    "mobile": Profile(byzantine=True, replacements=3, mobile=True, trouble_s=18.0),
    "all": Profile(
        weather=STORM, crashes=0.2, partitions=0.1, byzantine=True, replacements=3, mobile=True, trouble_s=18.0
    ),
    MIXED: Profile(),  # each seed draws its own: see `mixed`
    PUPPETS: Profile(),  # the same, under the strongest adversary
    READS: Profile(),  # the same, with reads that are not ordered, some of them answered from a state of long ago
}


def mixed(rng: random.Random) -> Profile:
    """A short run of a little of everything: many of them see more pairs of troubles than few long ones."""
    few = rng.choice([0, 0, 1, 1, 2])
    return Profile(
        weather=rng.choice([CALM, CALM, DROPS, DELAYS, REORDERS, STORM]),
        crashes=rng.choice([0.0, 0.0, 0.5, 1.0]),
        boot_s=rng.choice([0.05, 0.3]),
        partitions=rng.choice([0.0, 0.0, 0.4]),
        partition_s=0.6,
        freezes=rng.choice([0.0, 0.0, 0.5]),
        freeze_s=rng.choice([0.05, 0.4]),
        clocks=rng.choice([0.0, 0.0, 0.0, 0.4]),
        lapses=rng.choice([0, 0, 0, 0, 1]),
        byzantine=rng.random() < 0.8,
        replacements=few,
        staged=rng.random() < 0.6,
        reshapes=rng.choice([0, 0, 0, 0, 1]),
        mobile=rng.random() < 0.6,
        rogues=rng.choice([0, 0, 0, 1]),
        trouble_s=3.0 + 2.0 * few,
        clients=rng.choice([1, 2, 3]),
        operations=rng.choice([4, 8]),
        busy=rng.choice([1, 4, 8]),
        keys=2,
    )


def profile_of(name: str, rng: random.Random, changes: dict[str, object]) -> Profile:
    """The profile of that name, with some fields changed; `rng` draws what a seed draws for itself."""
    profile = mixed(rng) if name in DRAWN else PROFILES[name]
    if name == PUPPETS:
        profile = replace(profile, byzantine=True, attacks="puppet", lapses=0, clocks=0.0, operations=8, busy=4)
    if name == READS:  # all members must answer equally (R = n where writers wait for f+1), so few may be faulty
        lies = rng.random() < 0.4
        attacks = rng.choice(["old-reads", "old-reads+delays"])
        profile = replace(profile, reads=0.6, byzantine=lies, attacks=attacks, lapses=0, operations=12, keys=1)
    return replace(profile, **changes)  # type: ignore[arg-type]  # names and types are checked where they come in
