"""What a run must keep (`Checks`), looked at while it goes on: a violation stops it where it arises.

Agreement on checkpoints and decisions · nothing executed twice, nothing that no client asked for · the clients' history
linearizable, to the last read of each key · nobody correct called a liar · logs and buffers bounded · records one
monotone chain · one epoch of a replica alive at a time · and what the observer sees (`observer.py`).
"""

import hashlib
from typing import TYPE_CHECKING, Any

from cloudfit_orchestrator.bft.effects import Append, Effect, Send, Sign
from cloudfit_orchestrator.bft.journal import LogState
from cloudfit_orchestrator.bft.pool import MAX_BUNDLES
from cloudfit_orchestrator.bft.usig.journal import LogAnchor, LogEnd
from cloudfit_orchestrator.bft.usig.stream import MAX_AHEAD
from cloudfit_orchestrator.model.errors import UnknownError
from cloudfit_orchestrator.model.record import ConfigRecord, Status, open_record, record_hash
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.testing.history import History
from cloudfit_orchestrator.testing.machine import Machine
from cloudfit_orchestrator.testing.observer import FindingError, Observer
from cloudfit_orchestrator.testing.workload import NAME_BYTES

if TYPE_CHECKING:
    from cloudfit_orchestrator.testing.simulator import Simulation

MAX_LOG_RECORDS = 4000  # of one machine: far above a few windows
MAX_SNAPSHOTS = 400  # kept on one disk: with K=1 those of all slots of a second or two, until they are collected
MAX_KEPT = 2000  # messages of one stream: a window's worth between attested STABLEs, and slack while nobody attests
MAX_HELD_BATCHES = 1500
SAMPLE_UIS = 60  # the observer looks after so many more UIs
_BRANCHES = {
    LogAnchor.__struct_config__.tag: "rule:a cursor jumped to an attested STABLE",
    LogEnd.__struct_config__.tag: "rule:EPOCH-END taken",
    LogState.__struct_config__.tag: "rule:snapshot",
}


class FailedError(AssertionError):
    """A check failed in the middle of a run: going on would only bury it."""

    def __init__(self, kind: str, fact: str) -> None:
        """`kind` names the check, `fact` what was seen."""
        super().__init__(fact)
        self.kind = kind


