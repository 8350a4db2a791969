"""The lab's clouds, one after the other, for the tests of the driver."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from tests.openstack.lab.layout import DEFAULT_CLOUDS
from tests.openstack.machines import HOME, everything


@pytest.fixture(scope="session")
def told():
    if not (HOME / "state.json").exists():
        pytest.fail(f"no lab in {HOME}; run: make openstack-lab")
    return json.loads((HOME / "state.json").read_text())


@pytest.fixture(params=DEFAULT_CLOUDS)
def lab(request, told):
    return told["clouds"][request.param] | {"name": request.param, "clouds_yaml": Path(told["clouds_yaml"])}


@pytest.fixture
def deployment(lab):
    """A name of this test's own; afterwards the project has what it had before. One test a cloud at a time."""
    with (HOME / f"{lab['name']}.test-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = everything(lab)
        yield f"t{os.urandom(4).hex()}"
        assert everything(lab) == before
