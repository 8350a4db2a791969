"""A cloud's agent must have the key that the spec says is enrolled: a real agent, and one that answers in its place."""

import base64
import dataclasses
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.apply import apply
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import LocalSites, agent_command, open_context
from cloudfit_orchestrator.model.errors import BadError, UnknownError
from cloudfit_orchestrator.model.spec import CloudSpec
from tests.unit.controller.worlds import Bench, spec

AGENT_START_S = 60.0  # a second on an idle machine
ULM = CloudSpec("ulm", "process")
OTHER_KEY = base64.b64encode(bytes(32)).decode()


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cf") as name:  # short: there are sockets below
        yield Path(name)


@pytest.fixture
def sites(root: Path) -> Iterator[LocalSites]:
    """With an agent of cloud `ulm` that runs."""
    home = Home(root)
    context = open_context(home, lambda _: None)
    opened = context.sites
    assert isinstance(opened, LocalSites)
    with subprocess.Popen(agent_command(home, "ulm"), stdin=subprocess.DEVNULL) as agent:
        try:
            answers(opened, agent)
            yield opened
        finally:
            opened.close()
            agent.terminate()


def answers(sites: LocalSites, agent: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + AGENT_START_S
    while True:
        try:
            sites.agent(ULM, start=False)
        except UnknownError:
            assert agent.poll() is None, "the agent has ended"
            assert time.monotonic() < deadline, "the agent does not answer"
            time.sleep(0.05)
        else:
            return


def test_an_agent_with_another_key_than_the_enrolled_one_is_refused(sites: LocalSites, root: Path) -> None:
    own = sites.agent(ULM, start=True).status()["key"]
    assert sites.agent(dataclasses.replace(ULM, agent_key=own), start=True).status()["key"] == own
    for start in (True, False):
        told = f"cloud ulm: .* has the key {re.escape(own)}, and .* is enrolled"
        with pytest.raises(BadError, match=told) as refused:
            sites.agent(dataclasses.replace(ULM, agent_key=OTHER_KEY), start=start)
        assert OTHER_KEY in str(refused.value)
    behind_socket = dataclasses.replace(ULM, agent_socket=str(root / "agents/ulm/agent.sock"), agent_key=OTHER_KEY)
    with pytest.raises(BadError, match="is enrolled"):
        sites.agent(behind_socket, start=False)


def test_a_launch_that_the_enrolled_key_did_not_sign_is_refused(root: Path) -> None:
    bench = Bench(root)
    wanted = spec()
    clouds = tuple(dataclasses.replace(c, agent_key=OTHER_KEY) if c.name == "ulm" else c for c in wanted.clouds)
    with pytest.raises(BadError, match="none of which is trusted"):
        apply(bench.process(), dataclasses.replace(wanted, clouds=clouds))
    assert not [m for m in bench.process().journal.machines("ledger") if m.cloud == "ulm" and m.launch]
    bench.close()
