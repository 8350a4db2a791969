"""Which engine orders: by the record's algorithm, from this package or from elsewhere (entry point)."""

import sys

import pytest

from cloudfit_orchestrator.bft import engines
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.usig.messages import Prepare, decode_header
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.model.record import open_record
from tests.unit.bft.house import House
from tests.unit.bft.machine import Machine

MODULE = """
from cloudfit_orchestrator.bft.usig.ordering import UsigOrdering

class Theirs(UsigOrdering):
    spoken = 0

    def speak(self, take_batch):
        type(self).spoken += 1
        super().speak(take_batch)

    @property
    def figures(self):
        return {"ordered by": "theirs"}

no_engine = len
"""
POINTS = "[cloudfit.ordering]\ntheirs = {module}:Theirs\nno-engine = {module}:no_engine\nebawa = {module}:Theirs\n"


@pytest.fixture
def their_package(tmp_path, monkeypatch):
    """An installed distribution of somebody else's, as a package manager lays it out."""
    module = "their_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{module}.py").write_text(MODULE)
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS.format(module=module))
    monkeypatch.syspath_prepend(tmp_path)
    engines.engine.cache_clear()
    yield module
    engines.engine.cache_clear()
    sys.modules.pop(module, None)


@pytest.mark.parametrize("algorithm", ["ebawa", "minbft"])
def test_an_engine_of_this_package_is_found_by_name(algorithm):
    assert engines.engine(algorithm) is UsigOrdering
    assert issubclass(UsigOrdering, Ordering)


def test_an_engine_from_elsewhere_orders(their_package):
    house = House(4, algorithm="theirs", period=4, window=16)
    machine = Machine(house, "r1")
    assert machine.core.status["ordered by"] == "theirs"
    assert house.record.quorums.commit == 3, "of an unknown engine nothing is believed of a wormhole"
    machine.client(house.bundle([(1, b"\0" * 7 + b"\1")]))
    prepare = house.streams["r1"][-1]
    assert isinstance(decode_header(prepare.header), Prepare)
    machine.hear(house.commit("r2", prepare))
    assert machine.core.status["slot"] == 0
    machine.hear(house.commit("r3", prepare))
    assert machine.core.status["slot"] == 1
    assert sys.modules[their_package].Theirs.spoken


def test_nobody_takes_the_place_of_an_engine_of_this_package(their_package):
    assert "theirs" in engines.algorithms()
    assert engines.engine("ebawa") is UsigOrdering


def test_what_is_no_engine_is_refused(their_package):
    with pytest.raises(BadInputError, match="no Ordering"):
        engines.engine("no-engine")


def test_an_engine_that_is_not_installed_is_refused_before_anything_is_wedged():
    with pytest.raises(BadInputError, match=r"here are .*ebawa.*minbft"):
        engines.engine("nobodys")
    house = House(4)
    machine = Machine(house, "r0")
    said = len(house.streams["r0"])
    machine.core.record(house.successor(algorithm="nobodys"))
    machine.serve()
    machine.ticks(1.0)
    assert "bad_record" in [topic for topic, _ in machine.reports]
    assert len(house.streams["r0"]) == said


@pytest.mark.parametrize("name", ["", "Upper", "a b", "x" * 33, "../x"])
def test_an_algorithm_has_a_plain_name(name):
    house = House(4)
    with pytest.raises(BadError, match="malformed"):
        open_record(house.successor(algorithm=name), house.controllers)
