"""docs/openstack.md names exactly the calls that the driver makes."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cloudfit_orchestrator.clouds.base import Demand
from cloudfit_orchestrator.model.errors import PermanentError
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from cloudfit_orchestrator.testing.openstack_proxy import Proxy
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, owner, quick

DOCUMENT = Path(__file__).parents[3] / "docs/openstack.md"
_ROW = re.compile(r"^\| (\w+) \| `(\w+) ([^`]+)` \|", re.MULTILINE)


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


def whole_life(cloud, fake, directory):
    cloud.facts()
    cloud.preflight(Demand(1, 384, 1, 256), probe=True)
    old = cloud.create(machine_spec(directory, cloud))
    cloud.admit("dep", "ledger", ["10.1.1.1"], 7000)
    cloud.admit("dep", "ledger", ["10.1.1.2"], 7000)
    taken = cloud.snapshot(cloud.pause(old), "rec")
    cloud.resume(old)
    reader = cloud.create(machine_spec(directory, cloud, owner(incarnation=2, operation="rec"), disk=False))
    cloud.attach(reader, taken)
    for machine in (reader, old):
        cloud.stop(machine)
        cloud.start(machine)
        cloud.destroy(machine)
    cloud.delete_snapshot(taken)
    fake.wrong.volume_error = True
    with contextlib.suppress(PermanentError):
        cloud.create(machine_spec(directory, cloud))
    cloud.sweep("dep", cloud.orphans("dep", []))
    cloud.delete_network("dep", "replicas")


def whole_life_without_cinder(cloud, directory):
    old = cloud.create(machine_spec(directory, cloud))
    taken = cloud.snapshot(old, "rec")
    who = owner(incarnation=2, operation="rec")
    reader = cloud.create(machine_spec(directory, cloud, who, disk=False, attach=taken))
    for machine in (reader, old):
        cloud.destroy(machine)
    cloud.delete_snapshot(taken)
    cloud.sweep("dep", cloud.orphans("dep", []))
    cloud.delete_network("dep", "replicas")


def test_the_table_of_calls(fake, tmp_path):
    with Proxy(f"{fake.url}/identity/v3").serving() as proxy:
        url = proxy.keystone.removesuffix("/identity/v3")
        place = replace(PLACE, availability_zone="nova", protected=True)
        with driving(tmp_path, fake, place, url=url) as cloud:
            whole_life(cloud, fake, tmp_path)
        with driving(tmp_path, fake, replace(PLACE, state="instance"), url=url) as cloud:
            whole_life_without_cinder(cloud, tmp_path)
    made = set()
    for call in proxy.calls:
        service, _, path = call.path.lstrip("/").partition("/")
        if service != "identity":
            path = re.sub(r"^v[\d.]+/?((p{32}|{id})/?)?", "/", path).replace("p" * 32, "{id}")
            made.add((service, call.method, path if path.startswith("/") else f"/{path}"))
    named = set(_ROW.findall(DOCUMENT.read_text()))
    discovery = {(service, "GET", "/") for service in ("image", "network", "volume")}
    assert made - discovery == named
