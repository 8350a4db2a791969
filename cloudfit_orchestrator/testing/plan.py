"""The plan of a run: everything that a seed decides beforehand, as data, so that any part of it can be left out.

Each trouble has a name, `kind:number`, and each attack that a taken machine mounts one, `attack:NAME`. A run without
some of them differs from the whole run by just these: every purpose draws from a stream of randomness of its own.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import WITH_WORMHOLE, Algorithm, Parameters, quorums_of
from cloudfit_orchestrator.testing import behaviours
from cloudfit_orchestrator.testing.profiles import DRAWN, PUPPETS, Profile, profile_of

Changes = dict[str, Any]  # fields of a Profile
PERIODS_AND_WINDOWS = [(4, 16), (4, 16), (2, 8), (4, 4), (8, 24), (1, 1), (2, 2)]  # K and L, slots


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that happens `at_s` after the troubles begin, for a while, to some hosts. `draw` seeds the rest."""

    kind: str
    number: int
    at_s: float
    who: tuple[str, ...] = ()
    for_s: float = 0.0
    draw: int = 0

    @property
    def name(self) -> str:
        """What `--without` calls it."""
        return f"{self.kind}:{self.number}"

    def rng(self) -> random.Random:
        """Randomness of its own."""
        return random.Random(self.draw)


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one run. `taken`: who is Byzantine from the beginning, and how; `next_attacks`: whoever is taken later."""

    seed: int
    n: int
    f: int
    k: int
    algorithm: Algorithm
    name: str
    profile: Profile
    changes: Changes
    parameters: Parameters
    taken: dict[str, tuple[str, ...]]
    next_attacks: tuple[tuple[str, ...], ...]
    troubles: tuple[Trouble, ...]
    left_out: tuple[str, ...] = field(default=())

    def stream(self, purpose: str) -> random.Random:
        """Randomness for one purpose alone."""
        return random.Random(f"{self.seed}/{self.n}/{self.algorithm}/{self.name}/{purpose}")

    @property
    def names(self) -> list[str]:
        """Everything that can be left out."""
        attacks = {a for group in (*self.taken.values(), *self.next_attacks) for a in group}
        return [t.name for t in self.troubles] + [f"attack:{a}" for a in sorted(attacks)]

    @property
    def command(self) -> str:
        """What replays the run exactly."""
        words = [
            "python -m cloudfit_orchestrator.testing.simulator",
            f"--seed {self.seed} --n {self.n} --algorithm {self.algorithm} --profile {self.name}",
            *(f"--set {name}={value}" for name, value in self.changes.items()),
            *([f"--without {','.join(self.left_out)}"] if self.left_out else []),
        ]
        return " ".join(words)

    def without(self, names: Iterable[str]) -> "Plan":
        """The same plan, less some troubles and attacks. Raises BadInputError on a name that it does not have."""
        out = set(names)
        unknown = out - set(self.names)
        if unknown:
            raise BadInputError(
                f"the plan of seed {self.seed} has no {sorted(unknown)}", next_command=f"choose among {self.names}"
            )

        def rest(attacks: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(a for a in attacks if f"attack:{a}" not in out)

        return replace(
            self,
            taken={replica: rest(attacks) for replica, attacks in self.taken.items()},
            next_attacks=tuple(rest(attacks) for attacks in self.next_attacks),
            troubles=tuple(t for t in self.troubles if t.name not in out),
            left_out=tuple(n for n in self.names if n in out),
        )


def most_faults(algorithm: str, n: int) -> int:
    """The largest f of n members."""
    return (n - 1) // (2 if algorithm in WITH_WORMHOLE else 3)


def rows(n: int, algorithm: str) -> list[tuple[int, int]]:
    """(f, k) of the rows of protocol §1 that n members make exactly."""
    if algorithm not in WITH_WORMHOLE:
        found = [(f, k) for f in range(1, n) for k in range(n) if n == 3 * f + 2 * k + 1]
        return found or [(most_faults(algorithm, n), 0)]
    found = [
        (f, k)
        for f in range(1, n)
        for k in range(n)
        if n in ((2 * f + k + 1, 2 * f + 2 * k + 1) if k else (2 * f + 1,))
    ]
    return found or [(most_faults(algorithm, n), 0)]


def draw(seed: int, n: int, algorithm: Algorithm, name: str, changes: Changes | None = None) -> Plan:
    """The plan of a seed. Raises BadInputError if n is too small for anything."""

    def stream(purpose: str) -> random.Random:
        return random.Random(f"{seed}/{n}/{algorithm}/{name}/{purpose}")

    if n < 2:
        raise BadInputError(f"a group of {n} tolerates nothing", next_command="simulate 3 replicas or more")
    changes = changes or {}
    f, k = stream("row").choice(rows(n, algorithm)) if name in DRAWN else (most_faults(algorithm, n), 0)
    quorums_of(algorithm, n, f, k)
    profile = profile_of(name, stream("profile"), changes)
    replicas = [f"r{i}" for i in range(n)]
    lapses = min(profile.lapses, f)
    shuffled = stream("byzantine").sample(replicas, n)
    taken = shuffled[: f - lapses] if profile.byzantine else []
    attacks = stream("attacks")
    fixed = tuple(profile.attacks.split("+")) if profile.attacks else ()
    if name == PUPPETS and algorithm not in WITH_WORMHOLE:
        fixed = ()  # puppets speak in streams
    if not set(fixed) <= behaviours.EVERY.keys():
        known = ", ".join(sorted(behaviours.EVERY))
        raise BadInputError(f"{profile.attacks} is not all attacks", next_command=f"choose among {known}")
    return Plan(
        seed=seed,
        n=n,
        f=f,
        k=k,
        algorithm=algorithm,
        name=name,
        profile=profile,
        changes=changes,
        parameters=parameters(stream("parameters")),
        taken={replica: fixed or behaviours.choose(attacks, algorithm) for replica in taken},
        next_attacks=tuple(
            fixed or behaviours.choose(attacks, algorithm) for _ in range(profile.replacements if profile.mobile else 0)
        ),
        troubles=tuple(_troubles(stream, profile, replicas, taken, shuffled[::-1][:lapses])),
    )


def parameters(rng: random.Random) -> Parameters:
    """Small windows, so that certificates, truncation and full windows happen all the time."""
    period, window = rng.choice(PERIODS_AND_WINDOWS)
    return Parameters(
        checkpoint_period=period,
        window=window,
        max_batch_requests=rng.choice([3, 8]),
        max_batch_bytes=1 << 16,
        client_window=64,
        progress_timeout_ms=rng.choice([1000, 200, 60, 25]),  # the short ones change views without a fault
    )


def _troubles(
    stream: Callable[[str], random.Random],
    profile: Profile,
    replicas: list[str],
    taken: list[str],
    lapsing: list[str],
) -> list[Trouble]:
    clients = [f"client{i}" for i in range(profile.clients)]
    found: list[Trouble] = []

    def at_rate(kind: str, rate: float, mean_s: float, hosts: list[str]) -> None:
        rng = stream(kind)
        at_s = rng.expovariate(rate) if rate > 0 else profile.trouble_s
        number = 0
        while at_s < profile.trouble_s:
            number += 1
            who = rng.sample(hosts, rng.randint(1, len(hosts) - 1) if kind == "partition" else 1)
            found.append(
                Trouble(kind, number, at_s, tuple(sorted(who)), rng.expovariate(1 / mean_s), rng.getrandbits(32))
            )
            at_s += rng.expovariate(rate)

    at_rate("crash", profile.crashes, profile.boot_s, replicas)
    at_rate("partition", profile.partitions, profile.partition_s, replicas + clients)
    at_rate("freeze", profile.freezes, profile.freeze_s, replicas)
    at_rate("clock", profile.clocks, profile.clock_s, replicas)
    rng = stream("rest")
    for number, replica in enumerate(lapsing, 1):
        at_s = rng.uniform(0, 0.3) * profile.trouble_s
        found.append(Trouble("lapse", number, at_s, (replica,), 0.0, rng.getrandbits(32)))
    # Who lapsed is replaced first, then who was taken: so the group gets its fault budget back.
    preferred = [*lapsing, *taken]
    for i in range(max(profile.replacements, len(lapsing))):
        at_s = (i + 0.3) * profile.trouble_s / profile.replacements if profile.replacements else profile.trouble_s
        who = preferred[i : i + 1] if i < len(lapsing) or rng.random() < 0.7 else [rng.choice(replicas)]
        found.append(Trouble("replace", i + 1, at_s, tuple(who), 0.0, rng.getrandbits(32)))
    counts = {"reshape": (profile.reshapes, 1.0), "rogue": (profile.rogues, 0.3)}
    found += [
        Trouble(kind, i + 1, rng.uniform(0, until) * profile.trouble_s, (), 0.0, rng.getrandbits(32))
        for kind, (count, until) in counts.items()
        for i in range(count)
    ]
    return sorted(found, key=lambda trouble: (trouble.at_s, trouble.name))
