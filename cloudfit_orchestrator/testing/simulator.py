"""Deterministic simulation of a replica group: real cores, services and stores; virtual network, disks, clock.

`simulate` runs one seed and checks it. What is checked: correct replicas agree on every checkpoint; nothing is executed
twice; the clients' history is linearizable; no correct replica calls another one a liar; what is kept stays bounded;
and after the network has healed every client gets its answers within `LIVENESS_S`.

A failed run prints the command that replays it, event by event.
"""

import argparse
import hashlib
import random
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cloudfit_orchestrator.bft.effects import Effect, Send, Sign
from cloudfit_orchestrator.model.errors import UnknownError
from cloudfit_orchestrator.model.quorum import quorums
from cloudfit_orchestrator.model.record import Algorithm, Client, ConfigRecord, Parameters
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.testing import behaviours
from cloudfit_orchestrator.testing.control import PRECOPY_S, SimController
from cloudfit_orchestrator.testing.crypto import KeyRing, Keys, RealKeys
from cloudfit_orchestrator.testing.history import History
from cloudfit_orchestrator.testing.machine import Behaviour, Identity, Machine
from cloudfit_orchestrator.testing.network import Network, Schedule
from cloudfit_orchestrator.testing.profiles import PROFILES
from cloudfit_orchestrator.testing.workload import OnceService, SimClient
from cloudfit_orchestrator.testing.wormhole import SimWormhole

GROUP = "simulated"
GENESIS_S = 10.0  # until the first configuration is ACTIVE
LIVENESS_S = 90.0  # after the healing, until all clients have their answers: some doubled time-outs
MAX_LOG_RECORDS = 4000  # of one machine: far above a few windows
MAX_SNAPSHOTS = 64  # kept on one disk: those of a second or two, until they are collected
TRACE_LINES = 400  # kept for the report
Changes = dict[str, Any]  # fields of a Profile


@dataclass(slots=True)
class Report:
    """What a run saw."""

    command: str
    failures: list[str] = field(default_factory=list)
    trace: deque[str] = field(default_factory=lambda: deque(maxlen=TRACE_LINES))
    fingerprint: str = ""  # of all events, in order: equal for equal runs
    answered: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    events: int = 0
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def __str__(self) -> str:
        if self.ok:
            figures = ", ".join(f"{name} {value}" for name, value in sorted(self.figures.items()))
            return (
                f"ok: {self.answered} operations in {self.virtual_s:.1f} virtual s, {self.real_s:.1f} s, "
                f"{self.events} events; {figures}"
            )
        return "\n".join(["FAILED:", *self.failures, "replay: " + self.command])


class FailedError(AssertionError):
    """A check failed in the middle of a run: going on would only bury it."""


