"""Deterministic simulation of a replica group: real cores, services and stores; virtual network, disks, clock.

`simulate` runs one seed and checks it (`checks.py` says what). A failed run prints the command that replays it, event
by event; `campaign.py` runs many seeds, `shrink.py` makes a failed run small.
"""

import argparse
import gc
import hashlib
import random
import sys
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cloudfit_orchestrator.bft.effects import Effect, Send
from cloudfit_orchestrator.bft.ordering import AgreementError
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.model.errors import CloudfitError
from cloudfit_orchestrator.model.record import Algorithm, Client, ConfigRecord
from cloudfit_orchestrator.model.statement import Kind
from cloudfit_orchestrator.testing import behaviours
from cloudfit_orchestrator.testing.behaviours import Done
from cloudfit_orchestrator.testing.checks import Checks, FailedError
from cloudfit_orchestrator.testing.control import SimController
from cloudfit_orchestrator.testing.crypto import KeyRing, Keys, RealKeys
from cloudfit_orchestrator.testing.exporter import SimExporter
from cloudfit_orchestrator.testing.machine import Identity, Machine
from cloudfit_orchestrator.testing.network import Network, Schedule
from cloudfit_orchestrator.testing.plan import Changes, Plan, draw
from cloudfit_orchestrator.testing.profiles import CALM, PROFILES
from cloudfit_orchestrator.testing.troubles import Troubles
from cloudfit_orchestrator.testing.workload import OnceService, Reading, SimClient, waiting_s
from cloudfit_orchestrator.testing.wormhole import SimWormhole

GROUP = "simulated"
GENESIS_S = 10.0  # until the first configuration is ACTIVE
LIVENESS_S = 90.0  # after the healing, until all clients have their answers: some doubled time-outs; retries besides
TRACE_LINES = 400  # kept for the report
YOUNG_OBJECTS = 50_000  # made before Python looks for dead cycles: cores make few, and looking cost a tenth of a run
MAX_EVENTS = 2_000_000  # of one run: a storm that goes on for ever is a failure, not a slow run


@dataclass(slots=True)
class Report:
    """What a run saw."""

    command: str
    failures: list[str] = field(default_factory=list)
    kind: str = ""  # of the first failure: what the shrinker keeps
    trace: deque[str] = field(default_factory=lambda: deque(maxlen=TRACE_LINES))
    fingerprint: str = ""  # of the trace and the times of all events, in order: equal for equal runs
    answered: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    events: int = 0
    figures: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)  # attacks, faults, rules' branches

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.failures

    def __str__(self) -> str:
        if self.ok:
            figures = ", ".join(f"{name} {value}" for name, value in sorted(self.figures.items()))
            return (
                f"ok: {self.answered} operations in {self.virtual_s:.1f} virtual s, {self.real_s:.2f} s, "
                f"{self.events} events; {figures}"
            )
        return "\n".join([f"FAILED ({self.kind}):", *self.failures, "replay: " + self.command])


