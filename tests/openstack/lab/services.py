"""The processes of one cloud: what is started, in which order, and when each is ready."""

import urllib.error
import urllib.request
from pathlib import Path

from tests.openstack.lab.console import once, run, say, wait_until
from tests.openstack.lab.databases import fill, map_hosts
from tests.openstack.lab.hosts import READY_TIMEOUT_S, compute, libvirtd, prepare_libvirt, wait_report
from tests.openstack.lab.infrastructure import add_virtual_host, wait_messages
from tests.openstack.lab.layout import Cloud, Lab
from tests.openstack.lab.processes import Service, check_alive, environment, knowing_keys, plain, start
from tests.openstack.lab.resources import make_catalogue
from tests.openstack.lab.settings import config_file, install_programs, write_all
from tests.openstack.lab.wiring import wire_up

COMMAND_TIMEOUT_S = 300.0
_DIRECTORIES = (
    "cinder", "images/store", "images/staging", "images/tasks", "instances", "lock", "mounts/cinder",
    "neutron", "nova", "volumes",
)  # fmt: skip


def prepare(lab: Lab, cloud: Cloud) -> None:
    """Directories, the wire and all files; no process yet."""
    for name in _DIRECTORIES:
        (cloud.home / name).mkdir(parents=True, exist_ok=True)
    wire_up(cloud)
    install_programs(lab, cloud)
    write_all(lab, cloud)
    if cloud.real:
        prepare_libvirt(lab, cloud.host)


def start_all(lab: Lab, cloud: Cloud) -> None:
    """Databases, then every service but the DHCP agent; they get ready by themselves, see `wait_ready`."""
    fill(lab, cloud)
    wait_messages(lab)
    _bootstrap(lab, cloud)
    start(lab, _keystone(lab, cloud))
    if cloud.real:
        start(lab, libvirtd(cloud.host))
    _wait_http(lab, cloud, "keystone")
    with once(cloud.home / "done/catalogue") as todo:
        if todo:
            make_catalogue(lab, cloud)
            say(f"{cloud.name}: catalogue")
    with once(cloud.home / "done/messages") as todo:
        if todo:
            add_virtual_host(lab, cloud.name)
    for service in _services(lab, cloud):
        start(lab, service)
    _wait_http(lab, cloud, "placement")
    start(lab, compute(lab, cloud.host))


def wait_ready(lab: Lab, cloud: Cloud) -> None:
    """Until a server can be made. Raises LabError naming what is not there."""
    for name in ("glance", "neutron", "nova", "cinder"):
        _wait_http(lab, cloud, name)
    nova, neutron, cinder = (cloud.databases[name] for name in ("nova", "neutron", "cinder"))
    for service, binary, seen in (
        ("nova-conductor", "nova-conductor", f"{nova}.services where `binary`='{{}}' and last_seen_up"),
        ("nova-scheduler", "nova-scheduler", f"{nova}.services where `binary`='{{}}' and last_seen_up"),
        ("nova-compute", "nova-compute", f"{nova}.services where `binary`='{{}}' and last_seen_up"),
        ("linuxbridge", "lb-", f"{neutron}.agents where `binary` like '%linuxbridge%' and heartbeat_timestamp"),
        ("cinder-scheduler", "cinder-scheduler", f"{cinder}.services where `binary`='{{}}' and updated_at"),
        ("cinder-volume", "cinder-volume", f"{cinder}.services where `binary`='{{}}' and updated_at"),
    ):
        wait_report(lab, f"{cloud.name}-{service}", seen.format(binary))
    with once(cloud.home / "done/hosts") as todo:
        if todo:
            map_hosts(lab, cloud)
    # Only now: an agent whose first call finds no server waits a minute before the next.
    start(lab, _dhcp_agent(lab, cloud))
    seen = f"{neutron}.agents where `binary`='neutron-dhcp-agent' and heartbeat_timestamp"
    wait_report(lab, f"{cloud.name}-dhcp", seen)


