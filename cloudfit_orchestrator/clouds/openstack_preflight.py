"""What would make a group fail on an OpenStack cloud, found before anything is made, all at once.

Only reads, unless a probe is asked for: that makes and removes a security group, a port and a server group, because a
policy shows itself in no other way.
"""

import datetime as dt
import email.utils
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from cloudfit_orchestrator.clouds.base import Demand, Finding
from cloudfit_orchestrator.clouds.openstack_api import COMPUTE_VERSION, SERVICES, Api
from cloudfit_orchestrator.clouds.openstack_images import MAX_COMMAND_LINE, Images
from cloudfit_orchestrator.clouds.openstack_network import Network
from cloudfit_orchestrator.clouds.openstack_servers import Servers
from cloudfit_orchestrator.clouds.openstack_tags import INSTANCE, VOLUME, Reservation
from cloudfit_orchestrator.clouds.openstack_volumes import gib
from cloudfit_orchestrator.model.errors import CloudfitError, LockedOutError, PermanentError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.one_disk import STATE_ARGUMENT, STATE_OFFSET_MIB, single_disk_mib
from cloudfit_orchestrator.model.spec import OpenStackPlace

GIB = 1 << 30
DURING_RECOVERY = 2  # machines beside the old one: the new one, and the recovery machine over its disk
MAX_SKEW_S = 300.0  # Keystone's tokens and Fernet keys bear that much at most in common settings
WARN_SKEW_S = 30.0
WARN_CERTIFICATE_DAYS = 14
TLS_TIMEOUT_S = 10.0
EXTENSIONS = ("security-group", "port-security", "standard-attr-description")
FORMATS = ("aki", "ari", "raw", "qcow2")  # kernel, initramfs, root, empty state disk
UEFI_FORMATS = ("raw", "qcow2")  # disk, empty state disk
IMAGES = 4  # Glance images a deployment: the formats above
_USEFUL_ROLES = frozenset({"member", "admin", "manager"})


def flavor_faults(flavor: Mapping[str, Any], memory_mib: int, cpus: int, root_bytes: int) -> list[str]:
    """What is wrong with a flavor for such a machine, in words."""
    wrong = []
    if int(flavor.get("ram") or 0) < memory_mib:
        wrong.append(f"{flavor.get('ram')} MiB of memory, the spec wants {memory_mib}")
    if int(flavor.get("vcpus") or 0) < cpus:
        wrong.append(f"{flavor.get('vcpus')} CPUs, the spec wants {cpus}")
    disk = int(flavor.get("disk") or 0) * GIB
    if disk and disk < root_bytes:
        wrong.append(f"a disk of {disk >> 30} GiB, the machine wants {-(-root_bytes // GIB)}")
    if int(flavor.get("OS-FLV-EXT-DATA:ephemeral") or 0) or int(flavor.get("swap") or 0):
        wrong.append("an ephemeral or swap disk, which would take the place of the state disk /dev/vdb")
    return wrong


def find_flavor(api: Api, name: str) -> dict[str, Any]:
    """The flavor by name or id. PermanentError if there is none."""
    listed = api.list("compute", "/flavors/detail", "flavors", f"look up the flavor {name}", limit="500")
    found = next((f for f in listed if name in (f.get("name"), f.get("id"))), None)
    if found is None:
        known = ", ".join(sorted(str(f.get("name")) for f in listed)) or "none"
        raise PermanentError(
            f"{api.name} has no flavor {name!r}; it has {known}", next_command="correct flavor in the spec"
        )
    return found


