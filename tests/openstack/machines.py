"""Machines on the lab's clouds, as the tests of the driver make them and look at them."""

import contextlib
import os
import re
import time
from pathlib import Path

import openstack
import pytest
from openstack.connection import Connection

from cloudfit_orchestrator.clouds.base import MachineSpec, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.spec import OpenStackPlace
from tests.openstack.lab.layout import DEFAULT_HOME, Lab
from tests.user import User

HOME = Path(os.environ.get("CLOUDFIT_LAB", DEFAULT_HOME))
GREETING = "DRIVER-GUEST"
BOOT_TIMEOUT_S = 180.0
READ_TIMEOUT_S = 30.0  # a call of the lab's takes seconds at worst; what stalls is given up after this


def place_of(lab, **changes):
    known = {
        "cloud": lab["name"],
        "region": lab["region"],
        "flavor": "cloudfit.tiny",
        "network": lab["network"]["name"],
        "availability_zone": lab["availability_zone"],
        "volume_type": lab["volume_type"],
        "hypervisor": lab["libvirt_uri"],
    }
    return OpenStackPlace(**known | changes)


def driving(lab, directory, clouds_yaml=None, **changes):
    place = place_of(lab, **changes)
    api = Api(place.cloud, place.region, files=[clouds_yaml or lab["clouds_yaml"]], read_timeout_s=READ_TIMEOUT_S)
    return OpenStackCloud(home=directory, place=place, api=api)


@contextlib.contextmanager
def user_of_lab(group, spec):
    """Someone with a home and `spec()` for a group over the lab's clouds; its group is gone afterwards."""
    lab = Lab(HOME)
    if not lab.spec.exists():
        pytest.fail(f"no lab in {HOME}; run: make openstack-lab")
    with User.at_work(group, spec(), OS_CLIENT_CONFIG_FILE=str(lab.clouds_yaml)) as someone:
        yield someone


@contextlib.contextmanager
def listing(lab, account):
    config = openstack.config.OpenStackConfig(config_files=[str(lab["clouds_yaml"])])
    connection = Connection(config=config.get_one(cloud=account))
    try:
        yield connection
    finally:
        connection.close()


def everything(lab):
    """(kind, id) of all that the operator's project has."""
    with listing(lab, lab["name"]) as c:
        mine = {"project_id": c.current_project_id}
        found = {
            "servers": c.compute.servers(),
            "server groups": c.compute.server_groups(),
            "images": (
                i
                for hidden in (False, True)
                for i in c.image.images(is_hidden=hidden)
                if i.owner_id == c.current_project_id
            ),
            "ports": c.network.ports(**mine),
            "security groups": c.network.security_groups(**mine),
            "rules": c.network.security_group_rules(**mine),
            "volumes": c.block_storage.volumes(),
            "snapshots": c.block_storage.snapshots(),
        }
        return {(kind, o.id) for kind, objects in found.items() for o in objects}


def owner(deployment, incarnation, operation, replica="r0"):
    return Ownership(deployment, "ledger", replica, incarnation, Role.REPLICA, operation)


def spec_for(cloud, lab, image, who, *, disk=True, **changes):
    directory, manifest = image
    address = cloud.reserve_address(who.deployment, who.group, who.replica, who.role, who.operation)
    network = NetworkSpec("replicas", address, 24, lab["network"]["gateway"])
    state = StateDisk(256) if disk else None
    return MachineSpec(who, directory, manifest, 128, 1, network, state, **changes)


def greetings(lab, machine, count=1, word=GREETING):
    """What the guest said on its console behind `word`, once it has said it `count` times."""
    log = Path(lab["instances"], machine.id, "console.log")
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while len(found := re.findall(rf"{word} (.*)", log.read_text(errors="replace") if log.exists() else "")) < count:
        assert time.monotonic() < deadline, f"{machine.owner.name} said nothing within {BOOT_TIMEOUT_S:.0f} s"
        time.sleep(0.5)
    return found
