"""A replica group as its owner wants it, checked and placed. `controller/spec.py` makes it from YAML."""

from dataclasses import dataclass, field
from enum import StrEnum

from cloudfit_orchestrator.model.record import Algorithm, Parameters


class Trust(StrEnum):
    """Whom the group trusts beside the controller. HYPERVISOR: the agent of each host. NONE: nobody, keys in guests."""

    HYPERVISOR = "hypervisor"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class OpenStackPlace:
    """Where in an OpenStack machines go, by names that its operator gave. Nothing secret: that is in clouds.yaml."""

    cloud: str  # in clouds.yaml
    flavor: str
    network: str  # an existing one, routed to the group's other networks
    region: str = ""  # empty: as clouds.yaml says
    availability_zone: str = ""
    volume_type: str = ""  # empty: the cloud's default
    state: str = ""  # volume | instance (the machine's own disk); empty: a volume where there is Cinder
    clients: tuple[str, ...] = ()  # CIDRs from which clients come; this host is always let in
    hypervisor: str = "qemu:///system"  # libvirt URI of the compute host, as its agent names it
    boot: str = "kernel"  # kernel: kernel_id, ramdisk_id, os_command_line; uefi: a disk of the same root
    hidden: bool = False  # our images are not in Glance's default listings
    protected: bool = False  # nobody deletes them but we, who take the protection off first
    certificate: str = (
        ""  # UUID, in the cloud's key manager, of the certificate that images are signed for; or unsigned
    )
    signing_key: str = ""  # its key: a name under the home's keys


@dataclass(frozen=True, slots=True)
class CloudSpec:
    """One cloud of the group. `driver`: libvirt | process | openstack."""

    name: str
    driver: str
    uri: str = ""  # of libvirt; for openstack openstack+ssh://user@host where the agent's host is another one
    network: str = ""  # CIDR for this deployment's network in that cloud; empty: a free one is chosen
    agent_socket: str = ""  # of a running agent on that host; empty: the controller runs one itself (local clouds only)
    openstack: OpenStackPlace | None = None
    agent_key: str = ""  # the agent's enrolled public key, raw Ed25519 in base64; empty: whichever it says is its own
    reserve: bool = False  # holds no replica until it takes over those of a cloud that is lost
    trust: Trust = Trust.HYPERVISOR  # of the whole group

    @property
    def local(self) -> bool:
        """The machines run on this computer, so the controller can run the agent."""
        return self.driver == "process" or "+ssh://" not in self.uri


@dataclass(frozen=True, slots=True)
class Recovery:
    """When and how replicas are renewed."""

    every_s: int | None = None  # no calendar if None
    lease_s: int = 30 * 86400
    on_suspicion: bool = False
    keep_evidence: int = 3  # snapshots of old incarnations kept per group


@dataclass(frozen=True, slots=True)
class Sizes:
    """What each replica's machine gets."""

    memory_mib: int = 384
    cpus: int = 1
    state_mib: int = 256


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group: n replicas `r0` … `r(n-1)`, each on a cloud; at most f of them may be compromised or gone at a time."""

    group: str
    service: str
    f: int
    k: int
    algorithm: Algorithm
    clouds: tuple[CloudSpec, ...]
    placement: tuple[tuple[str, str], ...]  # (replica, cloud), in the order of replicas
    image: str  # a name in the image store, or name@sha256:…
    allow_adversary: bool = False
    adversary: tuple[str, ...] = ()  # replicas that boot the image `adversary`: tests and the demo only
    recovery: Recovery = field(default_factory=Recovery)
    protect: bool = False
    sizes: Sizes = field(default_factory=Sizes)
    parameters: Parameters = field(default_factory=Parameters)
    not_tolerated: tuple[str, ...] = ()  # what the owner's own choices give up, in words

    @property
    def n(self) -> int:
        """Number of replicas."""
        return len(self.placement)

    @property
    def trust(self) -> Trust:
        """The same for all clouds of the group."""
        return self.clouds[0].trust

    @property
    def serving(self) -> tuple[str, ...]:
        """Names of the clouds that replicas are placed on: all but reserves."""
        return tuple(c.name for c in self.clouds if not c.reserve)

    def cloud_of(self, replica: str) -> CloudSpec:
        """The cloud that `replica` runs on. KeyError if there is no such replica."""
        name = dict(self.placement)[replica]
        return next(c for c in self.clouds if c.name == name)

    def replicas_on(self, cloud: str) -> tuple[str, ...]:
        """The replicas on that cloud, in order."""
        return tuple(r for r, c in self.placement if c == cloud)
