"""What is shown of state disks is what each replica said last; a word that none says is unknown."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.disks import disks
from tests.unit.controller.worlds import Bench, spec


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="cf", dir="/tmp") as name:
        made = Bench(Path(name) / "home")
        yield made
        made.close()


def test_the_last_word_counts_and_nonsense_is_unknown(bench: Bench) -> None:
    context = bench.process()
    apply(context, spec())
    assert disks(context, spec()) == {}
    (r0,), (r1,) = bench.world.guest("ledger", "r0"), bench.world.guest("ledger", "r1")
    agents = {cloud.name: context.sites.agent(cloud, start=False) for cloud in spec().clouds}
    of = {replica: agents[spec().cloud_of(replica).name] for replica in ("r0", "r1")}
    of["r0"]._say(r0, "storage", state="full", fact="no room")
    of["r1"]._say(r1, "storage", state=["x" * 1000], fact="nonsense")
    assert disks(context, spec()) == {("r0", r0.ref.incarnation): "full", ("r1", r1.ref.incarnation): "unknown"}
    of["r0"]._say(r0, "storage", state="ok", fact="room again")
    assert disks(context, spec())["r0", r0.ref.incarnation] == "ok"
    of["r0"].reachable = False
    assert disks(context, spec()) == {("r1", r1.ref.incarnation): "unknown"}
