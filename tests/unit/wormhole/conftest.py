import shutil
import tempfile
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.agents import AgentClient
from tests.unit.wormhole.house import BlockingGuest, House


@pytest.fixture
def house():
    folder = Path(tempfile.mkdtemp(prefix="cfa", dir="/tmp"))
    made = House(folder)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture
def client(house):
    with AgentClient.unix(house.socket) as made:
        yield made


@pytest.fixture
def guest(house):
    made = BlockingGuest(house.folder / "channel")
    yield made
    made.close()
