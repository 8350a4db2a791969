"""The configuration files of one cloud. What a service shares with others is written once here."""

from collections.abc import Mapping
from pathlib import Path

from tests.openstack.lab.console import write
from tests.openstack.lab.infrastructure import DATABASE_USER
from tests.openstack.lab.layout import Cloud, Host, Lab

Settings = dict[str, dict[str, object]]  # section -> option -> value
SERVICE_USER = "svc"
PHYSICAL_NETWORK = "physnet1"
# Modules of ours that run inside OpenStack's services, from a directory in their PYTHONPATH.
PLUGINS = ("file_key_manager.py", "own_ports_firewall.py")
FAKE_COMPUTE = "many_nodes.py"  # a program
LOG_MIB = 16  # of one log file; the one before it is kept
# There is no Barbican, and Nova's ConfKeyManager cannot store the secrets of virtual TPMs.
_KEY_MANAGER = {"backend": "file_key_manager.FileKeyManager"}
_CONCURRENT = {"max_pool_size": 5, "max_overflow": 60, "connection_recycle_time": 280}


def render(settings: Mapping[str, Mapping[str, object]]) -> str:
    """The text of an oslo.config file."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{option} = {value}\n" for option, value in options.items())
        for section, options in settings.items()
    )


def config_file(cloud: Cloud, service: str, name: str = "") -> Path:
    """Where a service's file is; `name` without suffix, default as the service."""
    return cloud.etc / service / f"{name or service}.conf"


def write_all(lab: Lab, cloud: Cloud) -> None:
    """All files of a cloud. Those that are as they should be are not touched."""
    write_secret = 0o600
    paste = "api-paste.ini"
    for service, source in (
        ("glance", "/usr/share/glance-common/glance-api-paste.ini"),
        ("nova", f"/usr/share/nova-common/{paste}"),
        ("neutron", f"/usr/share/neutron-common/{paste}"),
        ("cinder", f"/usr/share/cinder-common/{paste}"),
        ("cinder", "/etc/cinder/resource_filters.json"),
    ):
        write(cloud.etc / service / Path(source).name, Path(source).read_text())
    nova = _nova(lab, cloud)
    # nova-compute refuses to know databases ("No DB access allowed in nova-compute").
    compute = {k: v for k, v in nova.items() if k not in ("api_database", "database")}
    files: dict[tuple[str, str], Settings] = {
        ("keystone", "keystone"): _keystone(lab, cloud),
        ("placement", "placement"): _placement(lab, cloud),
        ("glance", "glance-api"): _glance(lab, cloud),
        ("nova", "nova"): nova,
        ("nova", compute_name(cloud.host)): _of_host(compute, cloud.host, cloud.spare),
        ("nova", compute_name(cloud.spare)): _of_host(compute, cloud.spare, cloud.host),
        ("neutron", "neutron"): _neutron(lab, cloud),
        ("neutron", "linuxbridge"): _linuxbridge(cloud),
        ("neutron", "dhcp"): _dhcp(),
        ("cinder", "cinder"): _cinder(lab, cloud),
        ("cinder", "rootwrap"): _rootwrap(lab),
    }
    for (service, name), settings in files.items():
        write(config_file(cloud, service, name), render(settings), write_secret)
    write(cloud.etc / "cinder/nfs_shares", f"127.0.0.1:{cloud.home / 'volumes'}\n")


def compute_name(host: Host) -> str:
    """Of a host's nova-compute, as its file and its process are called."""
    return f"nova-compute-{host.letter}" if host.letter else "nova-compute"


def database_url(lab: Lab, cloud: Cloud, schema: str) -> str:
    """SQLAlchemy's name of a database."""
    server = f"{DATABASE_USER}:{lab.password}@127.0.0.1:{lab.database_port}"
    return f"mysql+pymysql://{server}/{cloud.databases[schema]}"


def service_tools(cloud: Cloud) -> tuple[str, str]:
    """`--config-file` and the file of Nova, for `nova-manage`."""
    return "--config-file", str(config_file(cloud, "nova"))


def _common(lab: Lab, cloud: Cloud) -> dict[str, object]:
    server = f"{DATABASE_USER}:{lab.password}@127.0.0.1:{lab.message_port}"
    return {
        "transport_url": f"rabbit://{server}/{cloud.name}",
        "log_rotation_type": "size",
        "max_logfile_size_mb": LOG_MIB,
        "max_logfile_count": 1,
    }


def _database(lab: Lab, cloud: Cloud, schema: str) -> dict[str, object]:
    return {"connection": database_url(lab, cloud, schema), **_CONCURRENT}


