"""What goes wrong in a run: carries out the troubles of its plan (`plan.py`), one handler a kind.

Crashes, cuts, freezes and clocks are no faults of the model: any number of correct replicas may have them, and safety
must not notice. A take-over and a lapse (keys or disk lost, lease over) are: at most f replicas at a time, each until
the configuration that replaces it is ACTIVE.
"""

import random
from functools import partial
from typing import TYPE_CHECKING

from cloudfit_orchestrator.model.record import Algorithm
from cloudfit_orchestrator.testing.crypto import Signer
from cloudfit_orchestrator.testing.exporter import SimExporter
from cloudfit_orchestrator.testing.machine import Machine
from cloudfit_orchestrator.testing.plan import Trouble, parameters
from cloudfit_orchestrator.testing.rogues import Rogue

if TYPE_CHECKING:
    from cloudfit_orchestrator.testing.simulator import Simulation

PRECOPY_S = 1.5  # a learner gets up to so long before its record is written
POLL_S = 0.1
LOG_READ_S = 2.0  # for the others to read the log of who was frozen; then its recovery is put off
CLOCK_RATES = (0.0, 0.05, 20.0)  # stopped, slow, fast


class Troubles:
    """See the module."""

    def __init__(self, world: "Simulation", rogue_keys: list[Signer]) -> None:
        """`rogue_keys`: of the clients that are Byzantine."""
        self._world = world
        self._rogue_keys = rogue_keys
        self._replacing = False  # from the launch of a new machine until the one that it replaces is gone
        self._waiting = 0  # replacements and reshapes that wait for their turn
        self._off: set[str] = set()  # machines that stay off
        self._lapsed: set[str] = set()  # machines that lost their keys, lease or disk
        self._next_attacks = list(world.plan.next_attacks)
        self.faulty = set(world.plan.taken)  # replicas that count in f now

    @property
    def busy(self) -> bool:
        """A reconfiguration is under way, or planned."""
        return self._replacing or self._waiting > 0 or self._world.controller.busy

    def begin(self) -> None:
        """Plan all of it from now on."""
        for trouble in self._world.plan.troubles:
            self._waiting += trouble.kind in {"replace", "reshape"}
            self._world.schedule.after(trouble.at_s, partial(self._happen, trouble))

    def heal(self) -> None:
        """What a fault of the model left off stays off; everything else runs and ticks."""
        for machine in self._world.group:
            machine.set_clock(1.0)
            if not self._replacing:
                machine.paused = False
                machine.wormhole.thaw(self._c)
            if not machine.running and machine.name not in self._off:
                machine.start()

    @property
    def _c(self) -> int:
        return self._world.newest().c

    def _happen(self, trouble: Trouble) -> None:
        handler = {
            "crash": self._crash,
            "partition": self._part,
            "freeze": self._freeze,
            "clock": self._clock,
            "lapse": self._lapse,
            "replace": self._replace,
            "reshape": self._reshape,
            "rogue": self._rogue,
        }[trouble.kind]
        handler(trouble)

    def _done(self, trouble: Trouble, variant: str = "") -> None:
        self._world.trace("world", f"{trouble.name} {' '.join(trouble.who)} {variant}")
        self._world.happened(f"fault:{trouble.kind}" + (f" {variant}" if variant else ""))

    def _present(self, trouble: Trouble) -> Machine | None:
        """The machine of the replica that a trouble names, as far as it is one to be troubled."""
        found = [m for m in self._world.group if m.identity.replica in trouble.who]
        return found[-1] if found and self._world.in_trouble else None

    # ------------------------------------------------------------------------------------------- no faults of the model
    def _crash(self, trouble: Trouble) -> None:
        machine, rng = self._present(trouble), trouble.rng()
        if machine is None or not machine.running or machine.paused:
            return
        if rng.random() < 0.5:
            self._done(trouble)
            machine.crash()
        else:
            self._done(trouble, "in the middle")
            machine.crash_in_effects = rng.randint(1, 12)  # between an append, a certify and a send
        self._boot_later(machine, 0.02 + trouble.for_s)

    def _boot_later(self, machine: Machine, delay_s: float) -> None:
        def boot() -> None:
            if not machine.running and machine in self._world.group and machine.name not in self._off:
                machine.start()
            elif machine.crash_in_effects is not None:
                self._boot_later(machine, 0.1)

        self._world.schedule.after(delay_s, boot)

    def _part(self, trouble: Trouble) -> None:
        if not self._world.in_trouble:
            return
        one_way = trouble.draw % 3 == 0
        self._done(trouble, "one way" if one_way else "")
        self._world.network.part(trouble.name, trouble.who, one_way=one_way)
        self._world.schedule.after(trouble.for_s, lambda: self._world.network.heal(trouble.name))

    def _freeze(self, trouble: Trouble) -> None:
        machine, c = self._present(trouble), self._c
        if machine is None or machine.paused or not machine.wormhole.freeze(c):
            return
        self._done(trouble, "with calls under way" if machine.asking else "")

        def thaw() -> None:
            if not machine.paused:  # else a recovery has frozen it meanwhile
                machine.wormhole.thaw(c)

        self._world.schedule.after(trouble.for_s, thaw)

    def _clock(self, trouble: Trouble) -> None:
        machine = self._present(trouble)
        if machine is None:
            return
        rate = CLOCK_RATES[trouble.draw % len(CLOCK_RATES)]
        self._done(trouble, f"at {rate:g}")
        machine.set_clock(rate)
        self._world.schedule.after(trouble.for_s, lambda: machine.set_clock(1.0))

    def _rogue(self, trouble: Trouble) -> None:
        if self._world.in_trouble:
            Rogue(self._world, trouble.name, self._rogue_keys[trouble.number - 1], trouble.rng()).start()

    # ---------------------------------------------------------------------------------------------------------- faults
    def _lapse(self, trouble: Trouble) -> None:
        machine = self._present(trouble)
        if machine is None or not self.may_fail(machine):
            return
        self.faulty.add(machine.identity.replica)
        self._lapsed.add(machine.name)
        if trouble.draw % 3 == 0:
            self._done(trouble, "lease")
            machine.wormhole.lapse()
        elif trouble.draw % 6 == 1:
            self._done(trouble, "disk lost")
            machine.crash()
            machine.disk.lose()
            self._boot_later(machine, 0.1)
        elif trouble.draw % 3 == 1:
            self._done(trouble, "snapshots damaged")
            machine.crash()
            machine.disk.snapshots.clear()  # no chunk of them is what its index says: they are not there
            self._boot_later(machine, 0.1)
        else:
            self._done(trouble, "keys lost")
            machine.wormhole.lose_keys()
            machine.crash()  # a guest's channel ends with its agent
            self._boot_later(machine, 0.1)

    def may_fail(self, machine: Machine) -> bool:
        """One more faulty replica is within f, and this one is correct so far."""
        return machine.identity.replica not in self.faulty and len(self.faulty) < self._world.plan.f

    # ------------------------------------------------------------------------------------------------- reconfigurations
    def _again(self, trouble: Trouble) -> bool:
        """One at a time: it is put off while another is under way, and, as the real controller waits, until all that
        can have installed the configuration: as long as few correct members hold its state, none of them may be taken
        out of it.
        """
        unready = self._world.controller.unready - self.faulty
        if self._replacing or self._world.controller.busy or unready:
            self._world.schedule.after(0.2, partial(self._happen, trouble))
            return True
        self._waiting -= 1
        return False

    def _reshape(self, trouble: Trouble) -> None:
        if self._again(trouble):
            return
        self._replacing = True
        rng = trouble.rng()
        self._done(trouble)

        def reshaped() -> None:
            self._replacing = False

        self._world.controller.reshape(parameters(rng), rng.choice(self._algorithms()), reshaped)
        self._maybe_supersede(rng)

    def _algorithms(self) -> list[Algorithm]:
        """Those that the group is large enough for, with its f and k."""
        plan = self._world.plan
        usual = (Algorithm.EBAWA, Algorithm.MINBFT)
        return [*usual, Algorithm.PBFT] if plan.n >= 3 * plan.f + 2 * plan.k + 1 else list(usual)

    def _replace(self, trouble: Trouble) -> None:
        if self._again(trouble):
            return
        old = next((m for m in self._world.group if m.identity.replica in trouble.who), None)
        faulty = [m for m in self._world.group if m.identity.replica in self.faulty]
        rng = trouble.rng()
        if faulty and (old is None or old not in faulty):
            old = rng.choice(faulty)  # the budget must come back before a correct one may be missing
        old = old or rng.choice(self._world.group)
        self._replacing = True
        Recovery(self._world, self, trouble, old, rng).begin()

    def _maybe_supersede(self, rng: random.Random) -> None:
        """Another record on the same base comes before the first one is ACTIVE; words to one agent take long."""
        controller = self._world.controller
        controller.slow_s = {m.name: rng.uniform(0, 0.8) for m in self._world.group if rng.random() < 0.2}
        if rng.random() < 0.3:
            self._world.schedule.after(rng.uniform(0.0, 0.3), controller.supersede)

    def switch(self, old: Machine, new: Machine, rng: random.Random) -> None:
        """Write the record in which `new` takes the place of `old`."""
        machines = [new if m is old else m for m in self._world.group]
        self._world.group.append(new)  # may crash and be parted from now on, like all others
        self._world.controller.reconfigure(machines, partial(self._switched, old, new, machines))
        self._maybe_supersede(rng)

    def _switched(self, old: Machine, new: Machine, machines: list[Machine]) -> None:
        self._world.trace("world", f"{old.name} is gone")
        self.lose(old)
        self._replacing = False
        self._world.group = machines
        self._world.report_.figures["replaced"] += 1
        if new.name not in self._lapsed:
            self.faulty.discard(old.identity.replica)
        correct = [m for m in machines if self.may_fail(m)]
        if self._next_attacks and self._world.in_trouble and correct:
            # The adversary moves on. Who was faulty before counted in the configuration that has just been replaced.
            moved = self._world.plan.stream(f"mobile {new.name}").choice(correct)
            self.faulty.add(moved.identity.replica)
            self._world.take_over(moved, self._next_attacks.pop(0))
        for machine in machines:
            if not machine.running and not self._world.in_trouble:
                machine.start()

    def lose(self, machine: Machine) -> None:
        """It is not there any more."""
        machine.crash()
        self._off.add(machine.name)

    def put_off(self, old: Machine, new: Machine) -> None:
        """A recovery is given up before its record was written."""
        self._world.trace("world", f"the recovery of {old.name} is put off")
        old.wormhole.thaw(self._c)
        old.paused = False
        self._world.controller.forget(new)
        self.lose(new)
        self._replacing = False


