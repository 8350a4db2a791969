"""The processes of one cloud: what is started, in which order, and when each is ready."""

import datetime as dt
import urllib.error
import urllib.request
from pathlib import Path

from tests.openstack.lab.console import once, run, say, wait_until, write
from tests.openstack.lab.databases import fill, map_hosts
from tests.openstack.lab.infrastructure import add_virtual_host, sql, wait_messages
from tests.openstack.lab.layout import Cloud, Lab
from tests.openstack.lab.processes import Service, check_alive, environment, find, start
from tests.openstack.lab.resources import make_catalogue
from tests.openstack.lab.settings import config_file, install_programs, write_all
from tests.openstack.lab.wiring import wire_up

READY_TIMEOUT_S = 300.0  # 20 s on an idle machine; one start of a privsep daemon took 47 s on a busy one
COMMAND_TIMEOUT_S = 300.0
OF_HOST = [Path("/var/lib/libvirt/qemu") / name for name in ("channel", "nvram")]  # where agents look for files
_DIRECTORIES = (
    "cinder", "images/store", "images/staging", "images/tasks", "instances", "lock", "mounts/cinder", "mounts/nova",
    "neutron", "nova", "volumes", *(f"libvirt/{name}" for name in ("cache", "etc", "lib", "localca", "log", "run")),
)  # fmt: skip


def prepare(lab: Lab, cloud: Cloud) -> None:
    """Directories, the wire and all files; no process yet."""
    for name in _DIRECTORIES:
        (cloud.home / name).mkdir(parents=True, exist_ok=True)
    wire_up(cloud)
    install_programs(lab, cloud)
    write_all(lab, cloud)
    if cloud.real:
        _write_libvirt(lab, cloud)


def start_all(lab: Lab, cloud: Cloud) -> None:
    """Databases, then every service but the DHCP agent; they get ready by themselves, see `wait_ready`."""
    fill(lab, cloud)
    wait_messages(lab)
    _bootstrap(lab, cloud)
    start(lab, _keystone(lab, cloud))
    if cloud.real:
        start(lab, _libvirtd(cloud))
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
    start(lab, _compute(lab, cloud))


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
        _wait_report(lab, cloud, service, seen.format(binary))
    map_hosts(lab, cloud)
    # Only now: an agent whose first call finds no server waits a minute before the next.
    start(lab, _dhcp_agent(lab, cloud))
    _wait_report(lab, cloud, "dhcp", f"{neutron}.agents where `binary`='neutron-dhcp-agent' and heartbeat_timestamp")


def _wait_report(lab: Lab, cloud: Cloud, service: str, row: str) -> None:
    """Until the service has reported in the database since its start: then it takes orders from its queue."""
    name = f"{cloud.name}-{service}"

    def reported() -> bool:
        check_alive(lab, name)
        running = find(lab, name)
        since = dt.datetime.fromtimestamp(running.since if running else 0, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        return sql(lab, f"select count(*) from {row} >= '{since}'").strip() != "0"

    wait_until(reported, READY_TIMEOUT_S, f"{name} reports", lab.log / f"{name}.log")


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
        _plain(lab, cloud, "neutron-server", config_file(cloud, "neutron")),
        _plain(lab, cloud, "glance-api", config_file(cloud, "glance", "glance-api"), env=_keys(cloud), plugin=_KEYS),
        *(_plain(lab, cloud, f"nova-{name}", config_file(cloud, "nova")) for name in ("api", "conductor", "scheduler")),
        _plain(
            lab,
            cloud,
            "linuxbridge",
            config_file(cloud, "neutron"),
            config_file(cloud, "neutron", "linuxbridge"),
            program=str(lab.bin / cloud.chain_prefix),
            plugin="own_ports_firewall.py",
        ),
        *(
            _plain(lab, cloud, f"cinder-{name}", config_file(cloud, "cinder"), env=_keys(cloud), plugin=_KEYS)
            for name in ("api", "scheduler", "volume")
        ),
    ]