def _auth(lab: Lab, cloud: Cloud) -> dict[str, object]:
    return {
        "auth_url": cloud.auth_url,
        "auth_type": "password",
        "username": SERVICE_USER,
        "password": lab.password,
        "project_name": "service",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": cloud.region,
    }


def _token_check(lab: Lab, cloud: Cloud) -> dict[str, object]:
    return {
        "www_authenticate_uri": cloud.auth_url,
        "service_token_roles": "service",
        "service_token_roles_required": "true",
        **_auth(lab, cloud),
    }


def _service_user(lab: Lab, cloud: Cloud) -> dict[str, object]:
    # Cinder deletes attachments only for requests with a service token (ConflictNovaUsingAttachment otherwise).
    return {"send_service_user_token": "true", **_auth(lab, cloud)}


def _quiet(cloud: Cloud) -> Settings:
    return {
        "oslo_messaging_notifications": {"driver": "noop"},
        "oslo_concurrency": {"lock_path": cloud.home / "lock"},
    }


def _privsep(service: str, cloud: Cloud) -> dict[str, object]:
    return {"helper_command": f"privsep-helper --config-file {config_file(cloud, service)}"}


def _keystone(lab: Lab, cloud: Cloud) -> Settings:
    etc = cloud.etc / "keystone"
    return {
        "DEFAULT": {**_common(lab, cloud), "log_file": lab.log / f"{cloud.name}-keystone.log"},
        "database": _database(lab, cloud, "keystone"),
        "token": {"provider": "fernet"},
        "fernet_tokens": {"key_repository": etc / "fernet"},
        "credential": {"key_repository": etc / "credential"},
        # bcrypt with its usual 12 rounds costs 0.3 s of CPU a login; 4 is the fewest that it allows.
        "identity": {"password_hash_rounds": 4},
        "cache": {"enabled": "true", "backend": "oslo_cache.dict"},
        **_quiet(cloud),
    }


def _placement(lab: Lab, cloud: Cloud) -> Settings:
    return {
        "DEFAULT": {**_common(lab, cloud), "log_file": lab.log / f"{cloud.name}-placement.log"},
        "api": {"auth_strategy": "keystone"},
        "keystone_authtoken": _token_check(lab, cloud),
        "placement_database": _database(lab, cloud, "placement"),
    }


def _glance(lab: Lab, cloud: Cloud) -> Settings:
    images = cloud.home / "images"
    return {
        "DEFAULT": {
            **_common(lab, cloud),
            "log_file": lab.log / f"{cloud.name}-glance.log",
            "bind_host": "127.0.0.1",
            "bind_port": cloud.port("glance"),
            "workers": 0,
            "enabled_import_methods": "[glance-direct,copy-image]",
            "node_staging_uri": f"file://{images}/staging",
            "enabled_backends": "file:file",
        },
        "file": {"filesystem_store_datadir": images / "store"},
        "glance_store": {"default_backend": "file"},
        "os_glance_staging_store": {"filesystem_store_datadir": images / "staging"},
        "os_glance_tasks_store": {"filesystem_store_datadir": images / "tasks"},
        "database": _database(lab, cloud, "glance"),
        "keystone_authtoken": _token_check(lab, cloud),
        "key_manager": _KEY_MANAGER,  # of the certificates that signed images name
        "paste_deploy": {"flavor": "keystone", "config_file": cloud.etc / "glance/glance-api-paste.ini"},
        **_quiet(cloud),
    }