class Recovery:
    """One replacement (protocol §6): plain, or by stages up to the vote of a stopped member."""

    def __init__(
        self, world: "Simulation", troubles: Troubles, trouble: Trouble, old: Machine, rng: random.Random
    ) -> None:
        """Of `old`, by a new machine of the same replica."""
        self._world = world
        self._troubles = troubles
        self._trouble = trouble
        self._old = old
        self._rng = rng
        self._c = world.newest().c
        self._new = world.launch(old.identity.replica)
        self._exporter: SimExporter | None = None
        self._polls = 0

    def begin(self) -> None:
        """Launch beside the old machine, which goes on serving."""
        rng = self._rng
        staged = self._world.plan.profile.staged and rng.random() < 0.7
        kind = rng.choice(["none", "sound", "corrupt", "silent"]) if staged else "none"
        if kind == "silent" and self._trouble.draw % 2:
            kind = "dripping"  # drawn apart: what else a seed draws stays as it is
        self._world.trace("world", f"{self._trouble.name}: {self._new.name} for {self._old.name}, exporter {kind}")
        self._world.happened(f"fault:replace {'by stages, exporter ' + kind if staged else 'plain'}")
        self._new.start()
        self._world.controller.introduce(self._new, wait_source=kind != "none")
        if staged and rng.random() < 0.7:
            self._world.happened("fault:RETIRE")
            self._world.controller.retire(self._old.identity.replica)
        if kind != "none":
            self._exporter = SimExporter(f"{self._old.identity.replica}#x{self._new.identity.incarnation}", kind, rng)
        self._world.schedule.after(rng.uniform(0, PRECOPY_S), self._freeze if staged else self._plain)

    def _plain(self) -> None:
        within = len(self._troubles.faulty | {self._old.identity.replica}) <= self._world.plan.f  # it counts as a fault
        if within and self._rng.random() < 0.3:
            self._troubles.lose(self._old)  # it has no vote
            self._world.happened("fault:replaced one is lost")
        self._switch()

    def _freeze(self) -> None:
        old = self._old
        old.wormhole.freeze(self._c)
        old.paused = True
        if self._exporter is not None:
            self._exporter.attach(old.disk)
            self._world.exporters[self._exporter.name] = self._exporter
            self._world.controller.source(self._new, self._exporter.name)
        self._close_when_read()

    def _close_when_read(self) -> None:
        """Step 4: is the log a complete vote, in the eyes of Qv-1 others, the epoch is closed."""
        others = [m for m in self._world.group if m is not self._old]
        cv = self._old.wormhole.counter(self._c)
        judged = sum(m.correct and m.has_log(self._c, self._old.identity.replica, cv) for m in others)
        if judged >= self._world.newest().quorums.view_change - 1:
            self._close("EPOCH-END and log")
        elif self._polls * POLL_S < LOG_READ_S:
            self._polls += 1
            self._world.schedule.after(POLL_S, self._close_when_read)
        elif self._old.identity.replica in self._troubles.faulty:
            self._close("EPOCH-END without log")
        else:
            self._world.happened("fault:recovery put off")
            self._troubles.put_off(self._old, self._new)

    def _close(self, how: str) -> None:
        self._world.happened(f"fault:{how}")
        end = self._old.wormhole.close(self._c)
        if end is not None:
            self._world.controller.ended(end)
        self._world.schedule.after(self._rng.uniform(0, 0.3), self._switch)

    def _switch(self) -> None:
        self._troubles.switch(self._old, self._new, self._rng)
