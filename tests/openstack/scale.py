"""Many groups on one cloud: `python -m tests.openstack.scale --groups 100`, on the lab's cloud `scale` (fake driver).

The driver makes the machines of so many groups of three as `apply` does: address, server, doors. A bare loop of
openstacksdk makes as many servers with a bare port each beforehand, and waits until none is in BUILD: what the control
plane itself takes. Tells its progress on stderr and prints one JSON document: seconds of both and their ratio, calls a
machine by kind, CPU seconds and memory of this process. Everything that it makes is gone afterwards.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openstack

from cloudfit_orchestrator.clouds.base import MachineSpec, MachineState, NetworkSpec, Ownership
from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.controller.ports import REPLICA_PORT
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.spec import OpenStackPlace
from tests.openstack.lab.layout import DEFAULT_HOME, Lab
from tests.openstack.lab.state import read_state
from tests.vm.tiny_guest import tiny_image, tiny_manifest

CLOUD = "scale"
REPLICAS = 3
GUEST = "#!/bin/sh\n"  # a fake driver boots nothing
POLL_S = 2.0
DEADLINE_S = 3600.0


class CountingApi(Api):
    """Counts each HTTP request by method, service and the first word of its path."""

    counts: Counter[str]
    lock: threading.Lock

    def _once(self, service, method, path, tried, **how):
        with self.lock:
            self.counts[f"{method} {service} /{path.split('/')[1]}"] += 1
        return super()._once(service, method, path, tried, **how)


def place_of(told) -> OpenStackPlace:
    return OpenStackPlace(
        cloud=CLOUD, region=told["region"], flavor="cloudfit.tiny", network=told["network"]["name"],
        availability_zone=told["availability_zone"],
    )  # fmt: skip


def progress(text: str, began: float) -> None:
    print(f"scale: {time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)


def bare(lab: Lab, told, servers: int, workers: int, image: str) -> float:
    """Seconds for as many servers with a port each."""
    config = openstack.config.OpenStackConfig(config_files=[str(lab.clouds_yaml)]).get_one(cloud=CLOUD)
    local = threading.local()
    name = f"bare-{os.urandom(4).hex()}"

    def connection():
        if not hasattr(local, "connection"):
            local.connection = openstack.connection.Connection(config=config)
        return local.connection

    def one(number: int) -> None:
        c = connection()
        # In no security group, which costs Neutron least: the default one is looked through for each port in it.
        port = c.network.create_port(network_id=told["network"]["id"], name=f"{name}-{number}", security_group_ids=[])
        c.compute.create_server(
            name=f"{name}-{number}", image_id=image, flavor_id=told["flavors"]["cloudfit.tiny"]["id"],
            networks=[{"port": port.id}], availability_zone=told["availability_zone"],
        )  # fmt: skip

    def mine():
        return list(connection().compute.servers(name=f"^{name}-"))

    began = time.monotonic()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for number, _ in enumerate(pool.map(one, range(servers)), 1):
                if number % 10 == 0:
                    progress(f"bare loop: {number} of {servers} asked for", began)
        # As little as can be asked: whether any is in BUILD; a list of all of them takes the control plane seconds.
        while list(
            connection().compute.servers(details=False, status="BUILD", name=f"^{name}-", limit=1, paginated=False)
        ):
            progress("bare loop: not all ACTIVE", began)
            if time.monotonic() - began > DEADLINE_S:
                sys.exit(f"scale: servers of the bare loop are in BUILD after {DEADLINE_S:.0f} s")
            time.sleep(POLL_S)
        took_s = time.monotonic() - began
        if (active := sum(s.status == "ACTIVE" for s in mine())) < servers:
            sys.exit(f"scale: {active} of {servers} servers of the bare loop are ACTIVE, and none is in BUILD")
        return took_s
    finally:
        c = connection()
        for server in mine():
            c.compute.delete_server(server)
        while mine():
            time.sleep(POLL_S)
        for port in c.network.ports(network_id=told["network"]["id"], project_id=c.current_project_id):
            if port.name.startswith(name):
                c.network.delete_port(port)


def ours(cloud: OpenStackCloud, told, image, groups: int, workers: int, deployment: str) -> float:
    """Seconds for all machines of so many groups, and their doors."""
    directory, manifest = image

    def one(number: int) -> None:
        group = f"g{number}"

        def launch(replica: str) -> str:
            owner = Ownership(deployment, group, replica, 1, Role.REPLICA, "op1")
            address = cloud.reserve_address(deployment, group, replica, Role.REPLICA, "op1")
            network = NetworkSpec("replicas", address, 20, told["network"]["gateway"])
            machine = cloud.create(MachineSpec(owner, directory, manifest, 128, 1, network, None))
            assert machine.state is MachineState.RUNNING
            return address

        with ThreadPoolExecutor(REPLICAS) as side_by_side:
            hosts = list(side_by_side.map(launch, ("r0", "r1", "r2")))
        cloud.admit(deployment, group, hosts, REPLICA_PORT)
        progress(f"driver: {group} is complete", began)

    began = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(groups)))
    return time.monotonic() - began


def clear(cloud: OpenStackCloud, deployment: str, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(cloud.destroy, cloud.machines(deployment)))
    cloud.delete_network(deployment, "replicas")


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser("scale", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--workers", type=int, default=8, help="calls at a time, of the driver as of the bare loop")
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME)
    options = parser.parse_args()
    lab = Lab(options.home)
    told = read_state(lab)["clouds"].get(CLOUD) if lab.state.exists() else None
    if told is None:
        sys.exit("scale: the lab has no cloud of that name; run: make openstack-lab CLOUDS=scale")
    directory = tiny_image(GUEST)
    manifest = tiny_manifest(directory)
    machines, deployment = REPLICAS * options.groups, f"t{os.urandom(4).hex()}"
    api = CountingApi(CLOUD, told["region"], files=[lab.clouds_yaml], connections=options.workers)
    api.counts, api.lock = Counter(), threading.Lock()
    with tempfile.TemporaryDirectory() as home, OpenStackCloud(home=Path(home), place=place_of(told), api=api) as cloud:
        try:
            # Both loops boot the same image, and its upload is no part of either.
            owner = Ownership(deployment, "g0", "r0", 1, Role.REPLICA, "op1")
            uploaded = cloud.images.ensure_boot(MachineSpec(owner, directory, manifest, 128, 1, None, None))
            bare_s = bare(lab, told, machines, options.workers, uploaded)
            api.counts.clear()
            before_s = cpu_s()
            ours_s = ours(cloud, told, (directory, manifest), options.groups, options.workers, deployment)
            used_s, counts = cpu_s() - before_s, dict(api.counts.most_common())
            found = {
                "groups": options.groups,
                "machines": machines,
                "workers": options.workers,
                "bare_s": round(bare_s, 1),
                "ours_s": round(ours_s, 1),
                "ratio": round(ours_s / bare_s, 2),
                "calls_per_machine": round(sum(counts.values()) / machines, 1),
                "calls": {name: round(count / machines, 2) for name, count in counts.items()},
                "cpu_s": round(used_s, 1),
                "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            print(json.dumps(found, indent=2), flush=True)  # now: to remove hundreds of machines takes long
        finally:
            clear(cloud, deployment, options.workers)


if __name__ == "__main__":
    main()
