"""The placement proof: what a group's placement survives, and what it does not. No I/O: a spec in.

A *domain* is something that fails, or is taken over, as a whole. The group survives it exactly if it holds at most f
replicas, each of which may then lie (Byzantine) or be gone.
"""

from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, Trust


@dataclass(frozen=True, slots=True)
class Domain:
    """One thing that can be lost at once."""

    kind: str  # cloud | account | zone | host | image
    name: str
    replicas: tuple[str, ...]
    survived: bool


def proof(spec: GroupSpec) -> tuple[Domain, ...]:
    """All domains that hold a replica: by kind in the order above, then in the order of the spec's clouds."""
    held: dict[tuple[str, str], list[str]] = {}
    for kind in ("cloud", "account", "zone", "host"):
        for replica, _ in spec.placement:
            if name := _domain(kind, spec.cloud_of(replica)):
                held.setdefault((kind, name), []).append(replica)
    for replica, _ in spec.placement:
        image = "adversary" if replica in spec.adversary else spec.image
        held.setdefault(("image", image), []).append(replica)
    return tuple(
        Domain(kind, name, tuple(replicas), survived=len(replicas) <= spec.f) for (kind, name), replicas in held.items()
    )


def malicious_cloud(spec: GroupSpec) -> str:
    """What it means for this group that a cloud is itself malicious, in words."""
    if spec.trust is Trust.HYPERVISOR:
        return "trust: hypervisor: agents on the hosts are believed; a host whose root is malicious is NOT survived"
    held = Counter(_provider(spec.cloud_of(replica)) for replica, _ in spec.placement)
    ((worst, most),) = held.most_common(1)
    within = f"each holds at most {most}, so it counts within f={spec.f}"
    verdict = within if most <= spec.f else f"{worst} holds {most}, more than f={spec.f}: NOT survived"
    return f"trust: none: a cloud that is itself malicious has the keys of the replicas on it; {verdict}"


def _provider(cloud: CloudSpec) -> str:
    """Who would be malicious: several entries may be of one OpenStack or one remote host. This host is believed anyway,
    since the controller runs on it.
    """
    if cloud.openstack is not None:
        return cloud.openstack.cloud
    return cloud.name if cloud.local else str(urlsplit(cloud.uri).hostname)


def _domain(kind: str, cloud: CloudSpec) -> str:
    """The domain of that kind that the cloud's machines are in; empty where it has nothing of the kind."""
    place = cloud.openstack
    if kind == "cloud":
        return cloud.name
    if kind == "host":  # one agent serves all machines of a cloud, so they run on its host; without, nobody knows
        if cloud.openstack and cloud.trust is Trust.NONE:
            return ""
        return "this host" if cloud.local else str(urlsplit(cloud.uri).hostname)
    if place is None:
        return ""
    if kind == "account":
        return f"{place.cloud} {place.region}".strip()
    return f"{place.cloud} {place.availability_zone}" if place.availability_zone else ""
