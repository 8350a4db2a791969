"""A group that serves becomes another one: grow, shrink, move, another f, k, algorithm or parameters (protocol §6).

One configuration record on the present base, whatever differs. Order: new machines are launched and follow the group
as learners; only when all of them are up to date PREPARED is written, which wedges base; the successor is confirmed,
the epochs of its members are closed, ACTIVE is swapped in; then the machines that are no members any more go. Killed
anywhere, run again, it goes on. Until PREPARED is written another spec withdraws it and nothing has changed; after it
another spec makes another record on the same base; once ACTIVE is sealed it is finished first.
"""

from dataclasses import dataclass, replace

from cloudfit_orchestrator.controller import preflight
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.agents import GuestRef, Report
from cloudfit_orchestrator.controller.apply import (
    Applied,
    active_record,
    apply,
    draft_record,
    image_of,
    launch_all,
    pin,
    seat,
)
from cloudfit_orchestrator.controller.configure import Configurer
from cloudfit_orchestrator.controller.destroy import clear, leave
from cloudfit_orchestrator.controller.difference import Difference, compare, settle
from cloudfit_orchestrator.controller.journal import GroupRow, GroupState, MachineRow, Operation
from cloudfit_orchestrator.controller.launch import Launched, let_in, unmake
from cloudfit_orchestrator.controller.parallel import each, watch
from cloudfit_orchestrator.controller.ports import Agent, Context, Progress
from cloudfit_orchestrator.controller.standing import Standing, record_of
from cloudfit_orchestrator.controller.survey import survey
from cloudfit_orchestrator.model.errors import CloudfitError, LockedOutError, RefusedError, UnknownError
from cloudfit_orchestrator.model.record import ConfigRecord, open_record
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec
from cloudfit_orchestrator.recovery.budget import Condition

