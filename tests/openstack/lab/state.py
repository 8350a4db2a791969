"""What the lab tells others: clouds.yaml for OpenStack clients, state.json for tests, ledger.yaml for `cloudfit`.

state.json: `version` 1 · `home` · `clouds_yaml` · `clouds`: name → `driver` (libvirt or fake), `auth_url`, `region`,
`libvirt_uri` (of its own libvirtd, "" for fake), `accounts` (`admin`, `operator`, `neighbour` → name of the entry in
clouds.yaml; the cloud's own name is the operator's application credential), and what `resources.make_resources` says.
ledger.yaml: a group with a replica on each real cloud and on this host's own libvirt.
"""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from tests.openstack.lab.console import write
from tests.openstack.lab.layout import NEIGHBOUR, OPERATOR, Cloud, Lab

VERSION = 1


def add_cloud(lab: Lab, cloud: Cloud, made: Mapping[str, Any], credential: Mapping[str, str]) -> None:
    """Have the cloud in both files, and the others as they are there."""
    clouds: dict[str, Any] = read_state(lab)["clouds"] if lab.state.exists() else {}
    entries: dict[str, Any] = yaml.safe_load(lab.clouds_yaml.read_text())["clouds"] if lab.clouds_yaml.exists() else {}
    clouds[cloud.name] = {
        "driver": cloud.driver,
        "auth_url": cloud.auth_url,
        "region": cloud.region,
        "libvirt_uri": cloud.host.libvirt_uri,
        "instances": str(cloud.instances),
        "accounts": {account: f"{cloud.name}-{account}" for account in ("admin", OPERATOR, NEIGHBOUR)},
        **made,
    }
    entries |= _entries(lab, cloud, credential)
    write(lab.clouds_yaml, yaml.safe_dump({"clouds": entries}, sort_keys=False), 0o600)
    document = {"version": VERSION, "home": str(lab.home), "clouds_yaml": str(lab.clouds_yaml), "clouds": clouds}
    write(lab.state, json.dumps(document, indent=2) + "\n")
    write(lab.spec, _spec(clouds))


def read_state(lab: Lab) -> dict[str, Any]:
    """The content of state.json. Raises FileNotFoundError where the lab has never been up."""
    document: dict[str, Any] = json.loads(lab.state.read_text())
    return document


def _spec(clouds: Mapping[str, Any]) -> str:
    places: list[dict[str, Any]] = [{"name": "ulm", "libvirt": {"uri": "qemu:///system"}}]
    for name, told in clouds.items():
        if not told["libvirt_uri"]:
            continue
        place = {
            "cloud": name,
            "region": told["region"],
            "flavor": "cloudfit.small",
            "network": told["network"]["name"],
            "availability_zone": told["availability_zone"],
            "volume_type": told["volume_type"],
            "agent": {"hypervisor": told["libvirt_uri"]},
        }
        places.append({"name": name, "openstack": place})
    spec = {"apiVersion": "cloudfit/v1", "group": "ledger", "service": "kv", "f": (len(places) - 1) // 2}
    return yaml.safe_dump({**spec, "clouds": places}, sort_keys=False)


def _entries(lab: Lab, cloud: Cloud, credential: Mapping[str, str]) -> dict[str, Any]:
    common = {"region_name": cloud.region, "identity_api_version": "3"}
    entries: dict[str, Any] = {
        cloud.name: {
            "auth_type": "v3applicationcredential",
            "auth": {
                "auth_url": cloud.auth_url,
                "application_credential_id": credential["id"],
                "application_credential_secret": credential["secret"],
            },
            **common,
        }
    }
    for account in ("admin", OPERATOR, NEIGHBOUR):
        entries[f"{cloud.name}-{account}"] = {
            "auth": {
                "auth_url": cloud.auth_url,
                "username": account,
                "password": lab.password,
                "project_name": account,
                "user_domain_name": "Default",
                "project_domain_name": "Default",
            },
            **common,
        }
    return entries
