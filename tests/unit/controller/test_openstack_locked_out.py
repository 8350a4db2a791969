"""Credentials that are revoked in the middle of an operation, and servers that go behind our back."""

import pytest

from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.destroy import destroy
from cloudfit_orchestrator.controller.journal import MachineStage
from cloudfit_orchestrator.controller.orphans import orphans
from cloudfit_orchestrator.controller.recover import recover
from cloudfit_orchestrator.model.errors import CloudfitError, LockedOutError, PermanentError
from tests.unit.controller.test_openstack_group import SPEC, bench, fake  # noqa: F401  fixtures
from tests.unit.controller.worlds import spec

STRIDE = 23  # of the calls of an act, each of them tried would take minutes
ACTS = {
    "apply": lambda context: apply(context, spec(SPEC)),
    "recover": lambda context: recover(context, "ledger", "r0"),
    "destroy": lambda context: destroy(context, "ledger"),
}


def calls_of(fake, act):  # noqa: F811
    before = len(fake.calls)
    act()
    return len(fake.calls) - before


@pytest.mark.parametrize("cinder", [True, False])
def test_credentials_revoked_in_the_middle(bench, fake, cinder):  # noqa: F811
    """One error that says what to do; with credentials the same command ends as ever, and leaves nothing."""
    fake.wrong.services = set() if cinder else {"volumev3"}
    lengths = {name: calls_of(fake, lambda act=act: act(bench.process())) for name, act in ACTS.items()}
    assert not any(fake.objects.values())
    assert min(lengths.values()) > 20
    offsets = [STRIDE * i for i in range(1 + max(lengths.values()) // STRIDE)]
    for offset in offsets:
        refused = []
        for name, act in ACTS.items():
            fake.wrong.revoked_after = min(offset, lengths[name] * 2 // 3)
            with pytest.raises(PermanentError, match="Keystone refuses the credentials") as told:
                act(bench.process())
            refused.append(name)
            assert str(told.value).count("openstack --os-cloud lisbon token issue") <= 2, "once a cloud"
            assert "the same command again" in str(told.value)
            fake.wrong.revoked_after = None
            done = act(bench.process())
            assert name != "recover" or done.outcome == "done"
            if name != "destroy":
                bench_serves(bench, fake)
        assert refused == list(ACTS)
        assert not any(fake.objects.values())
        assert bench.process().journal.groups() == []


def bench_serves(bench, fake):  # noqa: F811
    """Each member has one server, and there is nothing that the journal does not know."""
    context = bench.process()
    here = {m.incarnation for m in context.journal.machines("ledger") if m.cloud != "ulm"}
    assert {int(s["metadata"]["cloudfit_incarnation"]) for s in fake.objects["servers"].values()} == here
    assert len(fake.objects["servers"]) == len(here) == 2
    assert [f.orphans for f in orphans(context)] == [()] * 3
    assert context.journal.open_of("ledger") is None


def test_a_cloud_that_is_locked_out_does_not_keep_others_from_being_recovered(bench, fake):  # noqa: F811
    """Its member serves, as its agent says; its doors stay as they are."""
    apply(bench.process(), spec(SPEC))
    locked = bench.sites.cloud(spec(SPEC).clouds[1])

    def refuse(*_, **__):
        raise LockedOutError("Keystone refuses the credentials of clouds.yaml")

    for name in ("find", "admit", "machines"):
        setattr(locked, name, refuse)
    assert recover(bench.process(), "ledger", "r0").outcome == "done"
    for name in ("find", "admit", "machines"):
        delattr(locked, name)
    bench_serves(bench, fake)
    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())


class Progress(list):
    """Runs `then` when the operation says that it has come to `stage`."""

    def __init__(self, stage, then):
        super().__init__()
        self._stage, self._then = stage, then

    def append(self, said):
        super().append(said)
        if said.stage == self._stage and self._then is not None:
            then, self._then = self._then, None
            then()

    @property
    def came(self):
        return self._then is None


def delete_behind_our_back(bench, fake, choose):  # noqa: F811
    """The server of that incarnation goes, and what runs in it."""
    for server in list(fake.objects["servers"].values()):
        if choose(server["metadata"]):
            server.pop("_then", None)
            fake._server_gone(server)
            for host in bench.world.clouds.values():
                host.all.pop(server["id"], None)


def go_on(bench, act):  # noqa: F811
    """The same command until it is done; each failure names the next one."""
    for _ in range(4):
        try:
            return act(bench.process())
        except CloudfitError as error:
            last = error
        assert last.next_command, last
    raise last


def role_of(metadata):
    return metadata["cloudfit_replica"], metadata["cloudfit_role"]


@pytest.mark.parametrize("cinder", [True, False])
@pytest.mark.parametrize("stage", ["create", "admit", "prepare", "confirm", "activate", "ready"])
def test_a_server_goes_in_a_phase_of_apply(bench, fake, stage, cinder):  # noqa: F811
    fake.wrong.services = set() if cinder else {"volumev3"}
    r0 = lambda m: role_of(m) == ("r0", "replica")  # noqa: E731
    bench.progress = Progress(stage, lambda: delete_behind_our_back(bench, fake, r0))
    go_on(bench, ACTS["apply"])
    if not any(r0(s["metadata"]) for s in fake.objects["servers"].values()):
        assert recover(bench.process(), "ledger", "r0").lost, "gone when nothing looked at it any more"
    bench_serves(bench, fake)
    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())


RECOVERY_STAGES = ("launch", "snapshot", "extract", "precopy", "retire", "freeze", "judge", "close", "prepare", "clean")


@pytest.mark.parametrize("victim", ["old", "new", "recovery"])
@pytest.mark.parametrize("stage", RECOVERY_STAGES)
def test_a_server_goes_in_a_phase_of_a_recovery(bench, fake, stage, victim):  # noqa: F811
    apply(bench.process(), spec(SPEC))
    old = next(m.incarnation for m in bench.process().journal.machines("ledger") if m.replica == "r0")

    def choose(m):
        if role_of(m) == ("r0", "recovery"):
            return victim == "recovery"
        return role_of(m) == ("r0", "replica") and (int(m["cloudfit_incarnation"]) == old) == (victim == "old")

    bench.progress = Progress(stage, lambda: delete_behind_our_back(bench, fake, choose))
    outcome = go_on(bench, ACTS["recover"]).outcome
    assert bench.progress.came, f"no stage {stage}"
    if outcome != "done":
        assert go_on(bench, ACTS["recover"]).outcome == "done"
    gone = [m for m in bench.process().journal.machines("ledger") if m.stage is not MachineStage.GONE]
    if len(fake.objects["servers"]) < 2:  # the new one went when it was a member already
        assert gone
        assert recover(bench.process(), "ledger", "r0").lost
    bench_serves(bench, fake)
    destroy(bench.process(), "ledger")
    assert not any(fake.objects.values())
