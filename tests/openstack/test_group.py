"""A group over two real OpenStack clouds and this host's libvirt, as a user runs it: the demo's story, from the lab's
own spec. Every replica boots the real image, is measured by a real agent and recovered from a Cinder snapshot.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloudfit_orchestrator.controller.home import default_home
from tests.openstack.lab.layout import DEFAULT_CLOUDS, DEFAULT_HOME, Lab
from tests.openstack.machines import everything

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

LAB = Lab(Path(os.environ.get("CLOUDFIT_LAB", DEFAULT_HOME)))
ACTS = {"traffic": 1000, "under_attack": 200, "cloud_lost": 200}


def test_the_demo_over_two_clouds_keeps_its_promises_and_leaves_nothing():
    if not LAB.spec.exists():
        pytest.fail(f"no lab in {LAB.home}; run: make openstack-lab")
    labs = [{"name": name, "clouds_yaml": LAB.clouds_yaml} for name in DEFAULT_CLOUDS]
    before = [everything(lab) for lab in labs]
    told = subprocess.run(
        [sys.executable, "-m", "cloudfit_orchestrator.cli", "demo", "--openstack", LAB.spec, "-f", "json"],
        env={**os.environ, "CLOUDFIT_HOME": str(default_home()), "OS_CLIENT_CONFIG_FILE": str(LAB.clouds_yaml)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, f"{told.stdout[-4000:]}\n{told.stderr[-4000:]}"
    figures = json.loads(told.stdout.splitlines()[-1])
    assert figures["driver"] == "libvirt+openstack"
    assert figures["good"]
    assert all(figures["promises"].values())
    assert {act: figures[act]["writes"] for act in ACTS} == ACTS
    assert figures["recovery"]["transfer"]["corrupt"], "nobody looked at the lying disk"
    assert figures["replacement"]["lost"], "the machine of the lost cloud was asked"
    assert figures["left_behind"] == []
    assert [everything(lab) for lab in labs] == before
    print({name: figures[name] for name in ("stages_s", "total_s")})
