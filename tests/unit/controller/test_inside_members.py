"""A recovery while another member's own agent lies: up to f of them change nothing (`trust: none`)."""

import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.recover import recover
from cloudfit_orchestrator.controller.secrets import GuestSecrets
from cloudfit_orchestrator.model.drive import Drive
from cloudfit_orchestrator.model.errors import BadError, RefusedError
from cloudfit_orchestrator.testing.cloud import FakeCloud
from tests.unit.controller.worlds import SPEC, Bench, spec

NONE = SPEC.replace("f: 1", "f: 1\ntrust: none\nalgorithm: pbft") + "  - {name: graz, process: {}}\n"


def other_keys(guest, c):
    return secrets.token_bytes(32), secrets.token_bytes(32)


def nonsense(guest, c):
    raise BadError("the agent inside answers nonsense")


class Liars:
    """A group that serves, and what its agents inside guests do from now on."""

    def __init__(self, root):
        self.bench = Bench(root)
        context = self.bench.process()
        context.secrets = FakeSecrets()
        apply(context, spec(NONE))
        self.context = context

    def lie(self, cloud, prepare):
        agent = self.bench.world.agents[cloud]
        told = agent.install
        agent.prepare = prepare

        def install(group, envelope):
            try:
                told(group, envelope)
            except RefusedError:
                return  # as of any guest here: its own business

        agent.install = install


class FakeSecrets:
    certificate = b"certificate"

    def seed(self, row):
        return bytes(32)


@pytest.fixture
def short():
    root = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))  # short: homes hold unix sockets
    yield root
    shutil.rmtree(root)


@pytest.fixture
def liars(short):
    made = Liars(short)
    for agent in made.bench.world.agents.values():
        agent.inside = True
    yield made
    made.bench.close()


@pytest.mark.parametrize("prepare", [other_keys, nonsense])
def test_f_members_that_lie_about_their_keys_cost_not_even_an_attempt(liars, prepare):
    liars.lie("ulm", prepare)
    done = recover(liars.context, "ledger", "r1")
    assert (done.outcome, done.c) == ("done", 2)


def test_keys_that_more_than_f_lost_are_asked_for_anew(liars):
    """As those of one wormhole at a hypervisor are, which does not lie: the attempt is given up for the next one."""
    for cloud in ("ulm", "graz"):
        liars.lie(cloud, other_keys)
    assert recover(liars.context, "ledger", "r1").c == 3


def test_a_wormhole_at_a_hypervisor_that_lost_its_keys_is_asked_anew(liars):
    for agent in liars.bench.world.agents.values():
        agent.inside = False
    liars.lie("ulm", other_keys)
    assert recover(liars.context, "ledger", "r1").c == 3


@pytest.mark.parametrize("cloud", ["passau", "ulm"])
@pytest.mark.parametrize("order", ["freeze", "close_epoch"])
def test_neither_the_old_guest_nor_another_need_obey(liars, order, cloud):
    def disobey(guest, c):
        raise BadError("no")

    setattr(liars.bench.world.agents[cloud], order, disobey)
    done = recover(liars.context, "ledger", "r1")
    assert (done.outcome, done.c) == ("done", 2)


def test_a_controller_that_dies_makes_the_same_drives_again(short, monkeypatch):
    """At any call: whoever goes on finds its machines, and would give each the drive that it has."""
    bench, drives = Bench(short), {}
    create = FakeCloud.create

    def noting(cloud, wanted):
        drives.setdefault(wanted.owner.identity, set()).add(wanted.drive)
        return create(cloud, wanted)

    monkeypatch.setattr(FakeCloud, "create", noting)

    def run(context):
        context.secrets = GuestSecrets(bench.home.guest_secret(), context.journal.deployment)
        apply(context, spec(NONE))

    call = 1
    while bench.die_at(call, run):
        call += 1
    bench.check_serving()
    bench.close()
    assert call > 50
    assert {len(made) for made in drives.values()} == {1}
    decoded = [Drive.decode(*made) for made in drives.values()]
    assert len({d.seed for d in decoded}) == len(decoded) == 4
