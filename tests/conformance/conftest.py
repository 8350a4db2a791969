"""Engines for the suite: those of the package, and one from elsewhere."""

import pytest

from cloudfit_orchestrator.bft import engines

MODULE = '''
from cloudfit_orchestrator.bft.pbft.ordering import PbftOrdering

class Elsewhere(PbftOrdering):
    """An engine of somebody else's: another one in a coat of its own."""

    @property
    def figures(self):
        return {"ordered by": "elsewhere"}
'''


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """The engine `elsewhere`, installed as a package manager lays it out."""
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "engine_from_elsewhere.py").write_text(MODULE)
    info = place / "engine_from_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-from-elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{engines.ENTRY_POINT}]\nelsewhere = engine_from_elsewhere:Elsewhere\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        engines.engine.cache_clear()
        yield
        engines.engine.cache_clear()