PRECOPY_TIMEOUT_S = 300.0  # software emulation copies slowly; running again goes on waiting
KIND = "change"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `ensure` would do. `exists` False: the group would be made. `spec` has the replicas where they would be."""

    group: str
    spec: GroupSpec
    exists: bool
    differences: tuple[Difference, ...]

    @property
    def pending(self) -> bool:
        """Something would be done."""
        return not self.exists or bool(self.differences)


def plan(context: Context, spec: GroupSpec) -> Plan:
    """The differences between the group and `spec`; nothing is written. RefusedError for what cannot be changed."""
    known = context.journal.group(spec.group)
    if known is None or known.state is GroupState.APPLYING:
        return Plan(spec.group, spec, exists=False, differences=())
    _refuse_destroying(known)
    begun = context.journal.open_of(spec.group)
    found = _differences(context, known, spec)
    if begun is not None and begun.kind == KIND:
        found.append(Difference("change", "begun, not finished", "finished or withdrawn", "note"))
    return Plan(spec.group, _settled(context, spec), exists=True, differences=tuple(found))


def ensure(context: Context, spec: GroupSpec) -> Applied:
    """Make the group be as `spec` says, from nothing or from what it is. Safe to repeat.

    Raises RefusedError for what cannot be changed, or if too few members answer for it.
    """
    known = context.journal.group(spec.group)
    if known is None or known.state is GroupState.APPLYING:
        return apply(context, spec)
    _refuse_destroying(known)
    begun = context.journal.open_of(spec.group)
    if begun is not None and begun.kind == KIND:
        change = _Change(context, begun)
        if change.is_for(spec):
            return change.run()
        change.settle_before_another()
        known = context.journal.group(spec.group)
        assert known is not None
    elif begun is not None and begun.kind == "apply":  # died between its last two writes
        begun.close({})
    wanted = _settled(context, spec)
    found = _differences(context, known, spec)
    if not found:
        return apply(context, spec_file.from_json(known.spec))
    base = active_record(context, spec.group)
    new = _coming(wanted, base)
    images = {r: image_of(context, wanted, r) for r, _ in new}
    if new:
        preflight.check(context, replace(wanted, placement=new), images)
    arguments = {
        "spec": spec_file.to_json(wanted),
        "old": known.spec,
        "base": base.c,
        "reconfigure": any(d.by == "configuration" for d in found),
        "images": {r: pin(image) for r, image in images.items()},
    }
    if arguments["reconfigure"]:
        _check_budget(context, spec_file.from_json(known.spec), wanted, base)
    return _Change(context, context.journal.open_operation(KIND, spec.group, "", arguments)).run()


def _refuse_destroying(known: GroupRow) -> None:
    if known.state is GroupState.DESTROYING:
        raise RefusedError(
            f"group {known.name} is being destroyed", next_command=f"cloudfit group destroy {known.name}"
        )


def _settled(context: Context, spec: GroupSpec) -> GroupSpec:
    return settle(spec, {m.replica: m.cloud for m in active_record(context, spec.group).members})


def _differences(context: Context, known: GroupRow, spec: GroupSpec) -> list[Difference]:
    base = active_record(context, spec.group)
    wanted = _settled(context, spec)
    found = compare(spec_file.from_json(known.spec), wanted, base, context.clients)
    newest = max(open_record(entry.envelope, context.trusted).c for entry in context.store.log(spec.group))
    if newest > base.c:  # base is wedged: only another record lets the group go on
        found.append(Difference("configuration", f"{base.c}, ended by {newest}", "a new one", "configuration"))
    if context.journal.open_of(spec.group) is None:
        found += [Difference(f"machine {m.peer_id}", m.cloud, "-", "note") for m in _strangers(context, base)]
    return found


def _strangers(context: Context, record: ConfigRecord) -> list[MachineRow]:
    """Machines of the group that are no members."""
    members = {m.incarnation for m in record.members}
    return [m for m in context.journal.machines(record.group) if m.incarnation not in members]


def _coming(wanted: GroupSpec, base: ConfigRecord) -> tuple[tuple[str, str], ...]:
    """(replica, cloud) of all that need a new machine."""
    here = {m.replica: m.cloud for m in base.members}
    return tuple((r, cloud) for r, cloud in wanted.placement if here.get(r) != cloud)


def _check_budget(context: Context, now: GroupSpec, wanted: GroupSpec, base: ConfigRecord) -> None:
    """Raises RefusedError if base could not be wedged, or its successor would begin with more than f members out."""
    conditions = survey(context, now, base)
    out = [r for r, condition in conditions.items() if condition is not Condition.SERVING]
    bring_back = "cloudfit recovery start for those that are out, or bring their clouds back"
    allowed, quorum = base.f + base.k, base.quorums.view_change
    if len(out) > allowed or base.n - len(out) < quorum:
        raise RefusedError(
            f"{len(out)} of {base.n} replicas of {base.group} are out ({', '.join(out)}): "
            f"f={base.f}, k={base.k} allow {allowed}, and it takes {quorum} to end configuration {base.c}",
            next_command=bring_back,
        )
    moved = {r for r, _ in _coming(wanted, base)}
    staying = [r for r in out if r not in moved and r in dict(wanted.placement)]
    if len(staying) > wanted.f:
        raise RefusedError(
            f"{', '.join(staying)} would be out from the start, f={wanted.f} allows {wanted.f} of {wanted.n}",
            next_command=bring_back,
        )


class _Change:
    def __init__(self, context: Context, operation: Operation) -> None:
        self._x = context
        self._op = operation
        a = operation.arguments
        self._old = spec_file.from_json(a["old"])
        self._wanted = spec_file.from_json(a["spec"])
        self._both = _union(self._old, self._wanted)
        self._base, self._base_envelope = record_of(context, operation.group, a["base"])
        self._new = _coming(self._wanted, self._base)
        fresh = {r for r, _ in self._new}
        self._stay = {m.replica: m for m in self._base.members if m.replica not in fresh}
        self._leave = [
            m for m in self._base.members if m.replica in fresh or m.replica not in dict(self._wanted.placement)
        ]
        self._standing = Standing(context, KIND, operation.group, self._both.clouds)
        self._left: list[str] = []

    def is_for(self, spec: GroupSpec) -> bool:
        """Whether it was begun for that spec and is not being withdrawn."""
        here = {m.replica: m.cloud for m in self._base.members}
        return self._op.find("withdraw") is None and settle(spec, here) == self._wanted

    def run(self) -> Applied:
        group = self._op.group
        if self._op.arguments["reconfigure"] and self._op.find("clean") is None:
            self._x.journal.put_group(group, GroupState.CHANGING, spec_file.to_json(self._both))
            self._reconfigure()
        left = tuple(self._op.step("clean", lambda _: {"left": self._clean(self._wanted)})["left"])
        self._x.journal.put_group(group, GroupState.ACTIVE, spec_file.to_json(self._kept(self._wanted)))
        record = active_record(self._x, group)
        outage = self._outage_s()
        self._op.close({"c": record.c, "outage_s": outage, "left": left})
        return Applied(group, changed=True, c=record.c, members=record.members, outage_s=outage, left=left)

    def settle_before_another(self) -> None:
        """Another spec is wanted now: finish what nobody can take back any more, withdraw the rest."""
        sealed = [s for s in self._op.steps() if s.name.startswith("active/") and not self._superseded(s.name)]
        if sealed or self._op.find("clean") is not None:
            self.run()
            return
        self._op.step("withdraw", lambda _: self._withdraw())
        self._x.journal.put_group(self._op.group, GroupState.ACTIVE, spec_file.to_json(self._kept(self._old)))
        self._op.close({"why": "another spec was applied"}, state="abandoned")

    def _superseded(self, step: str) -> bool:
        return self._op.find(f"superseded/{step.rpartition('/')[2]}") is not None

    def _withdraw(self) -> dict[str, object]:
        """Nothing has changed for the group, or base is wedged and waits for another record."""
        self._say("withdraw", "the new machines go")
        for row in _strangers(self._x, self._base):
            self._standing.tell(self._base.members, {"op": "forget", "peer_id": row.peer_id})
        return {"left": self._clean(self._old)}

    def _reconfigure(self) -> None:
        launched = self._launch()
        if not any(s.name.startswith("prepared/") for s in self._op.steps()):
            self._precopy(launched)
            _check_budget(self._x, self._both, self._wanted, self._base)  # it may have taken long
        seats = [
            seat(*launched[r]) if r in launched else self._standing.seat(self._stay[r])
            for r, _ in self._wanted.placement
        ]
        leaving = {m.cloud: agent for m in self._leave if (agent := self._standing.agent_of(m)) is not None}
        configurer = Configurer(
            self._x, self._op, seats,
            lambda c, members, previous: draft_record(
                self._x, self._wanted, self._base, c=c, members=members, previous=previous, clients=self._x.clients
            ),
            f=self._wanted.f, leaving=leaving,
        )  # fmt: skip
        configurer.run(lambda: self._standing.close(self._base.members, self._base.c))

    def _launch(self) -> dict[str, tuple[Launched, Agent]]:
        """The new machines, launched or found; admitted again in each run, which costs a measurement only."""
        only = replace(self._wanted, placement=self._new)
        pinned = self._op.arguments["images"]
        images = {r: image_of(self._x, self._wanted, r, pinned[r]) for r, _ in self._new}
        found = launch_all(self._x, self._op, only, images)
        let_in(self._x, self._both)
        return {pair[0].row.replica: pair for pair in found}

    def _precopy(self, launched: dict[str, tuple[Launched, Agent]]) -> None:
        """All new machines follow the group until they are behind by nothing."""
        if not launched:
            return

        def introduce(replica: str) -> None:
            found, agent = launched[replica]
            agent.install(self._op.group, self._base_envelope)  # a fresh agent knows no configuration
            self._standing.tell(self._base.members, {"op": "learn", "peer": found.as_peer()})
            agent.command(_ref(found.row), {"op": "base", "wait_source": False})

        for replica in launched:
            self._x.check_cancelled()
            introduce(replica)
        missing = {_ref(found.row) for found, _ in launched.values()}
        agents = {found.row.cloud: agent for found, agent in launched.values()}

        def handle(report: Report) -> bool:
            if report.topic == "learner" and report.body.get("behind") == 0:
                missing.discard(report.guest)
            return not missing

        def waiting() -> str:
            return (
                f"{', '.join(sorted(g.replica for g in missing))} to catch up; configuration {self._base.c} serves on"
            )

        self._say("precopy", f"{', '.join(launched)} take over the state")
        watch(self._x, agents, self._op.group, handle, timeout_s=PRECOPY_TIMEOUT_S, waiting_for=waiting)

    # --- what is not wanted any more

    def _clean(self, spec: GroupSpec) -> list[str]:
        """Machines that are no members go, then clouds in which nothing is left. Returns what had to be left."""
        rows = _strangers(self._x, active_record(self._x, self._op.group))
        by_cloud = {c: [m for m in rows if m.cloud == c.name] for c in self._both.clouds}
        left = each(self._x, [c for c in by_cloud if by_cloud[c]], lambda c: self._remove(c, by_cloud[c]))
        let_in(self._x, self._both)
        held = {m.cloud for m in self._x.journal.machines(self._op.group)}
        once = {m.cloud for m in self._x.journal.machines(self._op.group, gone=True)}
        once |= {cloud for _, cloud in self._new}  # died before the first machine was planned there
        empty = [c for c in self._both.clouds if c.name in once - held and not spec.replicas_on(c.name)]
        for cloud in empty:
            try:
                clear(self._x, self._op.group, cloud)  # evidence of old incarnations
                leave(self._x, self._op.group, [cloud])
            except (UnknownError, LockedOutError) as error:
                self._give_up(cloud, error)
        return [name for names in left.values() for name in names]

    def _remove(self, cloud: CloudSpec, rows: list[MachineRow]) -> list[str]:
        for i, row in enumerate(rows):
            try:
                self._evict(cloud, row)
                unmake(self._x, cloud, row)
            except (UnknownError, LockedOutError) as error:
                self._give_up(cloud, error)
                return [r.peer_id for r in rows[i:]]
            self._x.journal.machine_gone(row)
        return []

    def _evict(self, cloud: CloudSpec, row: MachineRow) -> None:
        """Keys go first. A local agent that does not run has none; a remote one may only be out of reach."""
        try:
            agent = self._x.sites.agent(cloud, start=False)
        except UnknownError:
            if not cloud.local:
                raise
            return
        agent.evict(_ref(row))

    def _give_up(self, cloud: CloudSpec, error: CloudfitError) -> None:
        self._x.check_cancelled()
        say = f"what is left in {cloud.name} goes with a later apply: {error.fact}"
        self._x.report(Progress(KIND, "warning", f"{self._op.group}/{cloud.name}", say))

    def _kept(self, spec: GroupSpec) -> GroupSpec:
        """`spec` and the clouds that still hold machines, so that whoever looks for machines finds them."""
        held = {m.cloud for m in self._x.journal.machines(self._op.group)}
        names = {c.name for c in spec.clouds}
        return replace(
            spec, clouds=(*spec.clouds, *(c for c in self._both.clouds if c.name in held and c.name not in names))
        )

    def _outage_s(self) -> float | None:
        """From the first PREPARED, which wedges, until ACTIVE is installed."""
        steps = self._op.steps()
        began = [s.began_s for s in steps if s.name.startswith("prepared/")]
        ended = [s.ended_s for s in steps if s.name.startswith("install-active/") and s.ended_s]
        return round(ended[-1] - began[0], 3) if began and ended else None

    def _say(self, stage: str, message: str) -> None:
        self._x.report(Progress(KIND, stage, self._op.group, message))


def _union(old: GroupSpec, wanted: GroupSpec) -> GroupSpec:
    """`wanted` with the clouds of `old` too: whoever looks for the group's machines meanwhile finds all of them."""
    names = {c.name for c in wanted.clouds}
    return replace(wanted, clouds=(*wanted.clouds, *(c for c in old.clouds if c.name not in names)))


def _ref(row: MachineRow) -> GuestRef:
    return GuestRef(row.group, row.replica, row.incarnation)