class Preflight:
    """One look at one cloud."""

    def __init__(
        self,
        api: Api,
        place: OpenStackPlace,
        network: Network,
        servers: Servers,
        images: Images,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds since the epoch."""
        self._api, self._place, self._network, self._servers, self._clock = api, place, network, servers, clock
        self._single = False  # whether state will be on the machine's own disk
        self._images_of = images

    def run(self, demand: Demand, *, probe: bool = False) -> list[Finding]:
        """All findings; those that need no connection or no catalogue first."""
        found: list[Finding] = []
        try:
            self._look(found, demand, probe=probe)
        except LockedOutError as error:  # it would be said of everything
            found.append(Finding("credentials", "fail", error.fact, error.next_command))
        return found

    def _look(self, found: list[Finding], demand: Demand, *, probe: bool) -> None:
        """Adds to `found` as it goes."""
        found.append(self._credentials())
        if found[0].verdict == "fail":
            return
        found += [*self._services(), *_guarded("state", lambda: self._state(demand))]
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("clock", self._clock_skew),
            ("certificate", self._certificates),
            ("compute version", self._version),
            ("flavor", lambda: self._flavor(demand)),
            ("zone", self._zone),
            ("network", self._net),
            ("boot", lambda: self._boot(demand)),
            ("signature", self._signature),
            ("quota of compute", lambda: self._compute_quota(demand)),
            ("quota of network", lambda: self._network_quota(demand)),
        ]
        if not self._single:
            checks += [("volume type", self._volume_type), ("quota of volumes", lambda: self._volume_quota(demand))]
        if probe:
            checks.append(("allowed calls", self._probe))
        for name, check in checks:
            found += _guarded(name, check)

    def _credentials(self) -> Finding:
        def look() -> list[Finding]:
            access = self._api.access()
            roles = sorted(access.role_names)
            text = f"project {access.project_name or access.project_id}, roles {', '.join(roles) or 'none'}"
            if not _USEFUL_ROLES & set(roles):
                fix = f"give the user the role member in the project, in {self._api.name}"
                return [Finding("credentials", "warn", f"{text}: none that may usually create servers", fix)]
            return [Finding("credentials", "ok", text)]

        return _guarded("credentials", look)[0]

    def _services(self) -> list[Finding]:
        found = []
        for service in SERVICES:

            def look(service: str = service) -> list[Finding]:
                needed = service != "volume" or self._place.state == VOLUME
                url = None if service == "volume" and self._place.state == INSTANCE else self._api.endpoint(service)
                if url is None and not needed:
                    return []  # `_state` says what is used instead
                if url is None:
                    fix = f"openstack --os-cloud {self._api.cloud} catalog list; the driver needs {service}"
                    return [Finding(f"service {service}", "fail", "not in the catalogue of this region", fix)]
                return [Finding(f"service {service}", "ok", url)]

            found += _guarded(f"service {service}", look)
        return found

    def _state(self, demand: Demand) -> list[Finding]:
        """Where state goes, and what is missing for it."""
        if self._place.state != INSTANCE and (url := self._api.endpoint("volume")) is not None:
            return [Finding("state", "ok", f"on Cinder volumes: {url}")]
        if self._place.state == VOLUME:
            return []  # the service is missing, which has been said
        self._single = True
        why = "the spec says so" if self._place.state == INSTANCE else "the catalogue has no volume service"
        text = f"on the machine's own disk, snapshots are server images: {why}"
        found = [Finding("state", "ok", text)]
        fix = "cloudfit image build"
        if demand.command_line and STATE_ARGUMENT not in demand.command_line.split():
            old = f"the image knows no state behind its root: {STATE_ARGUMENT} is not in its command line"
            found.append(Finding("state", "fail", old, f"{fix} replica"))
        if not demand.recovery_command_line:
            found.append(Finding("state", "warn", "no image recovery here yet, to read it with", f"{fix} recovery"))
        elif STATE_ARGUMENT not in demand.recovery_command_line.split():
            old = f"the image recovery cannot read it: {STATE_ARGUMENT} is not in its command line"
            found.append(Finding("state", "fail", old, f"{fix} recovery"))
        if demand.root_bytes > STATE_OFFSET_MIB << 20:
            large = f"the root has {demand.root_bytes >> 20} MiB, the state begins at {STATE_OFFSET_MIB} MiB"
            found.append(Finding("state", "fail", large, "build a smaller image, or use a cloud with Cinder"))
        if self._place.volume_type:
            found.append(Finding("state", "warn", "volume_type is not used", "leave it out of the spec"))
        return found

    def _keystone(self) -> str:
        with self._api.connection() as connection:
            return str(connection.config.get_auth_args().get("auth_url", ""))

    def _used(self) -> list[str]:
        return [s for s in SERVICES if s != "volume" or not self._single]

    def _clock_skew(self) -> list[Finding]:
        stamp = None
        with self._api.connection() as connection:
            for url in (self._keystone(), *filter(None, map(self._api.endpoint, self._used()))):
                answer = connection.session.get(url, authenticated=False, raise_exc=False, timeout=TLS_TIMEOUT_S)
                stamp = stamp or answer.headers.get("Date")
        if not stamp:
            return [Finding("clock", "warn", "no service tells the time")]
        skew = email.utils.parsedate_to_datetime(stamp).timestamp() - self._clock()
        verdict = "fail" if abs(skew) > MAX_SKEW_S else "warn" if abs(skew) > WARN_SKEW_S else "ok"
        fix = "" if verdict == "ok" else "set the clock: timedatectl set-ntp true"
        return [Finding("clock", verdict, f"the cloud is {skew:+.0f} s from this host", fix)]

    def _certificates(self) -> list[Finding]:
        urls = {self._keystone(), *(u for u in map(self._api.endpoint, self._used()) if u)}
        plain = sorted(u for u in urls if urlsplit(u).scheme != "https")
        found = []
        if plain:
            fix = "use https endpoints anywhere but on one machine"
            found.append(Finding("certificate", "warn", f"no TLS at {', '.join(plain)}: the password is in clear", fix))
        with self._api.connection() as connection:
            verify, _ = connection.config.get_requests_verify_args()
        if verify is False and urls - set(plain):
            fix = "set cacert in clouds.yaml instead of verify: false"
            return [*found, Finding("certificate", "warn", "clouds.yaml says that no certificate is checked", fix)]
        for host, port in sorted({(urlsplit(u).hostname or "", urlsplit(u).port or 443) for u in urls - set(plain)}):
            found += _guarded(
                f"certificate {host}:{port}",
                lambda h=host, p=port: [self._certificate(h, p, verify)],  # type: ignore[misc]
            )
        return found

    def _certificate(self, host: str, port: int, verify: object) -> Finding:
        name = f"certificate {host}:{port}"
        context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
        try:
            with (
                socket.create_connection((host, port), TLS_TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as secure,
            ):
                ends = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
        except ssl.SSLCertVerificationError as error:
            return Finding(name, "fail", error.verify_message, "set cacert in clouds.yaml, or renew the certificate")
        except OSError as error:
            return Finding(name, "fail", f"no connection: {error}", "check the network and clouds.yaml")
        days = (ends - self._clock()) / 86400
        when = dt.datetime.fromtimestamp(ends, dt.UTC).date().isoformat()
        if days < WARN_CERTIFICATE_DAYS:
            return Finding(name, "warn", f"ends on {when}, in {days:.0f} days", "renew it")
        return Finding(name, "ok", f"good until {when}")

    def _version(self) -> list[Finding]:
        document = self._api.get("compute", "/", "ask Nova for its version") or {}
        newest = str((document.get("version") or {}).get("version") or "0.0")
        wanted = tuple(int(x) for x in COMPUTE_VERSION.split("."))
        if tuple(int(x) for x in newest.split(".")) < wanted:
            fix = "OpenStack Rocky (2018) or newer is needed"
            return [Finding("compute version", "fail", f"{newest}, {COMPUTE_VERSION} is needed", fix)]
        return [Finding("compute version", "ok", newest)]

    def _flavor(self, demand: Demand) -> list[Finding]:
        flavor = find_flavor(self._api, self._place.flavor)
        disk = single_disk_mib(demand.state_mib) << 20 if self._single else demand.root_bytes
        wrong = flavor_faults(flavor, demand.memory_mib, demand.cpus, disk)
        text = f"{flavor['name']}: {flavor['ram']} MiB, {flavor['vcpus']} CPUs, {flavor['disk']} GiB"
        found = [Finding("flavor", "fail", w, "name another flavor in the spec") for w in wrong]
        if not int(flavor.get("disk") or 0):
            fix = "name a flavor with a disk: by default only administrators may boot images without one"
            found.append(Finding("flavor", "warn", f"{text}: no disk", fix))
        return found or [Finding("flavor", "ok", text)]

    def _zone(self) -> list[Finding]:
        if not self._place.availability_zone:
            return [Finding("zone", "ok", "as the cloud likes")]
        tried = "list availability zones"
        zones = self._api.list("compute", "/os-availability-zone", "availabilityZoneInfo", tried)
        up = [str(z.get("zoneName")) for z in zones if (z.get("zoneState") or {}).get("available")]
        if self._place.availability_zone not in up:
            text = f"no zone {self._place.availability_zone!r} that is up; there are {', '.join(up) or 'none'}"
            return [Finding("zone", "fail", text, "correct availability_zone in the spec")]
        return [Finding("zone", "ok", self._place.availability_zone)]

    def _net(self) -> list[Finding]:
        network, subnet = self._network.require(), self._network.subnet()
        lease = "with DHCP" if subnet.get("enable_dhcp") else "without DHCP"
        text = f"{network['name']}: {subnet['cidr']}, gateway {subnet['gateway_ip']}, {lease} (not needed)"
        found = [Finding("network", "ok", text)]
        if network.get("port_security_enabled") is False:
            fix = f"openstack network set --enable-port-security {self._place.network}"
            found.append(Finding("network", "fail", "port security is off: nothing keeps others out", fix))
        listed = self._api.list("network", "/extensions", "extensions", "list Neutron's extensions")
        missing = sorted(set(EXTENSIONS) - {str(e.get("alias")) for e in listed})
        if missing:
            fix = "ask the operator of the cloud to load them"
            found.append(Finding("network", "fail", f"Neutron lacks {', '.join(missing)}", fix))
        return found

    def _boot(self, demand: Demand) -> list[Finding]:
        """Whether the images boot as the spec says; if not, whether they would the other way."""
        schema = self._api.get("image", "/schemas/image", "ask Glance for its formats") or {}
        allowed = ((schema.get("properties") or {}).get("disk_format") or {}).get("enum") or []

        def lacking(formats: tuple[str, ...]) -> list[tuple[str, str]]:
            missing = [f for f in formats if allowed and f not in allowed]
            fix = f"disk_formats in glance-api.conf must have {', '.join(formats)}"
            return [(f"Glance does not take {', '.join(missing)}", fix)] if missing else []

        kernel, uefi = lacking(FORMATS), lacking(UEFI_FORMATS)
        if len(demand.command_line) > MAX_COMMAND_LINE:
            text = f"the kernel's command line has {len(demand.command_line)} characters, Nova keeps {MAX_COMMAND_LINE}"
            kernel.append((text, "shorten command_line in the image's recipe"))
        if demand.no_disk:
            text = f"images without a disk that UEFI boots: {', '.join(demand.no_disk)}"
            uefi.append((text, f"cloudfit image build {' '.join(demand.no_disk)}"))
        if self._single:
            uefi.append(("with state on the machine's own disk there is no disk that UEFI boots", "state: volume"))
        asked, other = (uefi, kernel) if self._place.boot == "uefi" else (kernel, uefi)
        instead = "" if other else f", or boot: {'kernel' if self._place.boot == 'uefi' else 'uefi'} in the spec"
        if asked:
            return [Finding("boot", "fail", text, fix + instead) for text, fix in asked]
        if self._place.boot == "uefi":
            text = "by UEFI; that the hosts have OVMF for q35 shows with the first server" + instead
            return [Finding("boot", "ok", text)]
        return [Finding("boot", "ok", f"by kernel_id, ramdisk_id and os_command_line{instead}")]

    def _signature(self) -> list[Finding]:
        if not self._place.certificate:
            return [Finding("signature", "ok", "images are not signed for the cloud")]
        self._images_of.check_key()
        return [Finding("signature", "ok", f"by {self._place.signing_key}, certificate {self._place.certificate}")]

    def _volume_type(self) -> list[Finding]:
        if not self._place.volume_type:
            return [Finding("volume type", "ok", "the cloud's default")]
        listed = self._api.list("volume", "/types", "volume_types", "list volume types")
        names = sorted(str(t.get("name")) for t in listed)
        if self._place.volume_type not in names:
            text = f"no volume type {self._place.volume_type!r}; there are {', '.join(names) or 'none'}"
            return [Finding("volume type", "fail", text, "correct volume_type in the spec")]
        return [Finding("volume type", "ok", self._place.volume_type)]

    def _limits(self, service: str) -> dict[str, Any]:
        document = self._api.get(service, "/limits", f"ask for the limits of {service}") or {}
        return dict((document.get("limits") or {}).get("absolute") or {})

    def _compute_quota(self, demand: Demand) -> list[Finding]:
        limits = self._limits("compute")
        try:
            flavor = find_flavor(self._api, self._place.flavor)
        except PermanentError:
            flavor = {"ram": demand.memory_mib, "vcpus": demand.cpus}  # another check says it
        rows = (
            ("instances", "maxTotalInstances", "totalInstancesUsed", 1),
            ("cores", "maxTotalCores", "totalCoresUsed", int(flavor["vcpus"])),
            ("MiB of memory", "maxTotalRAMSize", "totalRAMUsed", int(flavor["ram"])),
        )
        found = [self._room("compute", what, limits, names, each * demand.machines, each * DURING_RECOVERY)
                 for what, *names, each in rows]  # fmt: skip
        return [*found, self._room("compute", "server groups", limits, ["maxServerGroups", "totalServerGroupsUsed"], 1)]

    def _volume_quota(self, demand: Demand) -> list[Finding]:
        limits, each = self._limits("volume"), gib(demand.state_mib)
        rows = (
            ("volumes", "maxTotalVolumes", "totalVolumesUsed", 1, DURING_RECOVERY),
            ("GiB", "maxTotalVolumeGigabytes", "totalGigabytesUsed", each, each * (DURING_RECOVERY + 1)),
        )
        found = [self._room("volumes", what, limits, names, each * demand.machines, more)
                 for what, *names, each, more in rows]  # fmt: skip
        names = ["maxTotalSnapshots", "totalSnapshotsUsed"]
        return [*found, self._room("volumes", "snapshots", limits, names, 0, 1)]

    def _network_quota(self, demand: Demand) -> list[Finding]:
        path = f"/quotas/{self._api.project()}/details"
        document = self._api.get("network", path, "ask for the quota of Neutron") or {}
        quota = document.get("quota") or {}
        wanted = {"port": (demand.machines, DURING_RECOVERY), "security_group": (1, 0)}
        found = []
        for what, (now, more) in wanted.items():
            q = quota.get(what) or {}
            limits = {"max": q.get("limit", -1), "used": int(q.get("used") or 0) + int(q.get("reserved") or 0)}
            found.append(self._room("network", f"{what}s", limits, ["max", "used"], now, more))
        return found

    def _room(
        self, of: str, what: str, limits: Mapping[str, Any], names: list[str], needed: int, during_recovery: int = 0
    ) -> Finding:
        name, (most, used) = f"quota of {of}", (int(limits.get(n) or 0) for n in names)
        if names[0] not in limits or most < 0:
            return Finding(name, "ok", f"{what}: no limit")
        text = f"{what}: {used} of {most} used, {needed} needed"
        fix = f"openstack --os-cloud {self._api.cloud} quota show; ask the operator of the cloud for more"
        if used + needed > most:
            return Finding(name, "fail", text, fix)
        if used + needed + during_recovery > most:
            return Finding(name, "warn", f"{text}, and {during_recovery} more during a recovery", fix)
        return Finding(name, "ok", text)

    def _probe(self) -> list[Finding]:
        """What we may do shows only when we do it. Everything carries a deployment of its own, and is removed."""
        deployment, group = f"preflight-{uuid.uuid4().hex[:8]}", "probe"
        found = []
        try:
            self._network.reserve(Reservation(deployment, group, "r0", Role.REPLICA, "probe"))
            self._servers.ensure_group(deployment, group)
            found.append(Finding("allowed calls", "ok", "security groups, ports with an address, server groups"))
        except PermanentError as error:
            found.append(Finding("allowed calls", "fail", error.fact, error.next_command))
        finally:
            for port, _ in self._network.of_deployment(deployment):
                self._network.remove_port(port)
            for made in self._network.groups(deployment):
                self._network.remove_group(made)
            for made in self._servers.groups(deployment):
                self._servers.remove_group(made)
        return found


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except LockedOutError:
        raise
    except CloudfitError as error:
        return [Finding(name, "fail", error.fact, error.next_command)]
