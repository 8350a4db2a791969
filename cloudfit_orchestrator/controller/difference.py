"""What lies between a group as it is and as its owner wants it now. No I/O: two specs and the ACTIVE record in.

What the record says needs a new configuration; the rest is noted and holds for the machines that are made from then on.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from cloudfit_orchestrator.controller.placement import losses, members_needed
from cloudfit_orchestrator.model.errors import BadInputError, RefusedError
from cloudfit_orchestrator.model.record import MAX_MEMBERS, Client, ConfigRecord, Parameters
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, Trust

NOWHERE = "-"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is to change. `by`: `configuration` (members agree on it) or `note` (from the next machine on)."""

    what: str
    now: str
    wanted: str
    by: str


def compare(now: GroupSpec, wanted: GroupSpec, base: ConfigRecord, clients: tuple[Client, ...]) -> list[Difference]:
    """All differences, those of the record first. `wanted` is settled. RefusedError for what cannot be changed."""
    _refuse(now, wanted, base)
    found = _of_record(wanted, base, clients)
    found += _of_members(wanted, base)
    a, b = (c.name for c in now.clouds), (c.name for c in wanted.clouds)
    found += _note("clouds", ", ".join(a), ", ".join(b))
    for cloud in wanted.clouds:
        before = next((c for c in now.clouds if c.name == cloud.name), cloud)
        if before != cloud:
            found.append(Difference(f"cloud {cloud.name}", "settings", "other settings", "note"))
    for name in ("image", "allow_adversary", "adversary", "protect"):
        found += _note(name, getattr(now, name), getattr(wanted, name))
    for name in ("recovery", "sizes"):
        old, new = asdict(getattr(now, name)), asdict(getattr(wanted, name))
        for key in new:
            found += _note(f"{name}.{key}", old[key], new[key])
    return found


def _refuse(now: GroupSpec, wanted: GroupSpec, base: ConfigRecord) -> None:
    if wanted.group != now.group:
        raise RefusedError(f"group {now.group} cannot become {wanted.group}: its name is what its members sign for")
    if wanted.service != base.service:
        raise RefusedError(
            f"group {now.group} runs service {base.service}; its state means nothing to service {wanted.service}",
            next_command=f"name another group for {wanted.service}, or cloudfit group destroy {now.group} first",
        )
    if wanted.trust is not now.trust:
        raise RefusedError(
            f"group {now.group} has trust: {now.trust}, and keys do not move to where trust: {wanted.trust} has them",
            next_command=f"name another group, or cloudfit group destroy {now.group} first",
        )
    used = {m.cloud for m in base.members}
    for cloud in wanted.clouds:
        before = next((c for c in now.clouds if c.name == cloud.name), cloud)
        if cloud.name in used and _place(before) != _place(cloud):
            raise RefusedError(
                f"cloud {cloud.name} holds replicas of {now.group} and would be another place",
                next_command="give the new place a name of its own: the replicas move there",
            )


def _place(cloud: CloudSpec) -> tuple[object, ...]:
    """What makes a cloud the place that it is; the rest of its description may change."""
    o = cloud.openstack
    where = (o.cloud, o.region, o.network, o.hypervisor) if o else ()
    return (cloud.driver, cloud.uri, cloud.network or None, where)


def _of_record(wanted: GroupSpec, base: ConfigRecord, clients: tuple[Client, ...]) -> list[Difference]:
    pairs: list[tuple[str, object, object]] = [
        ("f", base.f, wanted.f),
        ("k", base.k, wanted.k),
        ("algorithm", str(base.algorithm), wanted.algorithm.value),
    ]
    pairs += [
        (p.name, getattr(base.parameters, p.name), getattr(wanted.parameters, p.name)) for p in fields(Parameters)
    ]
    found = [Difference(name, str(a), str(b), "configuration") for name, a, b in pairs if a != b]
    if base.clients != clients:
        a, b = (", ".join(c.name for c in some) for some in (base.clients, clients))
        found.append(Difference("clients", a, b if b != a else f"{b} (other keys)", "configuration"))
    return found