def _wait_http(lab: Lab, cloud: Cloud, service: str) -> None:
    name = f"{cloud.name}-{_PROCESS_OF[service]}"

    def answers() -> bool:
        check_alive(lab, name)
        try:
            urllib.request.urlopen(cloud.url(service), timeout=30).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False
        return True

    wait_until(answers, READY_TIMEOUT_S, f"{name} answers at {cloud.url(service)}", lab.log / f"{name}.out")


_PROCESS_OF = {
    "keystone": "keystone",
    "placement": "placement",
    "glance": "glance-api",
    "neutron": "neutron-server",
    "nova": "nova-api",
    "cinder": "cinder-api",
}


def _bootstrap(lab: Lab, cloud: Cloud) -> None:
    with once(cloud.home / "done/keystone") as todo:
        if not todo:
            return
        manage: list[str | Path] = ["keystone-manage", "--config-file", config_file(cloud, "keystone")]
        owner = ["--keystone-user", "root", "--keystone-group", "root"]
        urls = [f"--bootstrap-{kind}-url={cloud.auth_url}" for kind in ("admin", "internal", "public")]
        for words in (
            ["fernet_setup", *owner],
            ["credential_setup", *owner],
            ["bootstrap", f"--bootstrap-password={lab.password}", f"--bootstrap-region-id={cloud.region}", *urls],
        ):
            log = lab.log / f"{cloud.name}-bootstrap.out"
            for repository in ("fernet", "credential"):
                (cloud.etc / "keystone" / repository).mkdir(mode=0o700, exist_ok=True)
            run([*manage, *words], log=log, env=environment(lab), timeout_s=COMMAND_TIMEOUT_S)


def _wsgi(name: str, port: int, script: str, env: dict[str, str], file: Path) -> Service:
    # `Connection: close`: with kept connections uWSGI resets one now and then, which clients take for a failure.
    command = [
        "uwsgi_python3", "--plugin", "python3", "--http-socket", f"127.0.0.1:{port}", "--wsgi-file", script,
        "--processes", "1", "--threads", "8", "--enable-threads", "--buffer-size", "65535",
        "--add-header", "Connection: close", "--need-app", "--die-on-term", "--master", "--lazy-apps",
        "--thunder-lock", "--disable-logging", "--listen", "100",
    ]  # fmt: skip
    return Service(name, command, env=env, files=[file])


def _keystone(lab: Lab, cloud: Cloud) -> Service:
    file = config_file(cloud, "keystone")
    env = {"OS_KEYSTONE_CONFIG_DIR": str(file.parent), "OS_KEYSTONE_CONFIG_FILES": str(file)}
    return _wsgi(f"{cloud.name}-keystone", cloud.port("keystone"), "/usr/bin/keystone-wsgi-public", env, file)


def _services(lab: Lab, cloud: Cloud) -> list[Service]:
    """All between Keystone and the compute service. Only Placement is fit for uWSGI: Nova's and Cinder's API hang or do
    not load under its threads, so they run their own servers."""
    placement = config_file(cloud, "placement")
    env = {"OS_PLACEMENT_CONFIG_DIR": str(placement.parent)}
    return [
        _wsgi(f"{cloud.name}-placement", cloud.port("placement"), "/usr/bin/placement-api", env, placement),
        plain(lab, cloud, "neutron-server", config_file(cloud, "neutron")),
        knowing_keys(lab, cloud, "glance-api", config_file(cloud, "glance", "glance-api")),
        *(plain(lab, cloud, f"nova-{name}", config_file(cloud, "nova")) for name in ("api", "conductor", "scheduler")),
        plain(
            lab,
            cloud,
            "linuxbridge",
            config_file(cloud, "neutron"),
            config_file(cloud, "neutron", "linuxbridge"),
            program=str(lab.bin / cloud.chain_prefix),
            plugin="own_ports_firewall.py",
        ),
        *(
            knowing_keys(lab, cloud, f"cinder-{name}", config_file(cloud, "cinder"))
            for name in ("api", "scheduler", "volume")
        ),
    ]


def _dhcp_agent(lab: Lab, cloud: Cloud) -> Service:
    files = config_file(cloud, "neutron"), config_file(cloud, "neutron", "dhcp")
    return plain(lab, cloud, "dhcp", *files, program="neutron-dhcp-agent")
