"""What is seen of a group, on three axes that are never mixed: cloud object, reachability, verification."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from cloudfit_orchestrator.controller.journal import MachineRow
from cloudfit_orchestrator.controller.launch import ownership
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, UnknownError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, Trust
from cloudfit_orchestrator.recovery.budget import Condition


@dataclass(frozen=True, slots=True)
class Seen:
    """One machine of a group. Each axis says `unknown` when nothing could be seen: never a guess from another axis."""

    replica: str
    incarnation: int
    role: str
    cloud: str
    address: str
    machine: str  # running | paused | stopped | missing | unknown
    reachable: str  # yes | no | unknown: does the guest speak on its channel
    verified: str  # good | bad | unknown: what the agent measured against the record; unmeasured: trust: none
    epoch: str  # of the ACTIVE configuration: open | frozen | ended | none | unknown
    counters: dict[str, int] = field(default_factory=dict)


class Incarnation(Protocol):
    """A member, a machine, or who is to be one."""

    @property
    def replica(self) -> str: ...

    @property
    def incarnation(self) -> int: ...


def known_to(status: dict[str, Any], group: str, member: Incarnation) -> dict[str, Any] | None:
    """The agent's entry for that guest, or None."""
    wanted = (group, member.replica, member.incarnation)
    guests: list[dict[str, Any]] = status["guests"]
    return next((g for g in guests if (g["group"], g["replica"], g["incarnation"]) == wanted), None)


def look(context: Context, spec: GroupSpec, record: ConfigRecord | None) -> list[Seen]:
    """All machines of the group, side by side over the clouds; what cannot be reached is unknown, not wrong."""
    rows = context.journal.machines(spec.group)
    clouds = [c for c in spec.clouds if any(r.cloud == c.name for r in rows)]

    def on_cloud(cloud: CloudSpec) -> list[Seen]:
        try:
            status: dict[str, Any] | None = context.sites.agent(cloud, start=False).status()
        except (BadError, UnknownError):  # of an agent with another key than the enrolled one nothing is believed
            status = None
        return [_see(context, cloud, row, record, status) for row in rows if row.cloud == cloud.name]

    found = [seen for some in each(context, clouds, on_cloud).values() for seen in some]
    return sorted(found, key=lambda s: (s.replica, s.incarnation))


def _see(
    context: Context, cloud: CloudSpec, row: MachineRow, record: ConfigRecord | None, status: dict[str, Any] | None
) -> Seen:
    try:
        machine = context.sites.cloud(cloud).find(ownership(context, row))
        state = machine.state.value if machine else "missing"
    except CloudfitError:  # whatever the driver cannot tell us is unknown
        state = "unknown"
    member = record.member(row.replica) if record else None
    if member is not None and member.incarnation != row.incarnation:
        member = None
    guest = known_to(status, row.group, row) if status is not None else None
    if status is None or f"{row.group}/{row.peer_id}" in status.get("silent", ()):
        reachable, verified, epoch = "unknown", "unknown", "unknown"
    elif guest is None:
        reachable, verified, epoch = "no", "unknown", "none"
    else:
        reachable = "yes" if guest["connected"] else "no"
        same = member is None or guest.get("image", member.image) == member.image
        verified = ("good" if same else "bad") if member is not None else "unknown"
        verified = "unmeasured" if cloud.trust is Trust.NONE else verified
        epoch = next((e["state"] for e in guest["epochs"] if record and e["c"] == record.c), "none")
    return Seen(
        row.replica, row.incarnation, row.role, row.cloud, row.address, state, reachable, verified, epoch,
        dict(guest["counters"]) if guest else {},
    )  # fmt: skip


def survey(context: Context, spec: GroupSpec, record: ConfigRecord) -> dict[str, Condition]:
    """The condition of every member of `record`, for the fault budget."""
    seen = {(s.replica, s.incarnation): s for s in look(context, spec, record)}
    conditions = {}
    for member in record.members:
        s = seen.get((member.replica, member.incarnation))
        # A cloud that cannot be asked says nothing of a machine that its agent sees at work.
        serving = s is not None and s.machine in ("running", "unknown") and s.reachable == "yes"
        conditions[member.replica] = Condition.SERVING if serving else Condition.LOST
        if s is not None and s.verified == "bad":
            conditions[member.replica] = Condition.SUSPECTED
    return conditions