def _of_members(wanted: GroupSpec, base: ConfigRecord) -> list[Difference]:
    here, there = {m.replica: m.cloud for m in base.members}, dict(wanted.placement)
    names = [*here, *(r for r in there if r not in here)]
    return [
        Difference(f"replica {r}", here.get(r, NOWHERE), there.get(r, NOWHERE), "configuration")
        for r in names
        if here.get(r) != there.get(r)
    ]


def _note(what: str, a: object, b: object) -> list[Difference]:
    return [Difference(what, str(a), str(b), "note")] if a != b else []


def settle(wanted: GroupSpec, here: Mapping[str, str]) -> GroupSpec:
    """`wanted` with as few moves as may be: who runs on a cloud that still has room for it stays.

    `here`: replica -> cloud. A cloud holds no more than an even spread needs, which the spec was checked for.
    """
    names = wanted.serving
    most = -(-wanted.n // len(names))
    count: Counter[str] = Counter()
    settled: dict[str, str] = {}
    for replica, _ in wanted.placement:
        cloud = here.get(replica)
        if cloud in names and count[cloud] < most:
            settled[replica] = cloud
            count[cloud] += 1
    for replica, _ in wanted.placement:
        if replica not in settled:
            cloud = min(names, key=lambda name: (count[name], names.index(name)))
            settled[replica] = cloud
            count[cloud] += 1
    placement = tuple((replica, settled[replica]) for replica, _ in wanted.placement)
    return replace(wanted, placement=placement, not_tolerated=losses(placement, wanted.f, names))


def evacuated(spec: GroupSpec, lost: str) -> GroupSpec:
    """`spec` with its first reserve in the place of the cloud `lost`, which becomes a reserve: it gets no replica any
    more until its owner says otherwise. BadInputError if there is no such cloud, or no reserve for it.
    """
    clouds = {c.name: c for c in spec.clouds}
    if lost not in clouds:
        raise BadInputError(f"{spec.group} has no cloud {lost}; it has {', '.join(clouds)}")
    if clouds[lost].reserve:
        raise BadInputError(f"cloud {lost} is a reserve of {spec.group}: there is nothing to evacuate")
    reserve = next((c.name for c in spec.clouds if c.reserve), None)
    if reserve is None:
        raise BadInputError(
            f"no cloud of {spec.group} is a reserve, so nothing can take the place of {lost}",
            next_command="add another cloud to the spec, with reserve: true, and cloudfit group apply",
        )
    swapped = tuple(replace(c, reserve=c.name == lost) if c.name in (lost, reserve) else c for c in spec.clouds)
    placement = tuple((r, reserve if c == lost else c) for r, c in spec.placement)
    return replace(spec, clouds=swapped, placement=placement)


def scaled(spec: GroupSpec, f: int, k: int) -> GroupSpec:
    """`spec` for other f and k, on the same clouds. BadInputError if they are too few for it."""
    n = members_needed(spec.algorithm, f, k)
    if not 0 < n <= MAX_MEMBERS:
        raise BadInputError(f"f={f}, k={k} needs {n} replicas, the limit is {MAX_MEMBERS}")
    names = spec.serving
    each = -(-n // len(names))
    if spec.trust is Trust.NONE and not 0 < f >= each:
        raise BadInputError(
            f"with trust: none each of the {len(names)} clouds holds at most f={f} of {n} replicas, and f is not 0",
            next_command="name more clouds in the spec, then cloudfit group apply",
        )
    if each > f > 0 and not spec.not_tolerated:  # else the owner has given up the loss of a whole cloud before
        raise BadInputError(
            f"{n} replicas do not fit on {len(names)} clouds with at most f={f} on each",
            next_command=f"name {-(-n // f)} clouds in the spec, and f: {f}, then cloudfit group apply",
        )
    replicas = [f"r{i}" for i in range(n)]
    placement = tuple((replica, names[i % len(names)]) for i, replica in enumerate(replicas))
    adversary = tuple(r for r in spec.adversary if r in replicas)
    return replace(spec, f=f, k=k, placement=placement, adversary=adversary)