class Simulation:
    """One run. Use `simulate`."""

    def __init__(self, seed: int, n: int, algorithm: Algorithm, name: str, *, keys: Keys, changes: Changes) -> None:
        """Machines, clients and controller, all off."""
        self.report_ = Report(
            f"python -m cloudfit_orchestrator.testing.simulator --seed {seed} --n {n} --algorithm {algorithm}"
            f" --profile {name}" + "".join(f" --set {field}={value}" for field, value in changes.items())
        )
        self.profile = profile = replace(PROFILES[name], **changes)
        self.schedule = Schedule()
        self._keys = keys
        self._rng = random.Random(f"{seed}/{n}/{algorithm}/{name}")
        self._hash = hashlib.sha256()
        self._n, self._f = n, (n - 1) // 2
        quorums(n, self._f, 0)
        self.network = Network(self.schedule, self._stream("network"), profile.weather)
        self._history = History()
        self._agreed: dict[tuple[int, Kind, int], tuple[bytes, str]] = {}
        self._trouble = False
        self._off: set[str] = set()  # machines that stay off
        self._replacing = False  # from the launch of a new machine until the one that it replaces is gone
        self._machines: dict[str, Machine] = {}
        signers = [keys.generate(self._stream(f"client {i}")) for i in range(profile.clients)]
        self.controller = SimController(
            self,
            group=GROUP,
            f=self._f,
            k=0,
            algorithm=algorithm,
            parameters=self._parameters(),
            clients=tuple(
                Client(f"client{i}", signer.public, b"certificate %d" % i) for i, signer in enumerate(signers)
            ),
            verifier=keys,
            rng=self._stream("controller"),
        )
        busy = self._stream("load").choice([1, 4, 12])  # a busy group has proposals in flight when something happens
        taken = self._stream("byzantine").sample(range(n), self._f) if profile.byzantine else []
        self._group = [self._launch(f"r{i}", i + 1, taken=i in taken) for i in range(n)]
        self._incarnation = n
        self._clients = {
            signer.public: SimClient(
                self,
                name=f"client{i}",
                key=signer,
                verifier=keys,
                history=self._history,
                rng=self._stream(f"work {i}"),
                keys=[b"key%d" % k for k in range(profile.keys)],
                operations=profile.operations * busy,
                pause_s=profile.trouble_s / profile.operations / busy**2,
            )
            for i, signer in enumerate(signers)
        }

    def _parameters(self) -> Parameters:
        rng = self._stream("parameters")
        period, window = rng.choice([(4, 16), (4, 16), (2, 8), (4, 4), (8, 24)])
        return Parameters(
            checkpoint_period=period,
            window=window,
            max_batch_requests=rng.choice([3, 8]),
            max_batch_bytes=1 << 16,
            client_window=64,
            progress_timeout_ms=rng.choice([1000, 200, 60, 25]),  # the short ones change views without a fault
        )

    def _stream(self, purpose: str) -> random.Random:
        """Randomness of its own for each purpose, so that a change in one place does not change all others."""
        return random.Random(self._rng.getrandbits(64) ^ int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8]))

    def _launch(self, replica: str, incarnation: int, *, taken: bool) -> Machine:
        rng = self._stream(f"{replica}#{incarnation}")
        behaviour: Behaviour | None = None
        lies = False
        if taken:
            behaviour = self._misbehave(f"{replica}#{incarnation}", rng)
            lies = rng.random() < 0.4
        identity = Identity(GROUP, replica, incarnation)
        machine = Machine(
            self,
            identity,
            service=lambda machine: OnceService(partial(self._twice, machine), lies=lies),
            controller_keys=[self.controller.public],
            verifier=self._keys,
            wormhole=SimWormhole(
                group=GROUP, replica=replica, keys=self._keys, controller_keys=[self.controller.public], rng=rng
            ),
            rng=rng,
            behaviour=behaviour,
        )
        self._machines[machine.name] = machine
        return machine

    def _misbehave(self, name: str, rng: random.Random) -> Behaviour:
        how, behaviour = behaviours.choose(rng)
        self.trace(name, f"is Byzantine: {how}")
        return behaviour

    # -------------------------------------------------------------------------------------------------------- the run
    def run(self) -> Report:
        """Everything, with the checks."""
        started = time.monotonic()
        try:
            self._run()
            self._check()
        except FailedError as failure:
            self._fail(str(failure))
        except Exception:  # noqa: BLE001  the boundary: whatever the core raises is a finding of this seed
            self._fail(traceback.format_exc())
        report = self.report_
        report.answered = sum(client.answered for client in self._clients.values())
        report.virtual_s = self.schedule.now_s()
        report.events = self.schedule.events
        report.real_s = time.monotonic() - started
        report.fingerprint = self._hash.hexdigest()
        self._figure("delivered", self.network.delivered)
        self._figure("boots", sum(machine.boots for machine in self._machines.values()))
        return report

    def _run(self) -> None:
        for machine in self._group:
            machine.start()
        self.controller.reconfigure(self._group)
        if not self.schedule.run(GENESIS_S, lambda: self.controller.active is not None):
            raise FailedError(f"the first configuration is not ACTIVE after {GENESIS_S} s")
        begin = self.schedule.now_s()
        self._trouble = True
        for client in self._clients.values():
            client.start()
        self._plan(self.profile.crashes, self._crash_some)
        self._plan(self.profile.partitions, self._part)
        for i in range(self.profile.replacements):
            self.schedule.after((i + 0.3) * self.profile.trouble_s / self.profile.replacements, self._replace_some)
        self.schedule.run(begin + self.profile.trouble_s, lambda: False)
        self._heal()
        self._finish("answers to all requests")
        for client in self._clients.values():
            client.read_all()
        self._finish("answers to a last read of each key")

    def _heal(self) -> None:
        self._trouble = False
        self.network.heal()
        self.network.weather = PROFILES["calm"].weather
        self.trace("world", "healed")
        for machine in self._group:
            if not machine.running and machine.name not in self._off:
                machine.start()

    def _finish(self, what: str) -> None:
        deadline = self.schedule.now_s() + LIVENESS_S
        done = self.schedule.run(
            deadline, lambda: all(c.idle for c in self._clients.values()) and not self.controller.busy
        )
        if not done:
            status = {m.name: (m.replica.status if m.replica is not None else "off") for m in self._group}
            raise FailedError(
                f"no {what} {LIVENESS_S:.0f} s after the healing: {self._history.pending} operations are open, "
                f"reconfiguration {'hangs' if self.controller.busy else 'is done'}; status {status}"
            )

    def _check(self) -> None:
        try:
            violation = self._history.check()
        except UnknownError as unknown:
            raise FailedError(str(unknown)) from unknown
        if violation is not None:
            raise FailedError(f"the history is not linearizable: {violation}")
        views = [m.replica.status.get("view", 0) for m in self._group if m.correct and m.replica is not None]
        self._figure("last view", max(views, default=0))
        for machine in self._group:
            records, snapshots = machine.disk.largest_records, len(machine.disk.snapshots)
            self._figure("largest log", max(records, self.report_.figures.get("largest log", 0)))
            if machine.correct and (records > MAX_LOG_RECORDS or snapshots > MAX_SNAPSHOTS):
                raise FailedError(f"{machine.name} keeps {records} log records and {snapshots} snapshots")

    # ------------------------------------------------------------------------------------------------------- trouble
    def _plan(self, rate: float, action: Any) -> None:
        if rate <= 0:
            return
        rng = self._stream(f"trouble {action.__name__}")

        def happen() -> None:
            if self._trouble:
                action(rng)
                self.schedule.after(rng.expovariate(rate), happen)

        self.schedule.after(rng.expovariate(rate), happen)

    def _crash_some(self, rng: random.Random) -> None:
        running = [m for m in self._group if m.correct and m.running]
        if not running:
            return
        machine = rng.choice(running)
        if rng.random() < 0.5:
            machine.crash()
        else:
            machine.crash_in_effects = rng.randint(1, 12)  # between an append, a certify and a send
        self._figure("crashes", 1 + self.report_.figures.get("crashes", 0))
        self._boot_later(machine, 0.02 + rng.expovariate(1 / self.profile.boot_s))

    def _boot_later(self, machine: Machine, delay_s: float) -> None:
        def boot() -> None:
            if not machine.running and machine in self._group and machine.name not in self._off:
                machine.start()
            elif machine.crash_in_effects is not None:
                self._boot_later(machine, 0.1)

        self.schedule.after(delay_s, boot)

    def _part(self, rng: random.Random) -> None:
        names = [m.identity.replica for m in self._group] + [c.name for c in self._clients.values()]
        rng.shuffle(names)
        cut = rng.randint(1, len(names) - 1)
        self.trace("world", f"partition {sorted(names[:cut])}")
        self.network.part([names[:cut]])
        self.schedule.after(rng.expovariate(1 / self.profile.partition_s), self.network.heal)

    def _replace_some(self) -> None:
        rng = self._stream("replace")
        if self.controller.busy or self._replacing:
            self.schedule.after(1.0, self._replace_some)
            return
        self._replacing = True
        taken = [m for m in self._group if not m.correct]
        old = rng.choice(taken or self._group)
        self._incarnation += 1
        new = self._launch(old.identity.replica, self._incarnation, taken=False)
        new.start()
        self.controller.introduce(new)
        self.schedule.after(rng.uniform(0, PRECOPY_S), lambda: self._switch(old, new))

    def _switch(self, old: Machine, new: Machine) -> None:
        if self.controller.busy:
            self.schedule.after(1.0, lambda: self._switch(old, new))
            return
        machines = [new if m is old else m for m in self._group]
        self._group.append(new)  # may crash and be parted from now on, like all others
        if self._stream("switch").random() < 0.3:
            old.crash()  # it was frozen and paused: its vote is not there
            self._off.add(old.name)
        self.controller.reconfigure(machines, lambda: self._switched(old, machines))

    def _switched(self, old: Machine, machines: list[Machine]) -> None:
        self.trace("world", f"{old.name} is gone")
        old.crash()
        self._replacing = False
        self._group = machines
        if self.profile.mobile and self._trouble and sum(not m.correct for m in machines) < self._f:
            # The adversary moves on. Who was faulty before counted in the configuration that has just been replaced.
            rng = self._stream("mobile")
            moved = rng.choice([m for m in machines if m.correct])
            moved.behaviour = self._misbehave(moved.name, rng)
        for machine in machines:
            if not machine.running and not self._trouble:
                machine.start()
        self._figure("replaced", 1 + self.report_.figures.get("replaced", 0))

    # ---------------------------------------------------------------------------- what machines, clients, agents ask
    def machine(self, peer_id: str) -> Machine:
        """See `Site`."""
        return self._machines[peer_id]

    def carry(self, machine: Machine, peer: str, body: bytes) -> None:
        """See `World`."""
        target = self._machines.get(peer)
        if target is not None:
            self.network.send(
                machine.identity.replica, target.identity.replica, lambda: target.receive(machine.name, body)
            )

    def answer(self, machine: Machine, client: bytes, body: bytes) -> None:
        """See `World`."""
        known = self._clients.get(client)
        if known is not None:
            replica = machine.identity.replica
            self.network.send(replica, known.name, lambda: known.receive(replica, body))

    def ask(self, client: SimClient, replica: str, body: bytes) -> None:
        """See `Reach`."""
        active = self.newest().member(replica)
        if active is not None:
            machine = self._machines[f"{replica}#{active.incarnation}"]
            self.network.send(client.name, replica, lambda: machine.from_client(client.key.public, body))

    def newest(self) -> ConfigRecord:
        """See `Reach`."""
        assert self.controller.active is not None
        return self.controller.active

    def report(self, machine: Machine, topic: str, body: dict[str, Any]) -> None:
        """See `World`."""
        self.trace(machine.name, f"report {topic} {body}")
        if topic == "liar" and machine.correct:
            accused = [m for m in self._machines.values() if m.identity.replica == body["replica"]]
            if all(m.correct for m in accused):
                raise FailedError(f"{machine.name} calls {body['replica']} a liar, which is correct: {body}")
        self.schedule.after(0.001, lambda: self.controller.report(machine, topic, body))

    def watch(self, machine: Machine, effect: Effect) -> None:
        """Agreement: correct replicas sign the same checkpoint and decision for the same slot."""
        if isinstance(effect, Send):
            return
        if isinstance(effect, Sign) and effect.kind in {Kind.CHECKPOINT, Kind.DECIDED}:
            slot, digest = LAYOUT[effect.kind].unpack(effect.body)
            self.trace(machine.name, f"{effect.kind.name} c={effect.c} slot={slot} {digest.hex()[:8]}")
            said, by = self._agreed.setdefault((effect.c, effect.kind, slot), (digest, machine.name))
            if said != digest:
                raise FailedError(
                    f"disagreement: {effect.kind.name} c={effect.c} slot {slot} is {said.hex()[:8]} for {by}, "
                    f"{digest.hex()[:8]} for {machine.name}"
                )

    def _twice(self, machine: Machine, name: bytes) -> None:
        if machine.correct:
            raise FailedError(f"{machine.name} executes operation {name.hex()} on a state that has it already")

    def trace(self, who: str, what: str) -> None:
        """See `World`."""
        line = f"{self.schedule.now_s():9.4f} {who:>10} {what}"
        self.report_.trace.append(line)
        self._hash.update(line.encode())

    def _fail(self, why: str) -> None:
        self.report_.failures.append(f"at {self.schedule.now_s():.4f} virtual s: {why}")

    def _figure(self, name: str, value: int) -> None:
        self.report_.figures[name] = value


