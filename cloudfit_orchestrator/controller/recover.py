"""`recovery start`: carries out the table of `recovery/machine.py` with drivers and agents, journalled stage by stage.

Each stage is one step of the operation: its event is durable before the next stage begins, and a stage that was cut
short runs again from its start. So every act in here is safe to repeat.
"""

import base64
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from cloudfit_orchestrator.clouds.base import DiskSnapshot, Machine, MachineState
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.agents import GuestRef, NoEpochError, NotAdmittedError, Report
from cloudfit_orchestrator.controller.apply import active_record, draft_record, pin, seat
from cloudfit_orchestrator.controller.configure import Configurer
from cloudfit_orchestrator.controller.journal import Operation
from cloudfit_orchestrator.controller.launch import Launched, ensure_network, launch, let_in, ownership, unmake
from cloudfit_orchestrator.controller.parallel import watch
from cloudfit_orchestrator.controller.ports import RECOVERY_IMAGE, Agent, Context, Progress
from cloudfit_orchestrator.controller.standing import Standing, record_of
from cloudfit_orchestrator.controller.survey import survey
from cloudfit_orchestrator.model.errors import (
    CloudfitError,
    LockedOutError,
    PermanentError,
    RefusedError,
    UnknownError,
)
from cloudfit_orchestrator.model.orders import Retire, seal_retire
from cloudfit_orchestrator.model.record import ConfigRecord, Member
from cloudfit_orchestrator.model.spec import GroupSpec
from cloudfit_orchestrator.recovery.budget import Condition, check_budget
from cloudfit_orchestrator.recovery.machine import ENDS, FIRST, Circumstances, Event, Stage, next_stage

EXTRACT_TIMEOUT_S = 180.0  # a disk that is not read by then is left alone: the peers have everything
PRECOPY_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """The result, as shown to people and machines. Times in seconds, None where the stage did not happen."""

    group: str
    replica: str
    outcome: str  # done | put-off | given-up
    c: int
    old_incarnation: int
    new_incarnation: int
    lost: bool
    suspected: bool
    transfer: dict[str, Any] = field(default_factory=dict)  # the learner's report: kept, fetched, from, corrupt, …
    replica_outage_s: float | None = None  # freeze to ready
    group_outage_s: float | None = None  # PREPARED installed (wedge) to ACTIVE installed
    total_s: float = 0.0


def recover(context: Context, group: str, replica: str, *, suspected: bool = False) -> Recovered:
    """Replace the incarnation of `replica`. RefusedError if the fault budget forbids it; run again, it goes on."""
    row = context.journal.group(group)
    if row is None:
        raise PermanentError(f"there is no group {group}", next_command="cloudfit group list")
    running = context.journal.open_of(group)
    if running is None:
        base = active_record(context, group)
        spec = spec_file.from_json(row.spec)
        arguments = _judge(context, spec, base, replica, suspected=suspected)
        new = context.images.verified(spec.image, spec.cloud_of(replica).driver, allow_adversary=spec.allow_adversary)
        arguments["image"] = pin(new)
    else:
        arguments = {}
    operation = context.journal.open_operation("recover", group, replica, arguments)
    return _Recovery(context, operation).run()


def _judge(context: Context, spec: GroupSpec, base: ConfigRecord, replica: str, *, suspected: bool) -> dict[str, Any]:
    """The facts and the fault budget's verdict, before anything is written."""
    conditions = survey(context, spec, base)
    lost = conditions.get(replica) is Condition.LOST
    if suspected and replica in conditions:
        conditions[replica] = Condition.SUSPECTED
    check_budget(replica, conditions, f=base.f, k=base.k)
    before = context.journal.closed("recover", base.group, replica)
    put_off = bool(before) and before[-1][0] == Stage.PUT_OFF.value
    return {"base": base.c, "lost": lost, "suspected": suspected, "put_off_before": put_off}