class Checks:
    """All of one run."""

    def __init__(self, world: "Simulation", *, verifier: Verifier, controllers: list[bytes]) -> None:
        """Nothing seen yet."""
        self._world = world
        self._verifier = verifier
        self._controllers = controllers
        self.history = History()
        self.observer = Observer(verifier, controllers, world.happened)
        self.issued: set[bytes] = set()  # operations that a client has asked for
        self._agreed: dict[tuple[int, Kind, int], tuple[bytes, str]] = {}
        self._sampled = 0

    # --------------------------------------------------------------------------------------------------- what is seen
    def watch(self, machine: Machine, effect: Effect) -> None:
        """Agreement: correct replicas sign the same checkpoint and decision for the same slot."""
        if isinstance(effect, Send):
            return
        self.observer.watch(machine.name, effect)
        if not machine.correct:
            return
        if isinstance(effect, Append) and (branch := _BRANCHES.get(effect.record[1])):
            self._world.happened(branch)
        if isinstance(effect, Sign) and effect.kind in {Kind.CHECKPOINT, Kind.DECIDED}:
            slot, digest = LAYOUT[effect.kind].unpack(effect.body)
            self._world.trace(machine.name, f"{effect.kind.name} c={effect.c} slot={slot} {digest.hex()[:8]}")
            said, by = self._agreed.setdefault((effect.c, effect.kind, slot), (digest, machine.name))
            if said != digest:
                raise FailedError(
                    "disagreement",
                    f"{effect.kind.name} c={effect.c} slot {slot} is {said.hex()[:8]} for {by}, "
                    f"{digest.hex()[:8]} for {machine.name}",
                )

    def executed(self, machine: Machine, operation: bytes, twice: bool) -> None:  # noqa: FBT001  as OnceService calls it
        """A service executes an operation, perhaps tentatively."""
        if not machine.correct:
            return
        if twice:
            name = operation[:NAME_BYTES].hex()
            raise FailedError("executed twice", f"{machine.name} executes {name} on a state that has it already")
        if operation not in self.issued:
            digest = hashlib.sha256(operation).hexdigest()[:8]
            raise FailedError("forged request", f"{machine.name} executes {digest}, for which no client asked")

    def reported(self, machine: Machine, topic: str, body: dict[str, Any]) -> None:
        """A report to the controller."""
        if not machine.correct:
            return
        if topic == "liar":
            if body["replica"] not in self._world.troubles.faulty and not self._was_taken(body["replica"]):
                raise FailedError(
                    "false accusation", f"{machine.name} calls {body['replica']} a liar, which is correct: {body}"
                )
            self._world.happened(f"rule:blamed for {body['kind']}")
        elif topic in {"amnesia", "silenced", "diverged", "transfer", "bad_record", "bad_command"}:
            self._world.happened(f"rule:{topic}")
            if topic == "transfer" and body["corrupt"]:
                self._world.happened("rule:corrupt chunk refused")

    def _was_taken(self, replica: str) -> bool:
        return any(not m.correct for m in self._world.machines.values() if m.identity.replica == replica)

    def activated(self, record: ConfigRecord, envelope: bytes) -> None:
        """A record becomes ACTIVE: the last look at the configuration before it, whose epochs are closed."""
        self.look()
        before = self.observer.judge
        if before is not None and record.h < before.slots.highest_decided:
            # what was decided and is above h would be lost
            self._check_pinned(record)
        self.observer.begin(record, envelope)

    def _check_pinned(self, record: ConfigRecord) -> None:
        judge = self.observer.judge
        assert judge is not None
        lost = [s for s, _ in judge.slots.decisions() if s > record.h]
        if lost:
            raise FailedError(
                "decision lost", f"slots {lost} of c={judge.record.c} were decided, c={record.c} begins at {record.h}"
            )

    # -------------------------------------------------------------------------------------------------------- samples
    def sample(self) -> bool:
        """Look again once enough has been said. Always False: it never ends a run by itself."""
        if self.observer.certified_count - self._sampled >= SAMPLE_UIS:
            self.look()
        return False

    def look(self) -> None:
        """All that can be told now."""
        self._sampled = self.observer.certified_count
        try:
            if self._world.judge() is not None:
                self.observer.check_streams(self._counting())
                for machine in self._world.group:
                    theirs = machine.configuration
                    if machine.correct and theirs is not None:
                        self.observer.check_judge(machine.name, theirs)
                self.observer.look_ahead()
        except FindingError as finding:
            raise FailedError(finding.kind, str(finding)) from finding
        self._check_epochs()
        for machine in self._world.group:
            if machine.correct:
                self._check_bounds(machine)

    def _counting(self) -> set[str]:
        """Replicas that are taken now, or were at some moment of this configuration."""
        record = self.observer.judge.record if self.observer.judge is not None else self._world.newest()
        members = {f"{m.replica}#{m.incarnation}": m.replica for m in record.members}
        return {replica for name, replica in members.items() if not self._world.machines[name].correct}

    def _check_epochs(self) -> None:
        alive: dict[str, list[str]] = {}
        for machine in self._world.machines.values():
            for c in machine.wormhole.alive:
                alive.setdefault(machine.identity.replica, []).append(f"{machine.name} c={c}")
        for replica, epochs in alive.items():
            if len(epochs) > 1:
                raise FailedError("two epochs", f"{replica} can speak in {epochs}")

    def _check_bounds(self, machine: Machine) -> None:
        records, snapshots = len(machine.disk), len(machine.disk.snapshots)
        figures = self._world.report_.figures
        figures["largest log"] = max(records, figures["largest log"])
        found = {"log records": (records, MAX_LOG_RECORDS), "snapshots": (snapshots, MAX_SNAPSHOTS)}
        configuration = machine.configuration
        if configuration is not None:
            streams = configuration.streams.values()
            found["messages that wait"] = (max(len(s.waiting) for s in streams), MAX_AHEAD)
            found["messages kept"] = (max(len(s.kept) for s in streams), MAX_KEPT)
            found["votes that wait"] = (len(configuration.citations), MAX_AHEAD)
            found["batches"] = (len(configuration.batches.all()), MAX_HELD_BATCHES)
            found["views"] = (len(configuration.new_views), MAX_KEPT)
        if machine.replica is not None:
            found["bundles"] = (machine.replica.status["pool"], MAX_BUNDLES)
        for name, (count, most) in found.items():
            if count > most:
                raise FailedError("unbounded", f"{machine.name} keeps {count} {name}, allowed are {most}")

    # ---------------------------------------------------------------------------------------------------- at the end
    def final(self) -> None:
        """Everything once more, and what only the whole run shows."""
        self.look()
        self._check_chain()
        try:
            violation = self.history.check()
        except UnknownError as unknown:
            raise FailedError("history", str(unknown)) from unknown
        if violation is not None:
            raise FailedError("not linearizable", str(violation))
        views = [m.replica.status.get("view", 0) for m in self._world.group if m.correct and m.replica is not None]
        self._world.report_.figures["last view"] = max(views, default=0)

    def _check_chain(self) -> None:
        active: ConfigRecord | None = None
        last_c, before = 0, b""
        for envelope in self._world.controller.chain:
            record = open_record(envelope, self._controllers)
            fits = not before or record.previous == record_hash(before)
            if record.status is Status.PREPARED:
                fits = fits and record.c > last_c and record.base == (active.c if active is not None else None)
                last_c = record.c
            else:
                fits = fits and record.c == last_c and (active is None or record.h >= active.h)
                active = record
            if not fits:
                raise FailedError("chain", f"record c={record.c} {record.status} does not follow the one before it")
            before = envelope
