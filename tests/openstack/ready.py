"""How long until a group of three serves: over all clouds of the lab's spec at once, and on each cloud alone.

`python -m tests.openstack.ready [--rounds 3]`, on the lab (make openstack-lab). Each round applies the spec, then the
same group on one cloud after the other, each with a home of its own, so that images are uploaded each time. Prints one
JSON document: seconds of each `group apply`, and the ratio of the first to the slowest single cloud (medians).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from tests.openstack.lab.layout import DEFAULT_HOME, Lab
from tests.user import User

GROUP = "ready"


def apply_s(lab: Lab, clouds: list[dict[str, Any]], replicas: int) -> float:
    spec = {
        "apiVersion": "cloudfit/v1", "group": GROUP, "service": "kv", "f": 1, "clouds": clouds,
        "placement": {"max_per_cloud": -(-replicas // len(clouds))},
    }  # fmt: skip
    with User.at_work(GROUP, yaml.safe_dump(spec), OS_CLIENT_CONFIG_FILE=str(lab.clouds_yaml)) as user:
        user.run("image", "build")
        began = time.monotonic()
        user.run("group", "apply", str(user.spec))
        took_s = time.monotonic() - began
        user.run("group", "destroy", GROUP)
        return took_s


def main() -> None:
    parser = argparse.ArgumentParser("ready", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME)
    options = parser.parse_args()
    lab = Lab(options.home)
    clouds = yaml.safe_load(lab.spec.read_text())["clouds"]
    together: list[float] = []
    alone: dict[str, list[float]] = {cloud["name"]: [] for cloud in clouds}
    for _ in range(options.rounds):
        together.append(apply_s(lab, clouds, len(clouds)))
        for cloud in clouds:
            alone[cloud["name"]].append(apply_s(lab, [cloud], len(clouds)))
    slowest = max(statistics.median(times) for times in alone.values())
    found = {
        "together_s": [round(t, 1) for t in together],
        "alone_s": {name: [round(t, 1) for t in times] for name, times in alone.items()},
        "ratio": round(statistics.median(together) / slowest, 2),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