class _Recovery:
    def __init__(self, context: Context, operation: Operation) -> None:
        self._x = context
        self._op = operation
        row = context.journal.group(operation.group)
        assert row is not None
        self._spec = spec_file.from_json(row.spec)
        self._replica = operation.subject
        self._base, self._base_envelope = record_of(context, operation.group, operation.arguments["base"])
        member = self._base.member(self._replica)
        assert member is not None
        self._old = member
        self._cloud = self._spec.cloud_of(self._replica)
        a = operation.arguments
        self._circumstances = Circumstances(a["lost"], a["suspected"], a["put_off_before"])
        self._launched: Launched | None = None
        self._standing = Standing(context, "recover", operation.group, self._spec.clouds)

    def run(self) -> Recovered:
        acts: dict[Stage, Callable[[], dict[str, Any]]] = {
            Stage.LAUNCH: self._launch,
            Stage.SNAPSHOT: self._snapshot,
            Stage.EXTRACT: self._extract,
            Stage.PRECOPY: self._precopy,
            Stage.RETIRE: self._retire,
            Stage.FREEZE: self._freeze,
            Stage.JUDGE: self._have_quorum,
            Stage.THAW: self._thaw,
            Stage.CLOSE: self._close,
            Stage.PREPARE: self._prepare,
            Stage.CONFIRM: self._confirm,
            Stage.ACTIVATE: self._activate,
            Stage.READY: self._ready,
            Stage.CLEAN: self._clean,
        }
        stage, number = FIRST, 0
        while stage not in ENDS:
            number += 1
            self._standing.ask_again()  # who answered in the last stage may be gone
            self._x.check_cancelled()
            name = f"stage/{number:02d}/{stage.value}"
            if self._op.find(name) is None:
                self._say(stage.value, f"{stage.value} {self._replica}")
            act = acts[stage]
            result = self._op.step(name, lambda _, act=act: act())  # type: ignore[misc]
            stage = next_stage(stage, Event(result.pop("event", Event.OK.value)), self._circumstances)
        if stage is not Stage.DONE:
            self._withdraw()
        recovered = self._result(stage)
        self._op.close(asdict(recovered), state=stage.value)
        return recovered

    # --- stages; each returns what is worth keeping, with its event unless that is OK

    def _launch(self) -> dict[str, Any]:
        ensure_network(self._x, self._cloud)
        self._x.sites.agent(self._cloud, start=True)
        new = self._new()
        self._own_agent().install(self._op.group, self._base_envelope)  # a fresh agent knows no configuration
        let_in(self._x, self._spec)
        self._tell_members({"op": "learn", "peer": new.as_peer()})
        wait_source = not self._circumstances.lost
        body = {"op": "base", "envelope": _text(self._base_envelope), "wait_source": wait_source}
        self._own_agent().command(self._ref(new), body)
        return {"peer_id": new.row.peer_id}

    def _snapshot(self) -> dict[str, Any]:
        cloud, machine = self._x.sites.cloud(self._cloud), self._old_machine()
        if machine is None:
            self._stop_waiting()
            return {"event": Event.LOST.value}
        if machine.state is MachineState.RUNNING and cloud.must_pause(machine):
            machine = cloud.pause(machine)
        taken = cloud.snapshot(machine, self._op.id)
        if machine.state is MachineState.PAUSED:
            cloud.resume(machine)
        return {"snapshot": taken.id}

    def _extract(self) -> dict[str, Any]:
        agent, new = self._own_agent(), self._new()
        heard, _ = agent.reports(0, 0.0, self._op.group)
        since = max((r.seq for r in heard if r.guest == self._ref(new)), default=0)
        before = self._op.find("source")
        if before is not None and before.intent["since"] <= since:
            since = before.intent["since"]
        image = self._x.images.verified(RECOVERY_IMAGE, self._cloud.driver, allow_adversary=False)
        exporter = launch(
            self._x, self._op, self._spec, replica=self._replica, image=image, agent=agent, attach=self._taken()
        )
        let_in(self._x, self._spec)
        agent.command(self._ref(exporter), {"op": "learn", "peer": new.as_peer()})
        self._op.step(
            "source",
            lambda _: agent.command(self._ref(new), {"op": "source", "peer": exporter.as_peer()}),
            lambda: {"since": since},
        )

        def built(report: Report) -> bool:  # a group without a checkpoint has nothing to transfer
            done = report.topic == "transfer" or report.body.get("behind") == 0
            return report.seq > since and done

        report = self._wait({"transfer", "learner"}, built, "the old disk to be read", EXTRACT_TIMEOUT_S)
        if report is None:
            self._stop_waiting()
            return {"event": Event.INCOMPLETE.value}
        return {"transfer": report.body if report.topic == "transfer" else {}}

    def _precopy(self) -> dict[str, Any]:
        def caught_up(report: Report) -> bool:
            return report.body.get("behind") == 0

        report = self._wait({"learner"}, caught_up, f"{self._replica} to catch up", PRECOPY_TIMEOUT_S)
        if report is None:
            return {"event": Event.STALLED.value}
        from_peers = self._wait({"transfer"}, lambda _: True, "", 0.1)
        return {"learner": report.body, "transfer": from_peers.body if from_peers else {}}

    def _retire(self) -> dict[str, Any]:
        order = seal_retire(Retire(self._op.group, self._base.c, self._replica), self._x.key)
        self._tell_members({"op": "retire", "order": _text(order)}, also_old=not self._circumstances.lost)
        return {}

    def _freeze(self) -> dict[str, Any]:
        machine = self._old_machine()
        if machine is None:
            return {"event": Event.LOST.value}
        try:
            self._own_agent().freeze(self._old_ref(), self._base.c)
        except (NotAdmittedError, NoEpochError):
            self._say("freeze", "its agent lost the keys: it cannot speak anyway")
        except CloudfitError as error:
            self._forgive(error)
        # One that is only due goes on answering questions until it is replaced: it and the faulty ones may be all who
        # hold a batch that S names. Of one that is suspected nothing is expected.
        if machine.state is MachineState.RUNNING and self._circumstances.suspected:
            try:
                self._x.sites.cloud(self._cloud).pause(machine)
            except LockedOutError as error:  # frozen it is, and that is what counts
                self._say("freeze", error.fact)
        return {}

    def _have_quorum(self) -> dict[str, Any]:
        conditions = survey(self._x, self._spec, self._base)
        others = [r for r, state in conditions.items() if r != self._replica and state is Condition.SERVING]
        enough = len(others) >= self._base.quorums.view_change
        return {"others": others} if enough else {"others": others, "event": Event.INCOMPLETE.value}

    def _thaw(self) -> dict[str, Any]:
        machine = self._old_machine()
        if machine is None:
            return {"event": Event.LOST.value}
        if machine.state is MachineState.PAUSED:
            self._x.sites.cloud(self._cloud).resume(machine)
        try:
            self._own_agent().thaw(self._old_ref(), self._base.c)
        except CloudfitError as error:
            self._forgive(error)
        return {}

    def _forgive(self, error: CloudfitError) -> None:
        """What the old guest's own agent does is a courtesy: whoever has the guest has its keys in any case."""
        self._x.check_cancelled()
        if not self._own_agent().inside:
            raise error
        self._say("old", f"its own agent does not do as it is told: {error.fact}")

    def _close(self) -> dict[str, Any]:
        try:
            end = self._own_agent().close_epoch(self._old_ref(), self._base.c)
        except (NotAdmittedError, NoEpochError):
            return {"closed": False}  # the keys are gone with the agent's memory; only their EPOCH-END is missing
        except CloudfitError as error:
            self._forgive(error)
            return {"closed": False}
        doc = {
            "replica": end.replica,
            "c": end.c,
            "cv_end": end.cv_end,
            "last_digest": _text(end.last_digest),
            "last_certificate": _text(end.last_certificate),
            "signature": _text(end.signature),
        }
        self._tell_members({"op": "ended", "end": doc})
        return {"closed": True, "cv_end": end.cv_end}

    def _prepare(self) -> dict[str, Any]:
        attempt, record = self._configurer().prepare()
        return {"attempt": attempt, "c": record.c}

    def _confirm(self) -> dict[str, Any]:
        configurer = self._configurer()
        attempt, _ = configurer.prepare()  # another attempt, if a wormhole lost its keys since
        configurer.confirm(attempt)
        return {"attempt": attempt}

    def _activate(self) -> dict[str, Any]:
        configurer = self._configurer()
        attempt = self._last("confirm")["attempt"]
        stay = [m for m in self._base.members if m.replica != self._replica]
        self._standing.close(stay, self._base.c)
        try:
            record = configurer.activate(attempt)
        except RefusedError as error:
            configurer.supersede(attempt, error.fact)
            return {"event": Event.SUPERSEDED.value}
        return {"attempt": attempt, "c": record.c}

    def _ready(self) -> dict[str, Any]:
        self._configurer().ready(self._last("activate")["attempt"])
        return {}

    def _clean(self) -> dict[str, Any]:
        self._remove(keep=self._new().row.incarnation)
        let_in(self._x, self._spec)
        cloud, deployment = self._x.sites.cloud(self._cloud), self._x.journal.deployment
        kept = [s for s in cloud.snapshots(deployment) if s.owner.group == self._op.group]
        kept.sort(key=lambda s: s.taken_at)
        for snapshot in kept[: max(0, len(kept) - self._spec.recovery.keep_evidence)]:
            cloud.delete_snapshot(snapshot)
        return {}

    # --- what the stages share

    def _withdraw(self) -> None:
        """Nothing has changed for the group: the new machine and the recovery machine go."""
        new = next(
            (m for m in self._machines() if m.incarnation != self._old.incarnation and m.role == "replica"), None
        )
        if new is not None:
            self._tell_members({"op": "forget", "peer_id": new.peer_id})
        self._remove(keep=self._old.incarnation)
        let_in(self._x, self._spec)
        cloud = self._x.sites.cloud(self._cloud)
        for snapshot in cloud.snapshots(self._x.journal.deployment):
            if snapshot.owner.group == self._op.group and snapshot.operation == self._op.id:
                cloud.delete_snapshot(snapshot)

    def _machines(self) -> list[Any]:
        return [m for m in self._x.journal.machines(self._op.group) if m.replica == self._replica]

    def _remove(self, *, keep: int) -> None:
        """All machines of the replica but one, the recovery machine first: it stands on the snapshot."""
        agent = self._own_agent()
        for row in sorted(self._machines(), key=lambda m: m.role != "recovery"):
            if row.incarnation == keep:
                continue
            agent.evict(GuestRef(row.group, row.replica, row.incarnation))
            unmake(self._x, self._cloud, row)
            self._x.journal.machine_gone(row)

    def _new(self) -> Launched:
        """The new machine, launched or found; admitted again in each run, which costs a measurement only."""
        if self._launched is None:
            image = self._x.images.verified(
                self._op.arguments["image"], self._cloud.driver, allow_adversary=self._spec.allow_adversary
            )
            self._launched = launch(
                self._x, self._op, self._spec, replica=self._replica, image=image, agent=self._own_agent()
            )
        return self._launched

    def _own_agent(self) -> Agent:
        return self._x.sites.agent(self._cloud, start=True)

    def _others(self) -> list[Member]:
        return [m for m in self._base.members if m.replica != self._replica]

    def _tell_members(self, body: dict[str, Any], *, also_old: bool = False) -> None:
        self._standing.tell([*self._others(), *([self._old] if also_old else [])], body)

    def _stop_waiting(self) -> None:
        """No recovery machine will come: the learner takes everything from its peers."""
        self._own_agent().command(self._ref(self._new()), {"op": "source", "peer": None})

    def _wait(self, topics: set[str], wanted: Callable[[Report], bool], what: str, timeout_s: float) -> Report | None:
        """The last report of the new machine that fits, or None after the time-out."""
        me, found = self._ref(self._new()), []

        def handle(report: Report) -> bool:
            if report.guest == me and report.topic in topics and wanted(report):
                found.append(report)
            return bool(found)

        agents = {self._cloud.name: self._own_agent()}
        try:
            watch(self._x, agents, self._op.group, handle, timeout_s=timeout_s, waiting_for=lambda: what)
        except UnknownError:
            self._x.check_cancelled()
            return None
        return found[-1]

    def _old_machine(self) -> Machine | None:
        row = self._x.journal.machine(self._op.group, self._old.incarnation)
        return self._x.sites.cloud(self._cloud).find(ownership(self._x, row)) if row else None

    def _taken(self) -> DiskSnapshot:
        name = self._last("snapshot")["snapshot"]
        found = self._x.sites.cloud(self._cloud).snapshots(self._x.journal.deployment)
        snapshot = next((s for s in found if s.id == name), None)
        if snapshot is None:
            raise PermanentError(
                f"the snapshot of {self._op.group}/{self._replica} is gone",
                next_command=f"cloudfit group show {self._op.group}",
            )
        return snapshot

    def _configurer(self) -> Configurer:
        seats = [
            seat(self._new(), self._own_agent()) if m.replica == self._replica else self._standing.seat(m)
            for m in self._base.members
        ]
        return Configurer(
            self._x, self._op, seats,
            lambda c, members, previous: draft_record(
                self._x, self._spec, self._base, c=c, members=members, previous=previous
            ),
            f=self._base.f,
        )  # fmt: skip

    def _ref(self, launched: Launched) -> GuestRef:
        return GuestRef(launched.row.group, launched.row.replica, launched.row.incarnation)

    def _old_ref(self) -> GuestRef:
        return GuestRef(self._op.group, self._replica, self._old.incarnation)

    def _last(self, stage: str) -> dict[str, Any]:
        """The result of the last finished stage of that name."""
        done = [s for s in self._op.steps() if s.name.endswith(f"/{stage}") and s.name.startswith("stage/")]
        return next((s.result for s in reversed(done) if s.result is not None), {})

    def _result(self, end: Stage) -> Recovered:
        steps = self._op.steps()
        began = {s.name.rpartition("/")[2]: s.began_s for s in steps if s.name.startswith("stage/")}
        ended = {s.name.rpartition("/")[2]: s.ended_s for s in steps if s.name.startswith("stage/") and s.ended_s}

        def between(first: str, last: str) -> float | None:
            return round(ended[last] - began[first], 3) if first in began and last in ended else None

        new = [m for m in self._x.journal.machines(self._op.group, gone=True) if m.operation == self._op.id]
        transfer = self._last("extract").get("transfer") or self._last("precopy").get("transfer", {})
        return Recovered(
            group=self._op.group,
            replica=self._replica,
            outcome=end.value,
            c=self._last("activate").get("c", self._base.c),
            old_incarnation=self._old.incarnation,
            new_incarnation=next((m.incarnation for m in new if m.role == "replica"), 0),
            lost=self._circumstances.lost,
            suspected=self._circumstances.suspected,
            transfer=transfer,
            replica_outage_s=between("freeze", "ready"),
            group_outage_s=between("prepare", "activate"),
            total_s=round((steps[-1].ended_s or 0) - steps[0].began_s, 3) if steps else 0.0,
        )

    def _say(self, stage: str, message: str) -> None:
        self._x.report(Progress("recover", stage, f"{self._op.group}/{self._replica}", message))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