class Simulation:
    """One run. Use `simulate`."""

    def __init__(self, plan: Plan, keys: Keys) -> None:
        """Machines, clients and controller, all off."""
        self.plan = plan
        self.report_ = Report(plan.command)
        self.schedule = Schedule()
        self._keys = keys
        self._hash = hashlib.sha256()
        profile = plan.profile
        self.network = Network(self.schedule, plan.stream, profile.weather)
        self.in_trouble = False
        self.machines: dict[str, Machine] = {}
        self.exporters: dict[str, SimExporter] = {}
        signers = [keys.generate(plan.stream(f"client {i}")) for i in range(profile.clients + profile.rogues)]
        self.controller = SimController(
            self,
            group=GROUP,
            f=plan.f,
            k=plan.k,
            algorithm=plan.algorithm,
            parameters=plan.parameters,
            clients=tuple(
                Client(f"client{i}", signer.public, b"certificate %d" % i) for i, signer in enumerate(signers)
            ),
            verifier=keys,
            rng=plan.stream("controller"),
        )
        self.checks = Checks(self, verifier=keys, controllers=[self.controller.public])
        self._incarnation = 0
        self.group: list[Machine] = []
        self.troubles = Troubles(self, signers[profile.clients :])
        for i in range(plan.n):
            self.group.append(self.launch(f"r{i}", taken=plan.taken.get(f"r{i}")))
        busy = plan.stream("load").choice([1, max(1, profile.busy // 3), profile.busy])
        self.clients = {
            signer.public: SimClient(
                self,
                name=f"client{i}",
                key=signer,
                verifier=keys,
                history=self.checks.history,
                rng=plan.stream(f"work {i}"),
                keys=[b"key%d" % k for k in range(profile.keys)],
                operations=profile.operations * busy,
                pause_s=profile.trouble_s / profile.operations / busy**2,
                reading=Reading(plan.stream(f"reads {i}"), profile.reads),
            )
            for i, signer in enumerate(signers[: profile.clients])
        }

    # ------------------------------------------------------------------------------------------------------ machines
    def launch(self, replica: str, *, taken: tuple[str, ...] | None = None) -> Machine:
        """A new machine, off. `taken`: the attacks that it mounts; None if it is correct."""
        self._incarnation += 1
        incarnation = self._incarnation
        rng = self.plan.stream(f"{replica}#{incarnation}")
        machine = Machine(
            self,
            Identity(GROUP, replica, incarnation),
            service=self._service,
            controller_keys=[self.controller.public],
            verifier=self._keys,
            wormhole=SimWormhole(
                group=GROUP, replica=replica, keys=self._keys, controller_keys=[self.controller.public], rng=rng
            ),
            rng=rng,
        )
        machine.wormhole.certified = partial(self.checks.observer.certified, replica)

        def signed(c: int, kind: Kind, body: bytes, signature: bytes) -> None:
            self.checks.observer.signed(replica, c, kind, body, signature, correct=machine.correct)

        machine.wormhole.signed = signed
        self.machines[machine.name] = machine
        if taken is not None:
            self.take_over(machine, taken)
        return machine

    def take_over(self, machine: Machine, attacks: tuple[str, ...]) -> None:
        """From now on the machine is Byzantine."""
        self.trace(machine.name, f"is Byzantine: {'+'.join(attacks)}")
        rng = self.plan.stream(f"attack {machine.name}")
        machine.behaviour = behaviours.together(attacks, rng, partial(self._acted, machine))
        machine.lies = rng.random() < 0.4

    def _service(self, machine: Machine) -> OnceService:
        return OnceService(partial(self.checks.executed, machine), lies=lambda: machine.lies)

    def _acted(self, machine: Machine, attack: str, effect: Effect, done: Done) -> None:
        """An attack is effective when a correct replica gets something of it, or lacks something through it."""
        for _, one in done:
            if isinstance(one, Send) and one != effect:
                machine.marked[one.body] = attack
        if not isinstance(effect, Send) or not any(one == effect and not late for late, one in done):
            self.happened(f"attack:{attack}")

    # -------------------------------------------------------------------------------------------------------- the run
    def run(self) -> Report:
        """Everything, with the checks."""
        started = time.monotonic()
        try:
            self._run()
            self.checks.final()
        except FailedError as failure:
            self._fail(failure.kind, str(failure))
        except Exception as error:  # noqa: BLE001  the boundary: whatever the core raises is a finding of this seed
            self._fail(type(error).__name__, traceback.format_exc())
        report = self.report_
        report.answered = sum(client.answered for client in self.clients.values())
        report.figures["unordered"] = sum(client.unordered for client in self.clients.values())
        report.virtual_s = self.schedule.now_s()
        report.events = self.schedule.events
        report.real_s = time.monotonic() - started
        self._hash.update(str(self.schedule.mark).encode())
        report.fingerprint = self._hash.hexdigest()
        report.figures["delivered"] = self.network.delivered
        report.figures["boots"] = sum(machine.boots for machine in self.machines.values())
        return report

    def _run(self) -> None:
        for machine in self.group:
            machine.start()
        self.controller.reconfigure(self.group)
        if not self.schedule.run(GENESIS_S, lambda: self.controller.active is not None):
            raise FailedError("liveness", f"the first configuration is not ACTIVE after {GENESIS_S} s")
        begin = self.schedule.now_s()
        self.in_trouble = True
        for client in self.clients.values():
            client.start()
        self.troubles.begin()
        self.schedule.run(begin + self.plan.profile.trouble_s, self.checks.sample)
        self.in_trouble = False
        self.network.heal()
        self.network.weather = CALM
        self.trace("world", "healed")
        self.troubles.heal()
        self._finish("answers to all requests")
        for client in self.clients.values():
            client.read_all()
        self._finish("answers to a last read of each key")

    def _finish(self, what: str) -> None:
        left = max(client.left for client in self.clients.values())
        within_s = LIVENESS_S + waiting_s(left, len(self.troubles.faulty) / len(self.group))
        deadline = self.schedule.now_s() + within_s

        def done() -> bool:
            self.checks.sample()
            if self.schedule.events > MAX_EVENTS:
                raise FailedError("storm", f"more than {MAX_EVENTS} events")
            return all(c.idle for c in self.clients.values()) and not self.troubles.busy

        if not self.schedule.run(deadline, done):
            status = {m.name: (m.replica.status if m.replica is not None else "off") for m in self.group}
            raise FailedError(
                "liveness",
                f"no {what} {within_s:.0f} s after the healing: {self.checks.history.pending} operations are open, "
                f"reconfiguration {'hangs' if self.troubles.busy else 'is done'}; status {status}",
            )

    # ---------------------------------------------------------------------------- what machines, clients, agents ask
    def machine(self, peer_id: str) -> Machine:
        """See `Site`."""
        return self.machines[peer_id]

    def activated(self, record: ConfigRecord, envelope: bytes) -> None:
        """See `Site`."""
        self.checks.activated(record, envelope)

    def carry(self, machine: Machine, peer: str, body: bytes) -> None:
        """See `World`."""
        target = self.machines.get(peer)
        source = machine.identity.replica
        if target is not None:
            attack = machine.marked.get(body) if machine.marked else None

            def deliver() -> None:
                if attack is not None and target.correct and target.running:
                    self.happened(f"attack:{attack}")
                target.receive(machine.name, body)

            self.network.send(source, target.identity.replica, deliver)
        elif peer in self.exporters:
            exporter = self.exporters[peer]
            self.network.send(source, peer, lambda: self._export(exporter, machine, body))

    def _export(self, exporter: SimExporter, learner: Machine, body: bytes) -> None:
        for number, answer in enumerate(exporter.answer(body)):
            send = partial(self.network.send, exporter.name, learner.identity.replica)
            deliver = partial(learner.receive, exporter.name, answer)
            if exporter.pause_s and number:
                self.schedule.after(number * exporter.pause_s, partial(send, deliver))
            else:
                send(deliver)

    def answer(self, machine: Machine, client: bytes, body: bytes) -> None:
        """See `World`."""
        known = self.clients.get(client)
        if known is not None:
            replica = machine.identity.replica
            self.network.send(replica, known.name, lambda: known.receive(replica, body))

    def ask(self, client: str, key: bytes, replica: str, body: bytes) -> None:
        """See `Reach`."""
        active = self.newest().member(replica)
        if active is not None:
            machine = self.machines[f"{replica}#{active.incarnation}"]
            self.network.send(client, replica, lambda: machine.from_client(key, body))

    def newest(self) -> ConfigRecord:
        """See `Reach`."""
        assert self.controller.active is not None
        return self.controller.active

    def issued(self, operation: bytes) -> None:
        """See `Reach`."""
        self.checks.issued.add(operation)

    def report(self, machine: Machine, topic: str, body: dict[str, Any]) -> None:
        """See `World`."""
        self.trace(machine.name, f"report {topic} {body}")
        self.checks.reported(machine, topic, body)
        self.schedule.after(0.001, lambda: self.controller.report(machine, topic, body))

    def body(self, digest: bytes, header: bytes, payload: bytes) -> None:
        """See `World`."""
        self.checks.observer.body(digest, header, payload)

    def judge(self) -> Configuration | None:
        """See `World`."""
        try:
            return self.checks.observer.advance()
        except AgreementError as error:
            raise FailedError("disagreement", f"of all that was certified: {error}") from error

    def sever(self, machine: Machine, rng: random.Random, for_s: float) -> None:
        """See `World`."""
        correct = [m.identity.replica for m in self.group if m.correct]
        if self.in_trouble and len(correct) > 1:
            rng.shuffle(correct)
            half = rng.randint(1, len(correct) - 1)
            self.happened("attack:splits the network")
            self.network.sever(machine.name, correct[:half], correct[half:])
            self.schedule.after(for_s, lambda: self.network.heal(machine.name))

    def look(self) -> None:
        """See `World`."""
        self.checks.look()

    def watch(self, machine: Machine, effect: Effect) -> None:
        """See `World`."""
        self.checks.watch(machine, effect)

    def happened(self, what: str) -> None:
        """Count an attack, a fault or a rule's branch that was exercised."""
        self.report_.happened[what] += 1

    def trace(self, who: str, what: str) -> None:
        """See `World`."""
        line = f"{self.schedule.now_s():9.4f} {who:>10} {what}"
        self.report_.trace.append(line)
        self._hash.update(line.encode())

    def _fail(self, kind: str, why: str) -> None:
        self.report_.kind = self.report_.kind or kind
        self.report_.failures.append(f"at {self.schedule.now_s():.4f} virtual s: {why}")


def run(plan: Plan, *, real_keys: bool = False) -> Report:
    """Carry a plan out."""
    usual = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS)
    try:
        return Simulation(plan, RealKeys() if real_keys else KeyRing()).run()
    finally:
        gc.set_threshold(*usual)


def simulate(
    seed: int, n: int, algorithm: Algorithm, profile: str, *, real_keys: bool = False, changes: Changes | None = None
) -> Report:
    """Run one seed of `profile` (a name in PROFILES) with `n` replicas, of which (n-1)//2 may be faulty; in a mixed one
    as many as the seed's row of protocol §1 says. `changes` of the profile's fields make a run smaller.
    """
    return run(draw(seed, n, algorithm, profile, changes), real_keys=real_keys)


def change(text: str) -> tuple[str, Any]:
    """FIELD=VALUE of a profile. Raises ValueError."""
    name, _, value = text.partition("=")
    kind = type(getattr(PROFILES["calm"], name, None))
    if kind not in {int, float, bool, str}:
        raise ValueError(f"{name} is no number or name in a profile")
    if kind is bool or kind is str:
        return name, value if kind is str else value == "True"
    return name, kind(float(value))


def main(arguments: list[str] | None = None) -> int:
    """Run one seed and say what was seen. Exit code 1 if the run failed."""
    parser = argparse.ArgumentParser(prog="python -m cloudfit_orchestrator.testing.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--algorithm", type=Algorithm, choices=list(Algorithm), default=Algorithm.EBAWA)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="chaos")
    parser.add_argument("--without", default="", metavar="NAMES", help="troubles and attacks to leave out, by comma")
    parser.add_argument("--plan", action="store_true", help="say what would happen, and run nothing")
    parser.add_argument("--real-keys", action="store_true", help="Ed25519 in place of keyed hashes")
    parser.add_argument("--set", type=change, action="append", default=[], metavar="FIELD=VALUE", dest="changes")
    parser.add_argument("--trace", type=int, default=0, metavar="LINES", help="print the last lines of the trace")
    chosen = parser.parse_args(arguments)
    try:
        plan = draw(chosen.seed, chosen.n, chosen.algorithm, chosen.profile, dict(chosen.changes))
        plan = plan.without(name for name in chosen.without.split(",") if name)
    except CloudfitError as error:
        parser.error(str(error))
    if chosen.plan:
        print(plan.profile, plan.parameters, f"f={plan.f} k={plan.k} taken {plan.taken}, then {plan.next_attacks}")
        print("\n".join(str(trouble) for trouble in plan.troubles))
        return 0
    report = run(plan, real_keys=chosen.real_keys)
    if chosen.trace:
        print("\n".join(list(report.trace)[-chosen.trace :]))
    print(f"seed {chosen.seed}: {report}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