def simulate(
    seed: int, n: int, algorithm: Algorithm, profile: str, *, real_keys: bool = False, changes: Changes | None = None
) -> Report:
    """Run one seed of `profile` (a name in PROFILES) with `n` replicas, of which (n-1)//2 may be faulty.

    `changes` of the profile's fields help to make a failed run smaller.
    """
    keys: Keys = RealKeys() if real_keys else KeyRing()
    return Simulation(seed, n, algorithm, profile, keys=keys, changes=changes or {}).run()


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    kind = type(getattr(PROFILES["calm"], name, None))
    if kind not in {int, float, bool}:
        raise argparse.ArgumentTypeError(f"{name} is no number in a profile")
    return name, kind(float(value))


def main(arguments: list[str] | None = None) -> int:
    """Run one seed, or `--seeds` of them, and say what was seen. Exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m cloudfit_orchestrator.testing.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --seed on")
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--algorithm", type=Algorithm, choices=list(Algorithm), default=Algorithm.EBAWA)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="chaos")
    parser.add_argument("--real-keys", action="store_true", help="Ed25519 in place of keyed hashes")
    parser.add_argument("--set", type=_change, action="append", default=[], metavar="FIELD=NUMBER", dest="changes")
    parser.add_argument("--trace", type=int, default=0, metavar="LINES", help="print the last lines of the trace")
    chosen = parser.parse_args(arguments)
    failed = 0
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        report = simulate(
            seed,
            chosen.n,
            chosen.algorithm,
            chosen.profile,
            real_keys=chosen.real_keys,
            changes=dict(chosen.changes),
        )
        if chosen.trace:
            print("\n".join(list(report.trace)[-chosen.trace :]))
        print(f"seed {seed}: {report}")
        failed += not report.ok
    if chosen.seeds > 1:
        print(f"{chosen.seeds - failed} of {chosen.seeds} runs passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
