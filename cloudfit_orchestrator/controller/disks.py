"""What replicas last said of their state disks: a replica whose disk is full has stopped voting, and says so."""

from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Context
from cloudfit_orchestrator.model.errors import BadError, UnknownError
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec

MAX_PAGES = 64  # of reports; an agent keeps 1 MiB a guest, and gives 1 MiB a page
_STATES = frozenset({"ok", "full", "failed", "unusable"})  # anything else is a faulty guest's word

Guest = tuple[str, int]  # (replica, incarnation)


def disks(context: Context, spec: GroupSpec) -> dict[Guest, str]:
    """The last `storage` report of each guest of the group; those that never had trouble are absent."""
    clouds = [c for c in spec.clouds if spec.replicas_on(c.name)]

    def on_cloud(cloud: CloudSpec) -> dict[Guest, str]:
        found: dict[Guest, str] = {}
        try:
            agent = context.sites.agent(cloud, start=False)
            since = 0
            for _ in range(MAX_PAGES):
                reports, following = agent.reports(since, 0.0, spec.group)
                for report in reports:
                    if report.topic == "storage":
                        said = str(report.body.get("state"))
                        found[report.guest.replica, report.guest.incarnation] = said if said in _STATES else "unknown"
                if following == since or not reports:
                    break
                since = following
        except (BadError, UnknownError):
            pass  # who does not answer, or is another, is unknown on the axis of reachability
        return found

    return {guest: state for some in each(context, clouds, on_cloud).values() for guest, state in some.items()}