def _dhcp_agent(lab: Lab, cloud: Cloud) -> Service:
    files = config_file(cloud, "neutron"), config_file(cloud, "neutron", "dhcp")
    return _plain(lab, cloud, "dhcp", *files, program="neutron-dhcp-agent")


def _compute(lab: Lab, cloud: Cloud) -> Service:
    file = config_file(cloud, "nova", "nova-compute")
    return _plain(lab, cloud, "nova-compute", file, env=_keys(cloud), plugin=_KEYS)


_KEYS = "file_key_manager.py"


def _keys(cloud: Cloud) -> dict[str, str]:
    """For the services that fetch secrets or certificates."""
    return {"CLOUDFIT_LAB_KEYS": str(cloud.keys)}


def _plain(
    lab: Lab,
    cloud: Cloud,
    name: str,
    *files: Path,
    program: str = "",
    env: dict[str, str] | None = None,
    plugin: str = "",
) -> Service:
    full = f"{cloud.name}-{name}"
    options = [word for file in files for word in ("--config-file", str(file))]
    command = [program or name, *options, "--log-file", str(lab.log / f"{full}.log")]
    library = lab.home / "lib"
    path = {"PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1"} if plugin else {}
    return Service(full, command, env=path | (env or {}), files=[*files, *([library / plugin] if plugin else [])])


def _libvirtd(cloud: Cloud) -> Service:
    """A libvirtd that sees its own directories where the host's has them: in a mount namespace of its own.

    `slave`: volumes mounted on the host later are seen in it, nothing goes the other way. Only the sockets of channels
    and the variables of UEFI firmware are where the host has its own: an agent of this host opens what libvirt names,
    and names of machines begin with their cloud's.
    """
    home = cloud.home / "libvirt"
    places = {
        "run": "/run/libvirt",
        "lib": "/var/lib/libvirt",
        "log": "/var/log/libvirt",
        "cache": "/var/cache/libvirt",
        "etc": "/etc/libvirt",
        "localca": "/var/lib/swtpm-localca",  # made by root here, by another user for the host's own
    }
    script = ["set -e"]
    for path in OF_HOST:
        inside = home / "lib/qemu" / path.name
        for directory in (path, inside):
            directory.mkdir(parents=True, exist_ok=True)
        script.append(f"mount --bind {path} {inside}")
    for name, place in places.items():
        Path(place).mkdir(parents=True, exist_ok=True)
        script.append(f"mount --rbind {home / name} {place}")
    script.append(f"exec libvirtd -f /etc/libvirt/libvirtd.conf -p {home}/run/libvirtd.pid")
    command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "\n".join(script)]
    files = [home / "etc" / name for name in ("qemu.conf", "libvirtd.conf")]
    return Service(f"{cloud.name}-libvirtd", command, files=files)


def _write_libvirt(lab: Lab, cloud: Cloud) -> None:
    """Machines run as root, without security drivers, cgroups or namespaces: nothing here isolates them."""
    etc = cloud.home / "libvirt/etc"
    qemu = {
        "user": "root",
        "group": "libvirt-qemu",  # libvirtd gives it the directory of channels, which machines of the host's also use
        "dynamic_ownership": 0,
        "remember_owner": 0,
        "security_driver": "none",
        "stdio_handler": "file",  # no virtlogd
        "swtpm_user": "root",
        "swtpm_group": "root",
    }
    daemon = {
        "listen_tls": 0,
        "listen_tcp": 0,
        "auth_unix_ro": "none",
        "auth_unix_rw": "none",
        "unix_sock_group": "root",
        "log_outputs": f"3:file:{lab.log / cloud.name}-libvirtd.log",
    }
    lists = "namespaces = []\ncgroup_controllers = []\n"
    write(etc / "qemu.conf", _libvirt_text(qemu) + lists)
    write(etc / "libvirtd.conf", _libvirt_text(daemon))


def _libvirt_text(options: dict[str, object]) -> str:
    return "".join(f"{k} = {v}\n" if isinstance(v, int) else f'{k} = "{v}"\n' for k, v in options.items())
