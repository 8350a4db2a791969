"""The lab's command: `python -m tests.openstack.lab [--clouds NAME…] -- up|down|purge|status`."""

import argparse
import contextlib
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.openstack.lab import hosts, infrastructure, packages, processes, resources, services, state, wiring
from tests.openstack.lab.console import LabError, once, say
from tests.openstack.lab.layout import DEFAULT_CLOUDS, DEFAULT_HOME, KNOWN_CLOUDS, Cloud, Lab

_WRITING = threading.Lock()  # of the files that all clouds stand in


def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 it failed, 2 bad usage."""
    parser = argparse.ArgumentParser("lab", description="Real OpenStack clouds on this machine, for tests.")
    parser.add_argument("action", choices=["up", "down", "purge", "status"])
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help=f"directory of the lab, default {DEFAULT_HOME}")
    parser.add_argument(
        "--clouds",
        nargs="+",
        choices=KNOWN_CLOUDS,
        help=f"others are left as they are; default for up {' '.join(DEFAULT_CLOUDS)}, for down everything",
    )
    options = parser.parse_args(argv)
    lab = Lab(options.home.absolute())
    try:
        _check_root()
        if options.action == "status":
            status(lab)
        elif options.action == "up":
            with _alone(lab):
                up(lab, [lab.cloud(name) for name in dict.fromkeys(options.clouds or DEFAULT_CLOUDS)])
        elif lab.home.exists():
            with _alone(lab):
                if options.clouds and options.action == "down":
                    down_clouds(lab, [lab.cloud(name) for name in options.clouds])
                else:
                    down(lab)
            if options.action == "purge":
                shutil.rmtree(lab.home)
                say(f"{lab.home} is removed; the Debian packages stay")
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)


def up(lab: Lab, clouds: list[Cloud]) -> None:
    """Bring the clouds up; what is up already is left alone. Prints the paths of clouds.yaml and state.json."""
    packages.install()
    lab.home.chmod(0o755)  # MariaDB and RabbitMQ have users of their own
    for directory in (lab.log, lab.run, lab.etc, lab.bin):
        directory.mkdir(exist_ok=True)
    wiring.share_home(lab)
    infrastructure.start_database(lab)
    infrastructure.start_messages(lab)
    for cloud in clouds:
        services.prepare(lab, cloud)
    infrastructure.wait_database(lab)
    for cloud in clouds:
        services.start_all(lab, cloud)
        say(f"{cloud.name}: all services started")
    with ThreadPoolExecutor(max_workers=len(clouds)) as pool:
        for finished in [pool.submit(_finish, lab, cloud) for cloud in clouds]:
            finished.result()
    for cloud in clouds:
        say(f"{cloud.name}: {cloud.auth_url}, libvirt: {cloud.host.libvirt_uri or 'none (fake driver)'}")
    print(lab.clouds_yaml)
    print(lab.state)


def _finish(lab: Lab, cloud: Cloud) -> None:
    services.wait_ready(lab, cloud)
    with once(cloud.home / f"done/resources-{resources.wanted()[:16]}") as todo:
        if todo:
            made = resources.make_resources(lab, cloud)
            with _WRITING:
                state.add_cloud(lab, cloud, made, resources.application_credential(lab, cloud))
        else:
            resources.wake_network(lab, cloud)
    say(f"{cloud.name}: ready")


def down(lab: Lab) -> None:
    """Stop everything; the clouds' data stay."""
    down_clouds(lab, lab.clouds())
    processes.stop(lab, processes.started(lab))
    processes.stop_strays(lab)
    wiring.unshare_home(lab)


def down_clouds(lab: Lab, clouds: list[Cloud]) -> None:
    """Stop these clouds and leave the others and what they share. Guests first: they would outlive their libvirtd."""
    for cloud in clouds:
        for host in (cloud.host, cloud.spare):
            hosts.destroy_guests(lab, host)
    names = tuple(f"{cloud.name}-" for cloud in clouds)
    running = [r for r in processes.started(lab) if r.name.startswith(names)]
    processes.stop(lab, running)
    for cloud in clouds:
        wiring.wire_down(cloud)
    say(f"{' '.join(cloud.name for cloud in clouds)}: {len(running)} services stopped")


def status(lab: Lab) -> None:
    """A table of services with their processes and memory, on standard output."""
    marked, guests = processes.marked(lab), processes.machines(lab)
    rows = [
        (r.name, "up" if r.alive else "DEAD", [p for p, n in marked.items() if n == r.name])
        for r in processes.started(lab)
    ]
    rows.append(("guests and helpers", "up" if guests else "none", list(guests)))
    total = 0.0
    print(f"{'service':28}{'state':8}{'processes':>10}{'MiB':>8}")
    for name, word, pids in rows:
        memory_mib = processes.memory_mib(pids)
        total += memory_mib
        print(f"{name:28}{word:8}{len(pids):10}{memory_mib:8.0f}")
    print(f"{'all':28}{'':8}{len(marked) + len(guests):10}{total:8.0f}")


def _check_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab needs root; run it with sudo")


@contextlib.contextmanager
def _alone(lab: Lab) -> Iterator[None]:
    """One command at a time on a lab; another one waits."""
    lab.home.mkdir(parents=True, exist_ok=True)
    with (lab.home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
