"""What this home has in clouds and does not know any more: found over all clouds that any of its groups ever named."""

from dataclasses import dataclass

from cloudfit_orchestrator.clouds.base import Orphan, Ownership
from cloudfit_orchestrator.controller import spec as spec_file
from cloudfit_orchestrator.controller.launch import network_name, ownership
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.model.errors import CloudfitError
from cloudfit_orchestrator.model.spec import CloudSpec


@dataclass(frozen=True, slots=True)
class Found:
    """The orphans in one cloud, or why it could not be looked at."""

    cloud: CloudSpec
    orphans: tuple[Orphan, ...] = ()
    problem: str = ""


def clouds_of(context: Context) -> list[CloudSpec]:
    """Every cloud that a group of this home ever named; one that stands under several names once."""
    found: dict[tuple[object, ...], CloudSpec] = {}
    for row in context.journal.groups(gone=True):
        for cloud in spec_file.from_json(row.spec).clouds:
            found.setdefault((cloud.driver, cloud.uri, cloud.openstack), cloud)
    return list(found.values())


def orphans(context: Context) -> list[Found]:
    """Side by side over the clouds. One that does not answer has a `problem`, the others are listed all the same."""
    journal = context.journal
    known = [ownership(context, row) for row in journal.machines()]
    evidence: list[Ownership] = [
        ownership(context, row) for group in journal.groups() for row in journal.machines(group.name, gone=True)
    ]
    named = {c.name for group in journal.groups() for c in spec_file.from_json(group.spec).clouds}
    networks = [network_name(context, cloud) for cloud in sorted({*journal.networks(), *named})]

    def on_cloud(cloud: CloudSpec) -> Found:
        try:
            driver = context.sites.cloud(cloud)
            return Found(cloud, tuple(driver.orphans(journal.deployment, known, evidence=evidence, networks=networks)))
        except CloudfitError as error:
            return Found(cloud, problem=error.fact)

    return list(each(context, clouds_of(context), on_cloud).values())


def sweep(context: Context) -> list[Found]:
    """Delete all orphans; what was deleted, by cloud. A cloud that could not be cleared has a `problem`."""
    done = []
    for found in orphans(context):
        if not found.orphans:
            done.append(found)
            continue
        context.check_cancelled()
        say = f"{len(found.orphans)} orphans in {found.cloud.name}"
        context.report(Progress("orphans", "sweep", found.cloud.name, say))
        try:
            context.sites.cloud(found.cloud).sweep(context.journal.deployment, found.orphans)
        except CloudfitError as error:
            done.append(Found(found.cloud, problem=error.fact))
            continue
        done.append(found)
    return done
