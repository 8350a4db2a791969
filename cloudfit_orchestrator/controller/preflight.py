"""Before a group is made: everything that would fail, on all its clouds, at once."""

import ipaddress
from dataclasses import dataclass

from cloudfit_orchestrator.clouds.base import Demand, Finding
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import RECOVERY_IMAGE, Context, Image
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, PermanentError, UnknownError
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec


@dataclass(frozen=True, slots=True)
class OnCloud:
    """A finding and where it was made; `cloud` is empty for what concerns the group as a whole."""

    cloud: str
    finding: Finding


def examine(context: Context, spec: GroupSpec, images: dict[str, Image], *, probe: bool = False) -> list[OnCloud]:
    """All findings, side by side over the clouds. `images` by replica, as far as they are known."""
    used = [c for c in spec.clouds if spec.replicas_on(c.name)]

    def on_cloud(cloud: CloudSpec) -> list[OnCloud]:
        try:
            found = list(context.sites.cloud(cloud).preflight(_demand(context, spec, cloud, images), probe=probe))
        except CloudfitError as error:
            found = [Finding("cloud", "fail", error.fact, error.next_command)]
        return [OnCloud(cloud.name, f) for f in [*found, *_agent(context, cloud)]]

    found = [f for some in each(context, used, on_cloud).values() for f in some]
    return found + [OnCloud("", f) for f in _networks(context, used)]


def check(context: Context, spec: GroupSpec, images: dict[str, Image]) -> None:
    """Raises PermanentError that names every finding that would make `apply` fail."""
    wrong = [f for f in examine(context, spec, images) if f.finding.verdict == "fail"]
    if wrong:
        lines = [
            f"  {f.cloud or spec.group}: {f.finding.name}: {f.finding.finding}"
            + f" ({f.finding.fix})" * bool(f.finding.fix)
            for f in wrong
        ]
        raise PermanentError(
            f"group {spec.group} cannot be made: {len(wrong)} things are in the way\n" + "\n".join(lines),
            next_command="mend them, then run the command again; cloudfit group preflight shows all findings",
        )


def _demand(context: Context, spec: GroupSpec, cloud: CloudSpec, images: dict[str, Image]) -> Demand:
    here = [images[r].manifest for r in spec.replicas_on(cloud.name) if r in images]
    return Demand(
        machines=len(spec.replicas_on(cloud.name)),
        memory_mib=spec.sizes.memory_mib,
        cpus=spec.sizes.cpus,
        state_mib=spec.sizes.state_mib,
        root_bytes=max((m.disk_bytes for m in here), default=0),
        no_disk=tuple(sorted({m.name for m in here if not m.disk})),
        command_line=max((m.command_line for m in here), key=len, default=""),
        recovery_command_line=_recovery_command_line(context, cloud),
    )


def _recovery_command_line(context: Context, cloud: CloudSpec) -> str:
    """Empty where there is no recovery image yet: a group is made without one."""
    if cloud.driver != "openstack":  # who alone asks for it
        return ""
    try:
        return context.images.verified(RECOVERY_IMAGE, cloud.driver, allow_adversary=False).manifest.command_line
    except CloudfitError:
        return ""


def _agent(context: Context, cloud: CloudSpec) -> list[Finding]:
    """An agent that the controller does not start must be there already."""
    if not cloud.agent_socket:
        return []
    try:
        context.sites.agent(cloud, start=False)
    except (BadError, UnknownError) as error:
        return [Finding("agent", "fail", error.fact, error.next_command)]
    return [Finding("agent", "ok", f"answers at {cloud.agent_socket}")]


def _networks(context: Context, clouds: list[CloudSpec]) -> list[Finding]:
    """Members reach each other by routes, so no two of the operators' networks may have addresses in common."""
    known: dict[str, ipaddress.IPv4Network] = {}
    for cloud in clouds:
        try:
            given = context.sites.cloud(cloud).given_network(cloud.name)
        except CloudfitError:
            continue  # the cloud's own findings say it
        if given is not None:
            known[cloud.name] = ipaddress.IPv4Network(f"{given.address}/{given.prefix}")
    names = sorted(known)
    fix = "name networks with other addresses, routed to each other"
    return [
        Finding("networks", "fail", f"{a} and {b} both have {known[a]}, {known[b]}", fix)
        for i, a in enumerate(names) for b in names[i + 1 :]
        if known[a].overlaps(known[b]) and _place(clouds, a) != _place(clouds, b)
    ]  # fmt: skip


def _place(clouds: list[CloudSpec], name: str) -> tuple[str, str, str] | None:
    found = next((c.openstack for c in clouds if c.name == name), None)
    return None if found is None else (found.cloud, found.region, found.network)
