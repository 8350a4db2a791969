"""What the lab consists of and where it lies: one directory, one range of ports, one network a cloud."""

import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOME = Path("/var/lib/cloudfit-lab")
BASE_PORT = 15000
PORTS_A_CLOUD = 100
# Clouds that can be brought up, in the order of their ports and networks; with Nova's compute driver. A fake one
# starts no machines: it is for numbers of servers that no test machine could run.
KNOWN_CLOUDS = {"lisbon": "libvirt", "passau": "libvirt", "scale": "fake"}
DEFAULT_CLOUDS = ("lisbon", "passau")
NETWORK = "replicas"
OPERATOR = "operator"  # the account that tests work in: its own project of the same name
NEIGHBOUR = "neighbour"  # another tenant, whose things must be left alone


@dataclass(frozen=True, slots=True)
class Host:
    """A compute host: a libvirtd and a nova-compute of its own, on this machine like all others."""

    cloud: "Cloud"
    letter: str

    @property
    def name(self) -> str:
        """As Nova knows it."""
        return f"host-{self.cloud.name}{self._suffix}"

    @property
    def process(self) -> str:
        """What the names of its processes begin with."""
        return f"{self.cloud.name}{self._suffix}"

    @property
    def home(self) -> Path:
        """What its libvirtd has."""
        return self.cloud.home / f"libvirt{self._suffix}"

    @property
    def libvirt_socket(self) -> Path:
        """Where its libvirtd listens."""
        return self.home / "run/libvirt-sock"

    @property
    def libvirt_uri(self) -> str:
        """How libvirt clients on this machine reach that libvirtd; empty where there is none."""
        return f"qemu+unix:///system?socket={self.libvirt_socket}" if self.cloud.real else ""

    @property
    def _suffix(self) -> str:
        return f"-{self.letter}" if self.letter else ""


@dataclass(frozen=True, slots=True)
class Cloud:
    """One cloud's place in the lab."""

    name: str
    index: int
    driver: str  # libvirt or fake
    lab: Path

    @property
    def home(self) -> Path:
        """Everything of this cloud but its databases."""
        return self.lab / "clouds" / self.name

    @property
    def etc(self) -> Path:
        """Its configuration files."""
        return self.home / "etc"

    @property
    def keys(self) -> Path:
        """What its key manager holds."""
        return self.home / "keys"

    @property
    def instances(self) -> Path:
        """Where its compute hosts have the disks of servers."""
        return self.home / "instances"

    @property
    def real(self) -> bool:
        """Whether its servers are real machines."""
        return self.driver == "libvirt"

    def port(self, service: str) -> int:
        """The TCP port of a service, on 127.0.0.1."""
        offsets = {"keystone": 0, "glance": 2, "placement": 3, "nova": 4, "neutron": 6, "cinder": 8}
        return BASE_PORT + PORTS_A_CLOUD * self.index + offsets[service]

    def url(self, service: str) -> str:
        """The root of a service."""
        return f"http://127.0.0.1:{self.port(service)}"

    @property
    def auth_url(self) -> str:
        """Keystone's, as clients name it."""
        return self.url("keystone") + "/v3"

    @property
    def region(self) -> str:
        """The only region."""
        return f"region-{self.name}"

    @property
    def availability_zone(self) -> str:
        """The zone that its hosts are in."""
        return f"{self.name}-1"

    @property
    def host(self) -> Host:
        """The compute host that its servers run on."""
        return Host(self, "")

    @property
    def spare(self) -> Host:
        """Another one, up only for who wants to move servers. Its servers have no network: Neutron is not on it."""
        return Host(self, "b")

    @property
    def subnet(self) -> str:
        """The flat network `replicas`; the host has its first address."""
        return f"10.77.{self.index}.0/24" if self.real else f"10.78.{16 * self.index}.0/20"

    @property
    def host_address(self) -> str:
        """The host in that network, its gateway."""
        return str(ipaddress.IPv4Network(self.subnet)[1])

    @property
    def host_link(self) -> str:
        """The host's end of the wire into the flat network."""
        return f"lab-{self.name}"

    @property
    def cloud_link(self) -> str:
        """The other end, which Neutron puts into its bridge. With a suffix within the 15 bytes of an interface name."""
        return f"{self.host_link}-p"

    @property
    def chain_prefix(self) -> str:
        """Of the iptables chains of its Neutron agent, which names them after its own program."""
        return f"lb-{self.name}"

    @property
    def databases(self) -> dict[str, str]:
        """Schema -> name of the database."""
        schemas = ("keystone", "glance", "placement", "nova_api", "nova_cell0", "nova", "neutron", "cinder")
        return {schema: f"{schema}_{self.name}" for schema in schemas}


@dataclass(frozen=True, slots=True)
class Lab:
    """The lab below one directory."""

    home: Path

    def cloud(self, name: str) -> Cloud:
        """A known cloud. Raises KeyError."""
        return Cloud(name, list(KNOWN_CLOUDS).index(name), KNOWN_CLOUDS[name], self.home)

    def clouds(self) -> list[Cloud]:
        """All that can be brought up."""
        return [self.cloud(name) for name in KNOWN_CLOUDS]

    @property
    def log(self) -> Path:
        """Log files of everything."""
        return self.home / "log"

    @property
    def run(self) -> Path:
        """What runs, one record a service."""
        return self.home / "run"

    @property
    def etc(self) -> Path:
        """Configuration that the clouds share."""
        return self.home / "etc"

    @property
    def bin(self) -> Path:
        """Programs that stand before the system's in the PATH of the lab's services."""
        return self.home / "bin"

    @property
    def clouds_yaml(self) -> Path:
        """Credentials, as openstacksdk reads them."""
        return self.home / "clouds.yaml"

    @property
    def spec(self) -> Path:
        """A spec of a group on its real clouds, to begin with."""
        return self.home / "ledger.yaml"

    @property
    def state(self) -> Path:
        """What tests need to know, as JSON; see `state`."""
        return self.home / "state.json"

    @property
    def database_port(self) -> int:
        """MariaDB."""
        return BASE_PORT - 1

    @property
    def message_port(self) -> int:
        """RabbitMQ."""
        return BASE_PORT - 2

    @property
    def erlang_port(self) -> int:
        """RabbitMQ's between nodes."""
        return BASE_PORT - 3

    @property
    def epmd_port(self) -> int:
        """Erlang's port mapper."""
        return BASE_PORT - 4

    @property
    def password(self) -> str:
        """The one password of all accounts, made at first use. Everything listens on 127.0.0.1 only."""
        path = self.home / "password"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(16))
        return path.read_text()
