"""`group destroy`: nothing stays. Whatever carries the group's complete tags goes, known to the journal or not.

Order: new epochs become impossible (evict), machines, their snapshots, then networks and agents that no other group
uses, then the record chain is set aside. Safe to repeat; what is gone already is no error.
"""

from dataclasses import dataclass

from cloudfit_orchestrator.clouds.base import Ownership
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.agents import GuestRef
from cloudfit_orchestrator.controller.journal import GroupState
from cloudfit_orchestrator.controller.launch import network_name
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.model.errors import RefusedError, UnknownError
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec


@dataclass(frozen=True, slots=True)
class Destroyed:
    """What went."""

    group: str
    changed: bool
    machines: int
    snapshots: int


def destroy(context: Context, group: str, *, unprotect: bool = False) -> Destroyed:
    """Remove the group. RefusedError if its spec protects it and `unprotect` is not given."""
    row = context.journal.group(group)
    if row is None:
        left = context.journal.open_of(group)
        if left is not None:  # died between the last two writes
            left.close({})
        return Destroyed(group, changed=False, machines=0, snapshots=0)
    spec = spec_file.from_json(row.spec)
    if spec.protect and not unprotect and row.state is not GroupState.DESTROYING:
        raise RefusedError(
            f"group {group} is protected by its spec", next_command=f"cloudfit group destroy {group} --unprotect"
        )
    running = context.journal.open_of(group)
    if running is not None and running.kind != "destroy":
        running.close({"why": "the group is destroyed"}, state="abandoned")
    context.journal.put_group(group, GroupState.DESTROYING)
    operation = context.journal.open_operation("destroy", group, "", {})
    once = {m.cloud for m in context.journal.machines(group, gone=True)}  # a change may not have finished to clear one
    used = [c for c in spec.clouds if spec.replicas_on(c.name) or c.name in once]

    def on_cloud(cloud: CloudSpec) -> tuple[int, int]:
        context.report(Progress("destroy", "cloud", f"{group}/{cloud.name}", f"clearing {cloud.name}"))
        _evict(context, group, cloud)
        return clear(context, group, cloud)

    counts = each(context, used, on_cloud).values()
    leave(context, group, used)
    for machine in context.journal.machines(group):
        context.journal.machine_gone(machine)
    context.store.archive(group)
    context.journal.forget_head(group)
    context.journal.put_group(group, GroupState.GONE)
    operation.close({})
    return Destroyed(group, changed=True, machines=sum(m for m, _ in counts), snapshots=sum(s for _, s in counts))


def leave(context: Context, group: str, clouds: list[CloudSpec]) -> None:
    """The group has nothing in `clouds` any more: their networks and agents go, unless another group uses them."""
    shared = _clouds_of_others(context, group)
    for cloud in clouds:  # one after the other: clouds on one host list each other's networks while they clear
        if cloud.name not in shared:
            context.check_cancelled()
            context.sites.cloud(cloud).delete_network(context.journal.deployment, network_name(context, cloud.name))
            context.journal.forget_network(cloud.name)
            context.sites.stop_agent(cloud)


def _evict(context: Context, group: str, cloud: CloudSpec) -> None:
    """Keys go first. An agent that does not run has none."""
    try:
        agent = context.sites.agent(cloud, start=False)
    except UnknownError:
        if not cloud.local:
            raise  # a remote agent may only be out of reach, with the keys in its memory
        return
    for m in context.journal.machines(group, gone=True):
        if m.cloud == cloud.name:
            context.check_cancelled()
            agent.evict(GuestRef(group, m.replica, m.incarnation))


def clear(context: Context, group: str, cloud: CloudSpec) -> tuple[int, int]:
    """Destroy all that the group has in that cloud; how many machines and snapshots went."""
    driver, deployment = context.sites.cloud(cloud), context.journal.deployment
    # Several clouds may stand on one host and see each other's machines: each clears all but what is another's.
    foreign = {m.incarnation for m in context.journal.machines(group, gone=True) if m.cloud != cloud.name}

    def ours(owner: Ownership) -> bool:
        return owner.group == group and owner.incarnation not in foreign

    machines = [m for m in driver.machines(deployment) if ours(m.owner)]
    for machine in machines:
        context.check_cancelled()
        driver.destroy(machine)
    snapshots = [s for s in driver.snapshots(deployment) if ours(s.owner)]
    for snapshot in snapshots:
        context.check_cancelled()
        driver.delete_snapshot(snapshot)
    left = driver.orphans(deployment, known=[], networks=list(_network_names(context)))
    half_made = [o for o in left if o.owner is not None and ours(o.owner)]
    if half_made:  # files of a machine that never came to be
        driver.sweep(deployment, half_made)
    return len(machines), len(snapshots)


def _network_names(context: Context) -> set[str]:
    return {network_name(context, cloud) for cloud in context.journal.networks()}


def _clouds_of_others(context: Context, group: str) -> set[str]:
    specs: list[GroupSpec] = [spec_file.from_json(g.spec) for g in context.journal.groups() if g.name != group]
    return {c.name for s in specs for c in s.clouds}
