"""Regions far apart: their delays, who is where, and the least latency that the algorithm can have there."""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from cloudfit_orchestrator.bench.processes import LOOPBACK, Worker
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.quorum import quorums

MAX_REGIONS = 16
PROXY_S = 10.0  # it answers within milliseconds
MAX_DELAY_MS = 2000.0  # beyond a connection's own time-outs nothing but those would be measured
_PAIR = re.compile(r"([a-z][a-z0-9]*)-([a-z][a-z0-9]*):(\d+(?:\.\d+)?)ms")


@dataclass(frozen=True)
class Wan:
    """Replica i is in region i modulo their number. `delays_ms`: one way, the same in both directions, by pair."""

    regions: tuple[str, ...]
    delays_ms: dict[frozenset[str], float]
    n: int

    @classmethod
    def parse(cls, text: str, n: int) -> "Wan":
        """`a-b:20ms,a-c:35ms,b-c:50ms` for n replicas. Raises BadInputError unless each pair is there once."""
        delays: dict[frozenset[str], float] = {}
        names: dict[str, None] = {}
        for part in text.split(","):
            match = _PAIR.fullmatch(part.strip())
            if match is None or match[1] == match[2] or float(match[3]) > MAX_DELAY_MS:
                raise BadInputError(
                    f"delay {part!r} is none: two regions and at most {MAX_DELAY_MS:.0f} ms, as in a-b:20ms",
                    next_command="--wan a-b:20ms,a-c:35ms,b-c:50ms",
                )
            pair = frozenset(match.group(1, 2))
            if pair in delays:
                raise BadInputError(f"the delay between {match[1]} and {match[2]} is given twice")
            delays[pair] = float(match[3])
            names |= dict.fromkeys(match.group(1, 2))
        regions = tuple(sorted(names))
        missing = [f"{a}-{b}" for a, b in combinations(regions, 2) if frozenset((a, b)) not in delays]
        if missing:
            raise BadInputError(f"no delay is given for {', '.join(missing)}")
        if not len(regions) <= min(n, MAX_REGIONS):
            raise BadInputError(f"{len(regions)} regions need as many replicas, n is {n}", next_command="a larger -n")
        return cls(regions, delays, n)

    def region_of(self, replica: int) -> str:
        """Where replica number `replica` is."""
        return self.regions[replica % len(self.regions)]

    def delay_ms(self, a: str, b: str) -> float:
        """One way from region a to region b; 0 inside one."""
        return 0.0 if a == b else self.delays_ms[frozenset((a, b))]

    @property
    def farthest(self) -> str:
        """The replica whose delays to all others add up to most."""
        far = {
            i: sum(self.delay_ms(self.region_of(i), self.region_of(j)) for j in range(self.n)) for i in range(self.n)
        }
        return f"r{max(far, key=lambda i: far[i])}"

    @cached_property
    def nearest(self) -> dict[str, int]:
        """The replica that clients of a region ask first: the first one there."""
        return {region: i for i, region in enumerate(self.regions)}


def bound_ms(wan: Wan, region: str, algorithm: str) -> float:
    """The least time in ms from a client's request to its answer, with delays d(·,·) and computing for free.

    With x the client's region, i its nearest replica, p the proposer, Qc the commit quorum:
    1. the request reaches i at d(x,i), and p at d(x,i) + d(i,p). EBAWA: p = i, each replica proposes for the clients
       near it. MinBFT: p is the leader, r0 in view 0.
    2. p's PREPARE is its vote, and reaches j at d(p,j). Each j ≠ p votes to all at once: its COMMIT, which carries the
       PREPARE's header, reaches k at d(p,j) + d(j,k) (j = k: d(p,k), the own vote).
    3. k decides when it has Qc votes and the batch, which p sent: max(d(p,k), the (Qc-1)th smallest of step 2 over
       j ≠ p).
    4. k's reply reaches the client d(k,x) later; f+1 equal replies are an answer: the (f+1)th smallest over all k.
    Slots are executed in order. That is what a request pays whose earlier slots are all decided by then; a request to
    EBAWA pays `rotation_ms` instead when the other proposers have nothing of their own to propose.
    """
    return _answered(wan, region, algorithm, rotation=False)


def rotation_ms(wan: Wan, region: str) -> float:
    """As `bound_ms` for EBAWA, while the other proposers are idle: a slot waits for the SKIPs of those before it.

    Replica j skips its own slots when it sees the PREPARE, at d(x,i) + d(i,j). A SKIP is decided like a PREPARE: at k
    with Qc votes, j's own among them: the (Qc-1)th smallest over m ≠ j of d(j,m) + d(m,k), and not before it is there,
    d(j,k). k executes when the slot and the SKIPs of all other proposers are decided.
    """
    return _answered(wan, region, "ebawa", rotation=True)


def _answered(wan: Wan, region: str, algorithm: str, *, rotation: bool) -> float:
    everyone = range(wan.n)
    f = (wan.n - 1) // 2
    votes = quorums(wan.n, f, 0).commit - 1  # besides the proposer's

    def d(a: int, b: int) -> float:
        return wan.delay_ms(wan.region_of(a), wan.region_of(b))

    def decided(p: int, k: int) -> float:
        """At k, after p sent its proposal."""
        others = sorted(d(p, j) + d(j, k) for j in everyone if j != p)
        return max(d(p, k), others[votes - 1]) if votes else d(p, k)

    near = wan.nearest[region]
    proposer = near if algorithm == "ebawa" else 0
    proposed = wan.delay_ms(region, wan.region_of(near)) + d(near, proposer)
    answers = []
    for k in everyone:
        done = proposed + decided(proposer, k)
        if rotation:
            done = max(done, *(proposed + d(proposer, j) + decided(j, k) for j in everyone))
        answers.append(done + wan.delay_ms(wan.region_of(k), region))
    return round(sorted(answers)[f], 3)


class Proxies:
    """A delay proxy's addresses: one for each pair of replicas, and for each region of clients and replica."""

    def __init__(self, wan: Wan, ports: list[int]) -> None:
        """`ports`: at least `ports_needed` free ones."""
        free = iter(ports)
        self.routes: list[dict[str, object]] = []
        self.replicas: dict[str, dict[str, str]] = {}  # replica -> replica -> address
        self.clients: dict[str, dict[str, str]] = {}  # region -> replica -> address
        for i in range(wan.n):
            here = wan.region_of(i)
            self.replicas[f"r{i}"] = {
                f"r{j}": self._route(next(free), j, wan.delay_ms(here, wan.region_of(j)))
                for j in range(wan.n)
                if wan.delay_ms(here, wan.region_of(j))
            }
        for region in wan.regions:
            self.clients[region] = {
                f"r{j}": self._route(next(free), j, wan.delay_ms(region, wan.region_of(j)))
                for j in range(wan.n)
                if wan.delay_ms(region, wan.region_of(j))
            }

    @staticmethod
    def ports_needed(wan: Wan) -> int:
        """At most so many."""
        return wan.n * (wan.n + len(wan.regions))

    def _route(self, port: int, replica: int, delay_ms: float) -> str:
        self.routes.append({"listen": port, "to": f"r{replica}", "delay_s": delay_ms / 1000})
        return f"{LOOPBACK}:{port}"


def launch_target(proxy: Worker, replica: str, address: str) -> None:
    """Tell the proxy where a replica really listens. Raises UnknownError if it does not take it."""
    proxy.ask({"targets": {replica: address}}, PROXY_S)
