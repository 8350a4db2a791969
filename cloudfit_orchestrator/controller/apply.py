"""`group apply`: from a spec to a serving group, journalled and idempotent; side by side over the clouds.

Order: network, image verification (SIL) and agent of each cloud; machines created and admitted; the first
configuration, exactly like every later one. Killed anywhere, run again, it ends in the same place.
"""

from dataclasses import dataclass

from cloudfit_orchestrator.controller import preflight
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.configure import Configurer, Seat
from cloudfit_orchestrator.controller.journal import GroupState, Operation
from cloudfit_orchestrator.controller.launch import Launched, ensure_network, launch, let_in
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Agent, Context, Image, Progress
from cloudfit_orchestrator.model.errors import CloudfitError, PermanentError, RefusedError
from cloudfit_orchestrator.model.record import Client, ConfigRecord, Member, check_confirmations, open_record
from cloudfit_orchestrator.model.signing import Ed25519Verifier
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec

ADVERSARY_IMAGE = "adversary"


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` found or did. `outage_s`: how long a change kept clients waiting, from PREPARED to ACTIVE.
    `left`: machines that are no members any more and could not be removed, as their clouds do not answer.
    """

    group: str
    changed: bool
    c: int
    members: tuple[Member, ...]
    outage_s: float | None = None
    left: tuple[str, ...] = ()


def image_of(context: Context, spec: GroupSpec, replica: str, pinned: str = "") -> Image:
    """The verified image that `replica` boots: the SIL's verdict comes before any cloud call. `pinned`: what the
    operation began with, as a name may mean another image when it is run again.
    """
    reference = pinned or (ADVERSARY_IMAGE if replica in spec.adversary else spec.image)
    return context.images.verified(reference, spec.cloud_of(replica).driver, allow_adversary=spec.allow_adversary)


def pin(image: Image) -> str:
    """The reference that means this very image for ever."""
    return f"{image.manifest.name}@{image.digest}"


def draft_record(
    context: Context,
    spec: GroupSpec,
    base: ConfigRecord | None,
    *,
    c: int,
    members: tuple[Member, ...],
    previous: bytes,
    clients: tuple[Client, ...] | None = None,
) -> ConfigRecord:
    """The PREPARED record of configuration c. `clients` None: as in `base`, or those of this home."""
    return ConfigRecord(
        group=spec.group,
        c=c,
        base=base.c if base else None,
        members=members,
        clients=clients or (base.clients if base else context.clients),
        service=spec.service,
        f=spec.f,
        k=spec.k,
        algorithm=spec.algorithm,
        parameters=spec.parameters,
        previous=previous,
        born=base.born if base else c,
    )


def apply(context: Context, spec: GroupSpec) -> Applied:
    """Make the group, or find it made. RefusedError if it exists and differs: `change.ensure` changes it."""
    text, known = spec_file.to_json(spec), context.journal.group(spec.group)
    if known is not None and known.spec != text:
        raise RefusedError(
            f"group {spec.group} exists with another spec",
            next_command=f"finish it with its first spec, then change it; or cloudfit group destroy {spec.group} first",
        )
    if known is not None and known.state is GroupState.ACTIVE:
        return _unchanged(context, spec)
    if known is not None and known.state is GroupState.DESTROYING:
        raise RefusedError(
            f"group {spec.group} is being destroyed", next_command=f"cloudfit group destroy {spec.group}"
        )
    begun = context.journal.open_of(spec.group)
    pinned = begun.arguments.get("images", {}) if begun is not None and begun.kind == "apply" else {}
    # Before anything is written or made:
    images = {r: image_of(context, spec, r, pinned.get(r, "")) for r, _ in spec.placement}
    if known is None:
        preflight.check(context, spec, images)
        context.journal.put_group(spec.group, GroupState.APPLYING, text)
    names = {replica: pin(image) for replica, image in images.items()}
    operation = context.journal.open_operation("apply", spec.group, "", {"images": names})
    launched = launch_all(context, operation, spec, images)
    let_in(context, spec)
    seats = [seat(found, agent) for found, agent in launched]
    configurer = Configurer(
        context,
        operation,
        seats,
        lambda c, members, previous: draft_record(context, spec, None, c=c, members=members, previous=previous),
        f=spec.f,
    )
    record = configurer.run()
    context.journal.put_group(spec.group, GroupState.ACTIVE)
    operation.close({"c": record.c})
    return Applied(spec.group, changed=True, c=record.c, members=record.members)


def seat(launched: Launched, agent: Agent) -> Seat:
    """The member-to-be that a launched machine is."""
    row = launched.row
    return Seat(
        row.replica, row.incarnation, row.cloud, row.address, launched.channel_ca, launched.certificate.image,
        launched.launch_digest, agent,
    )  # fmt: skip


def _unchanged(context: Context, spec: GroupSpec) -> Applied:
    operation = context.journal.open_of(spec.group)
    if operation is not None and operation.kind == "apply":  # died between the last two writes
        operation.close({})
    record = active_record(context, spec.group)
    return Applied(spec.group, changed=False, c=record.c, members=record.members)


def active_record(context: Context, group: str) -> ConfigRecord:
    """The verified ACTIVE record of `group`. Raises PermanentError if there is none."""
    envelope = context.store.active(group)
    if envelope is None:
        raise PermanentError(f"group {group} has no ACTIVE configuration", next_command="cloudfit group list")
    record = open_record(envelope, context.trusted)
    check_confirmations(record, Ed25519Verifier())
    return record


def launch_all(
    context: Context, operation: Operation, spec: GroupSpec, images: dict[str, Image]
) -> list[tuple[Launched, Agent]]:
    """All replicas of `spec`, admitted, with their agents; in the order of its placement."""
    used = [c for c in spec.clouds if spec.replicas_on(c.name)]

    def on_cloud(cloud: CloudSpec) -> list[tuple[Launched, Agent]]:
        try:
            return launch_on(cloud)
        except CloudfitError as error:  # the first one is raised when all have ended; nobody would hear of the others
            context.report(Progress(operation.kind, "failed", f"{spec.group}/{cloud.name}", error.fact))
            raise

    def launch_on(cloud: CloudSpec) -> list[tuple[Launched, Agent]]:
        say = f"network and agent of {cloud.name}"
        context.report(Progress(operation.kind, "cloud", f"{spec.group}/{cloud.name}", say))
        ensure_network(context, cloud)
        agent = context.sites.agent(cloud, start=True)

        def launch_one(replica: str) -> tuple[Launched, Agent]:
            return launch(context, operation, spec, replica=replica, image=images[replica], agent=agent), agent

        return list(each(context, spec.replicas_on(cloud.name), launch_one).values())

    done = each(context, used, on_cloud)
    by_replica = {found.row.replica: (found, agent) for pairs in done.values() for found, agent in pairs}
    return [by_replica[replica] for replica, _ in spec.placement]
