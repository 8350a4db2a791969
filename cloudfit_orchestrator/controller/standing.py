"""The members of a configuration that is ACTIVE while an operation works on its successor, and their agents."""

from collections.abc import Iterable
from typing import Any

from cloudfit_orchestrator.controller.agents import GuestRef, NoEpochError, NotAdmittedError
from cloudfit_orchestrator.controller.configure import Seat
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import Agent, Context, Progress
from cloudfit_orchestrator.controller.survey import known_to
from cloudfit_orchestrator.model.errors import BadError, CloudfitError, PermanentError, UnknownError
from cloudfit_orchestrator.model.record import ConfigRecord, Member, Status, open_record
from cloudfit_orchestrator.model.spec import CloudSpec


class Standing:
    """Who answers is asked once and remembered until `ask_again`."""

    def __init__(self, context: Context, kind: str, group: str, clouds: Iterable[CloudSpec]) -> None:
        """`kind`: of the operation, for its progress. `clouds`: all that hold a member."""
        self._x = context
        self._kind = kind
        self._group = group
        self._clouds = {c.name: c for c in clouds}
        self._agents: dict[str, Agent | None] = {}

    def ask_again(self) -> None:
        """Who answered may be gone."""
        self._agents.clear()

    def agent_of(self, member: Member) -> Agent | None:
        """The agent of a member, if it answers and knows the member."""
        if member.replica not in self._agents:
            try:
                agent = self._x.sites.agent(self._clouds[member.cloud], start=False)
                known = known_to(agent.status(), self._group, member) is not None
                self._agents[member.replica] = agent if known else None
            except (BadError, UnknownError):  # one with another key than the enrolled one holds nothing of the member
                self._agents[member.replica] = None
        return self._agents[member.replica]

    def seat(self, m: Member) -> Seat:
        """The same member in the next configuration."""
        return Seat(m.replica, m.incarnation, m.cloud, m.address, m.channel_ca, m.image, m.launch, self.agent_of(m))

    def tell(self, members: Iterable[Member], body: dict[str, Any]) -> None:
        """Command all that can be reached."""

        def tell(member: Member) -> None:
            agent = self.agent_of(member)
            if agent is None:
                return
            try:
                agent.command(GuestRef(self._group, member.replica, member.incarnation), body)
            except CloudfitError as error:  # it is out already; the configuration that follows tells it the rest
                if not (agent.inside or isinstance(error, UnknownError)):
                    raise
                say = f"{member.replica} cannot be told: {error.fact}"
                self._x.report(Progress(self._kind, body["op"], f"{self._group}/{member.replica}", say))

        each(self._x, members, tell)

    def close(self, members: Iterable[Member], c: int) -> None:
        """EPOCH-END of all that can be reached, ahead of ACTIVE: none of their words in c comes later. Who is out of
        reach counts in c until its lease is over.
        """

        def close(member: Member) -> None:
            agent = self.agent_of(member)
            if agent is None:
                return
            try:
                agent.close_epoch(GuestRef(self._group, member.replica, member.incarnation), c)
            except CloudfitError as error:
                self._x.check_cancelled()
                if not (agent.inside or isinstance(error, NotAdmittedError | NoEpochError | UnknownError)):
                    raise
                self._x.report(Progress(self._kind, "close", self._group, f"{member.replica}: {error.fact}"))

        each(self._x, members, close)


def record_of(context: Context, group: str, c: int) -> tuple[ConfigRecord, bytes]:
    """The ACTIVE record of configuration c and its envelope, also if it is not the newest any more."""
    for entry in reversed(context.store.log(group)):
        record = open_record(entry.envelope, context.trusted)
        if record.c == c and record.status is Status.ACTIVE:
            return record, entry.envelope
    raise PermanentError(f"group {group} never had an ACTIVE c={c}", next_command=f"cloudfit config log {group}")