def _nova(lab: Lab, cloud: Cloud) -> Settings:
    auth = _auth(lab, cloud)
    return {
        "DEFAULT": {
            **_common(lab, cloud),
            "my_ip": "127.0.0.1",
            "host": cloud.host.name,
            "compute_driver": "libvirt.LibvirtDriver" if cloud.real else "fake.ManyNodes",
            "state_path": cloud.home / "nova",
            "instances_path": cloud.instances,
            "instance_name_template": f"{cloud.name}-%08x",
            "enabled_apis": "osapi_compute",
            "osapi_compute_listen": "127.0.0.1",
            "osapi_compute_listen_port": cloud.port("nova"),
            "osapi_compute_workers": 1,
            # More is allowed than the host has: what bounds tests is the host's memory, not Nova's sums.
            "cpu_allocation_ratio": 64,
            "ram_allocation_ratio": 4,
            "disk_allocation_ratio": 100,
            "reserved_host_memory_mb": 0,
            "reserved_host_disk_mb": 0,
            "vif_plugging_timeout": 180,
            "resume_guests_state_on_host_boot": "false",
            "rpc_response_timeout": 180,
            "allow_resize_to_same_host": "true",
        },
        "api": {"auth_strategy": "keystone"},
        "wsgi": {"api_paste_config": cloud.etc / "nova/api-paste.ini"},
        "api_database": _database(lab, cloud, "nova_api"),
        "database": _database(lab, cloud, "nova"),
        "conductor": {"workers": 1},
        "scheduler": {
            "workers": 1,
            "discover_hosts_in_cells_interval": 30,
            # Nova tells Placement of one node only that its host is in a zone.
            "query_placement_for_availability_zone": "true" if cloud.real else "false",
        },
        "glance": {"api_servers": cloud.url("glance")},
        "placement": auth,
        "neutron": auth,
        "cinder": {**auth, "catalog_info": "volumev3:cinderv3:internalURL"},
        "keystone": auth,
        "service_user": _service_user(lab, cloud),
        "keystone_authtoken": _token_check(lab, cloud),
        "vnc": {"enabled": "false"},
        "key_manager": _KEY_MANAGER,
        "nova_sys_admin": _privsep("nova", cloud),
        "vif_plug_linux_bridge_privileged": _privsep("nova", cloud),
        "privsep_osbrick": _privsep("nova", cloud),
        **_quiet(cloud),
        **({} if cloud.real else {"filter_scheduler": _MANY_NODES}),
    }


_MANY_NODES: dict[str, object] = {
    "enabled_filters": "AvailabilityZoneFilter,ComputeFilter,ImagePropertiesFilter",
    "host_subset_size": 30,  # any of the nodes of many_nodes.py: of equal ones the first would be taken
}


def _of_host(compute: Settings, host: Host, other: Host) -> Settings:
    """Of one of a cloud's compute hosts, which moves its machines to the other one over loopback.

    The spare one boots signed images only; what the two share in their cache it takes as verified.
    """
    libvirt = {
        "virt_type": "qemu",
        "cpu_mode": "none",
        "connection_uri": host.libvirt_uri,
        "swtpm_enabled": "true",
        "swtpm_user": "root",
        "swtpm_group": "root",
        "nfs_mount_point_base": host.cloud.home / "mounts" / compute_name(host),
        "num_pcie_ports": 12,
        "live_migration_inbound_addr": "127.0.0.1",
        # Nova puts that address into the URI; "%.0s" takes none of its letters.
        "live_migration_uri": f"{other.libvirt_uri}%.0s",
    }
    own: Settings = {"DEFAULT": {**compute["DEFAULT"], "host": host.name}}
    if host.letter:
        own["glance"] = {**compute["glance"], "verify_glance_signatures": "true"}
    return compute | own | ({"libvirt": libvirt} if host.cloud.real else {})


def _neutron(lab: Lab, cloud: Cloud) -> Settings:
    return {
        "DEFAULT": {
            **_common(lab, cloud),
            "bind_host": "127.0.0.1",
            "bind_port": cloud.port("neutron"),
            "host": cloud.host.name,
            "state_path": cloud.home / "neutron",
            "core_plugin": "ml2",
            "service_plugins": "",
            "auth_strategy": "keystone",
            "api_workers": 0,
            "rpc_workers": 1,
            "rpc_state_report_workers": 0,
            "api_paste_config": cloud.etc / "neutron/api-paste.ini",
            "dns_domain": f"{cloud.name}.test.",
            "notify_nova_on_port_status_changes": "true",
            "notify_nova_on_port_data_changes": "true",
            "dhcp_agents_per_network": 1,
            "setproctitle": "off",  # it overwrites the environment by which `processes` knows its own
        },
        "experimental": {"linuxbridge": "true"},
        "database": _database(lab, cloud, "neutron"),
        "keystone_authtoken": _token_check(lab, cloud),
        "nova": _auth(lab, cloud),
        "placement": _auth(lab, cloud),
        "agent": {"root_helper": "env", "root_helper_daemon": "", "report_interval": 30},
        "ml2": {
            "type_drivers": "flat,local",
            "tenant_network_types": "local",
            "mechanism_drivers": "linuxbridge",
            "extension_drivers": "port_security",
        },
        "ml2_type_flat": {"flat_networks": PHYSICAL_NETWORK},
        "securitygroup": {"enable_security_group": "true", "enable_ipset": "false"},
        **_quiet(cloud),
    }


