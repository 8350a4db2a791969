"""A home over fake clouds, as a controller process finds it after each start."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.config_store.sqlite import SqliteConfigStore
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.ports import Context, Progress
from cloudfit_orchestrator.controller.spec import parse_spec
from cloudfit_orchestrator.model.record import Member
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.model.spec import GroupSpec
from cloudfit_orchestrator.testing.cloud import FakeImages, FakeSites, KillableJournal, Killed, World

SPEC = """\
apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: lisbon, process: {}}
  - {name: passau, process: {}}
  - {name: ulm, process: {}}
"""
MAX_POINTS = 2000


@cache  # read thousands of times, and YAML takes its time
def spec(text: str = SPEC) -> GroupSpec:
    return parse_spec(text, "spec.yaml")


class Bench:
    """One home, one world; `process` is a fresh controller on it."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.key = self.home.controller_key()
        self.world = World(public_bytes(self.key))
        self.sites = FakeSites(self.world)
        self.images = FakeImages()
        self.clients = (self.home.client().public,)
        self.progress: list[Progress] = []
        self._opened: list[Any] = []

    def process(self) -> Context:
        self.close()
        journal = KillableJournal(self.home.journal, self.world)
        store = SqliteConfigStore(self.home.config, [public_bytes(self.key)])
        self._opened = [journal, store]
        return Context(journal, store, self.sites, self.images, self.key, self.clients, self.progress.append)

    def close(self) -> None:
        for opened in self._opened:
            opened.close()
        self._opened = []

    def die_at(self, call: int, act: Callable[[Context], Any]) -> bool:
        """Run `act` in a process that dies at `call`; False if it ended before."""
        self.world.kill_at(call)
        try:
            act(self.process())
        except Killed:
            return True
        finally:
            self.world.revive()
        return False

    def check_serving(self, group: str = "ledger") -> tuple[Member, ...]:
        """Exactly the members of ACTIVE run, each serves there, and the journal knows each machine."""
        from cloudfit_orchestrator.controller.apply import active_record

        context = self.process()
        record = active_record(context, group)
        machines = {(m.owner.replica, m.owner.incarnation) for m in self.world.machines() if m.owner.group == group}
        assert machines == {(m.replica, m.incarnation) for m in record.members}
        rows = {(m.replica, m.incarnation) for m in context.journal.machines(group)}
        assert rows == machines
        for member in record.members:
            serving = [g for g in self.world.guest(group, member.replica) if g.ref.incarnation == member.incarnation]
            assert [g.serves for g in serving] == [record.c]
        assert context.store.verify(group, context.journal.head(group)).good
        assert context.journal.open_of(group) is None
        return record.members

    def check_nothing_left(self) -> None:
        context = self.process()
        assert self.world.machines() == []
        assert self.world.snapshots_left() == []
        assert self.world.networks() == []
        assert self.world.agents == {}
        assert context.journal.groups() == []
        assert context.journal.machines() == []
        assert context.journal.networks() == {}
        assert context.journal.open_of("ledger") is None
        assert context.store.groups() == []