def _linuxbridge(cloud: Cloud) -> Settings:
    return {
        # Not the bridge's name: guests on a bridge of the agent's own are not reachable from the host.
        "linux_bridge": {"physical_interface_mappings": f"{PHYSICAL_NETWORK}:{cloud.cloud_link}"},
        "vxlan": {"enable_vxlan": "false"},
        "securitygroup": {
            "firewall_driver": "own_ports_firewall.OwnPortsFirewall" if cloud.real else "noop",
            "enable_security_group": "true",
            "enable_ipset": "false",
        },
        "agent": {"root_helper": "env", "polling_interval": 1},
    }


def _dhcp() -> Settings:
    return {
        "DEFAULT": {
            "interface_driver": "linuxbridge",
            "dhcp_driver": "neutron.agent.linux.dhcp.Dnsmasq",
            "enable_isolated_metadata": "false",
        },
        "agent": {"root_helper": "env"},
    }


def _cinder(lab: Lab, cloud: Cloud) -> Settings:
    etc = cloud.etc / "cinder"
    return {
        "DEFAULT": {
            **_common(lab, cloud),
            "log_dir": lab.log,
            "my_ip": "127.0.0.1",
            "host": cloud.host.name,
            "auth_strategy": "keystone",
            "state_path": cloud.home / "cinder",
            "api_paste_config": etc / "api-paste.ini",
            "resource_query_filters_file": etc / "resource_filters.json",
            "enabled_backends": "nfs",
            "glance_api_servers": cloud.url("glance"),
            "rootwrap_config": config_file(cloud, "cinder", "rootwrap"),
            "osapi_volume_listen": "127.0.0.1",
            "osapi_volume_listen_port": cloud.port("cinder"),
            "osapi_volume_workers": 1,
        },
        "nfs": {
            "volume_driver": "cinder.volume.drivers.nfs.NfsDriver",
            "volume_backend_name": "nfs",
            "nfs_shares_config": etc / "nfs_shares",
            "nfs_mount_point_base": cloud.home / "mounts/cinder",
            "nas_secure_file_operations": "false",
            "nas_secure_file_permissions": "false",
            "nfs_snapshot_support": "true",
        },
        "database": _database(lab, cloud, "cinder"),
        "keystone_authtoken": _token_check(lab, cloud),
        "nova": _auth(lab, cloud),
        "service_user": _service_user(lab, cloud),
        "key_manager": _KEY_MANAGER,
        "cinder_sys_admin": _privsep("cinder", cloud),
        "privsep_osbrick": _privsep("cinder", cloud),
        **_quiet(cloud),
    }


def _rootwrap(lab: Lab) -> Settings:
    return {
        "DEFAULT": {
            "filters_path": "/etc/cinder/rootwrap.d,/usr/share/cinder/rootwrap",
            "exec_dirs": f"{lab.bin},/sbin,/usr/sbin,/bin,/usr/bin,/usr/local/bin,/usr/local/sbin",
            "use_syslog": "False",
        }
    }


def install_programs(lab: Lab, cloud: Cloud) -> None:
    """Programs that the services find before the system's, and the key manager."""
    for name, text in _PROGRAMS.items():
        write(lab.bin / name, text, 0o755)
    # Neutron's agents name their iptables chains after their program, and drop chains of that name which they do not
    # know: under one name, two agents on a host would undo each other's security groups.
    link = lab.bin / cloud.chain_prefix
    if not link.is_symlink():
        link.symlink_to("/usr/bin/neutron-linuxbridge-agent")
    for source in (Path(__file__).with_name(name) for name in PLUGINS):
        write(lab.home / "lib" / source.name, source.read_text())
    write(lab.bin / FAKE_COMPUTE, Path(__file__).with_name(FAKE_COMPUTE).read_text(), 0o755)


# Kernels of test machines have neither NFS nor iSCSI. A volume's share is a directory here, so mounting it is a bind
# mount; everything else is the system's own mount.
_PROGRAMS = {
    "mount": """\
#!/bin/sh
# Mounts "NFS" shares of this host, 127.0.0.1:DIRECTORY, without a kernel that knows NFS.
if [ "${1-}" = -t ] && [ "${2-}" = nfs ]; then
    for word; do source=${target-}; target=$word; done
    # Nova and Cinder do not recognise a bind mount as their share, and would pile thousands upon each other.
    if mountpoint -q "$target"; then exit 0; fi
    exec /bin/mount --bind "${source#*:}" "$target"
fi
exec /bin/mount "$@"
""",
    "mount.nfs": """\
#!/bin/sh
# Cinder asks whether this program is there; `mount` beside it does the work.
exit 1
""",
}
