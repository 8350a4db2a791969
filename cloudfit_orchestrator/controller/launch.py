"""One measured machine: planned in the journal, created by its cloud, measured and admitted by its agent.

Nothing here is skipped on a second run: create finds what is there, admit measures again, and what comes back replaces
what the journal holds. So a machine or an agent that died in between is simply made anew under the same names.
"""

import base64
import ipaddress
import socket
from dataclasses import dataclass, replace
from typing import Any

from cloudfit_orchestrator.clouds.base import DiskSnapshot, Machine, MachineSpec, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.controller.agents import GuestRef
from cloudfit_orchestrator.controller.journal import FIRST_HOST, MAX_HOSTS, MachineRow, MachineStage, Operation
from cloudfit_orchestrator.controller.parallel import each
from cloudfit_orchestrator.controller.ports import (
    NETWORK_POOL,
    REPLICA_PORT,
    Agent,
    Context,
    Image,
    Progress,
)
from cloudfit_orchestrator.controller.secrets import CONTROL_OFFSET
from cloudfit_orchestrator.model.drive import Drive
from cloudfit_orchestrator.model.envelope import key_id
from cloudfit_orchestrator.model.errors import BadError, LockedOutError, PermanentError, UnknownError
from cloudfit_orchestrator.model.image import LaunchCertificate, Role, open_launch
from cloudfit_orchestrator.model.signing import sha256
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, Trust

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launched:
    """An admitted machine."""

    row: MachineRow
    machine: Machine
    certificate: LaunchCertificate
    launch: bytes  # the certificate's envelope

    @property
    def channel_ca(self) -> bytes:
        """DER of the incarnation's channel CA."""
        return base64.b64decode(self.certificate.channel_ca, validate=True)

    @property
    def launch_digest(self) -> str:
        """What the configuration record names."""
        return "sha256:" + sha256(self.launch).hex()

    def as_peer(self) -> dict[str, str]:
        """As COMMANDs name a peer."""
        return {
            "peer_id": self.row.peer_id,
            "address": self.row.address,
            "channel_ca": self.certificate.channel_ca,
        }


def network_name(context: Context, cloud: str) -> str:
    """The network of this deployment in that cloud."""
    return f"{context.journal.deployment}-{cloud}"


def network_spec(context: Context, cloud: CloudSpec, address: str = "") -> NetworkSpec:
    """The deployment's network in `cloud`, planned on first use; `address` is the machine's."""
    name = network_name(context, cloud.name)
    if cloud.driver == "process":
        return NetworkSpec(name, address or LOOPBACK, 8, LOOPBACK)
    given = context.sites.cloud(cloud).given_network(name)
    if given is not None:
        cidr = str(ipaddress.IPv4Network(f"{given.address}/{given.prefix}"))
        context.journal.plan_network(cloud.name, cidr, NETWORK_POOL, [])
        return replace(given, address=address or given.address)
    taken = context.sites.taken_networks(cloud) if cloud.name not in context.journal.networks() else []
    network = ipaddress.IPv4Network(context.journal.plan_network(cloud.name, cloud.network, NETWORK_POOL, taken))
    gateway, first = (str(network.network_address + i) for i in (1, FIRST_HOST))
    return NetworkSpec(name, address or first, network.prefixlen, gateway)


def ensure_network(context: Context, cloud: CloudSpec) -> None:
    """Make the deployment's network there."""
    context.check_cancelled()
    context.sites.cloud(cloud).ensure_network(context.journal.deployment, network_spec(context, cloud))


def ownership(context: Context, row: MachineRow) -> Ownership:
    """The complete tag set of a planned machine."""
    return Ownership(context.journal.deployment, row.group, row.replica, row.incarnation, Role(row.role), row.operation)


def launch(
    context: Context,
    operation: Operation,
    spec: GroupSpec,
    *,
    replica: str,
    image: Image,
    agent: Agent,
    attach: DiskSnapshot | None = None,
) -> Launched:
    """Bring one machine up to admitted. Raises CloudfitError; running it again goes on."""
    cloud, role = spec.cloud_of(replica), image.manifest.role
    row = _plan(context, operation, cloud, replica, role)
    network = network_spec(context, cloud, row.host)
    where = {"address": row.host, "prefix": network.prefix, "gateway": network.gateway}
    keys = [base64.b64encode(key).decode() for key in context.trusted]
    options = {"service": spec.service, "controller_keys": keys}
    welcome = {"network": where, "port": row.port, "options": options}
    drive = _drive(context, spec, row, image, welcome) if spec.trust is Trust.NONE else None
    machine = _create(context, operation, spec, row=row, image=image, attach=attach, drive=drive)
    if drive is not None:  # its agent is behind the cloud's doors
        _open_doors(context, spec, cloud)
    context.check_cancelled()
    launch_envelope = agent.admit(
        GuestRef(spec.group, replica, row.incarnation),
        role=role,
        machine=dict(machine.reference),
        manifest=image.envelope,
        image_dir=image.directory,
        allow_adversary=spec.allow_adversary,
        lease_s=spec.recovery.lease_s,
        welcome=welcome,
    )
    certificate = _check_launch(agent, cloud, row, image, launch_envelope)
    context.journal.machine_admitted(row, base64.b64encode(launch_envelope).decode())
    seen = "is measured and admitted" if certificate.measured else "has its drive, nobody measured it,"
    say = f"{row.peer_id} {seen} on {cloud.name}"
    context.report(Progress(operation.kind, "admit", f"{spec.group}/{row.peer_id}", say))
    return Launched(
        replace(row, machine_id=machine.id, stage=MachineStage.CREATED), machine, certificate, launch_envelope
    )


def _plan(context: Context, operation: Operation, cloud: CloudSpec, replica: str, role: Role) -> MachineRow:
    """The planned machine. Where the cloud chooses addresses, it is asked before the plan is written."""
    rows = context.journal.machines(operation.group, gone=True)
    wanted = (operation.id, replica, role.value)
    planned = next((m for m in rows if (m.operation, m.replica, m.role) == wanted), None)
    host = None
    if planned is None or planned.stage is MachineStage.PLANNED:
        context.check_cancelled()
        deployment, driver = context.journal.deployment, context.sites.cloud(cloud)
        host = driver.reserve_address(deployment, operation.group, replica, role, operation.id)
    place = (lambda _: (host, REPLICA_PORT)) if host else _placer(context, cloud)
    row = context.journal.plan_machine(operation, replica, role.value, cloud.name, place)
    if host and host != row.host:  # an attempt that failed gave the address back, and nobody has heard of it yet
        context.journal.move_machine(row, host)
    return replace(row, host=host or row.host)


def let_in(context: Context, spec: GroupSpec) -> None:
    """Every cloud of the group lets in the group's machines, wherever they are, and clients; nobody else.

    Called when machines have come or gone. A cloud that cannot be told now has the doors that it had.
    """
    rows = context.journal.machines(spec.group)
    used = [c for c in spec.clouds if any(m.cloud == c.name for m in rows)]

    def tell(cloud: CloudSpec) -> None:
        try:
            _open_doors(context, spec, cloud)
        except (UnknownError, LockedOutError) as error:
            context.report(Progress("network", "admit", f"{spec.group}/{cloud.name}", error.fact))

    each(context, used, tell)


def _open_doors(context: Context, spec: GroupSpec, cloud: CloudSpec) -> None:
    hosts = sorted({m.host for m in context.journal.machines(spec.group)})
    control = REPLICA_PORT + CONTROL_OFFSET if spec.trust is Trust.NONE else None
    context.sites.cloud(cloud).admit(context.journal.deployment, spec.group, hosts, REPLICA_PORT, control)


def _drive(context: Context, spec: GroupSpec, row: MachineRow, image: Image, welcome: dict[str, Any]) -> bytes:
    """The content of the machine's config drive, the same in every run."""
    assert context.secrets is not None
    return Drive(
        group=row.group,
        replica=row.replica,
        incarnation=row.incarnation,
        role=Role(row.role),
        image=image.digest,
        seed=context.secrets.seed(row),
        controller=context.secrets.certificate,
        controller_keys=tuple(context.trusted),
        control_port=row.port + CONTROL_OFFSET,
        lease_s=spec.recovery.lease_s,
        welcome=welcome,
    ).encode()


def _create(
    context: Context,
    operation: Operation,
    spec: GroupSpec,
    *,
    row: MachineRow,
    image: Image,
    attach: DiskSnapshot | None,
    drive: bytes | None,
) -> Machine:
    context.check_cancelled()
    cloud = spec.cloud_of(row.replica)
    say = f"{row.role} {row.peer_id} on {cloud.name} at {row.address}"
    context.report(Progress(operation.kind, "create", f"{spec.group}/{row.peer_id}", say))
    machine = context.sites.cloud(cloud).create(
        MachineSpec(
            owner=ownership(context, row),
            image_dir=image.directory,
            manifest=image.manifest,
            memory_mib=spec.sizes.memory_mib,
            cpus=spec.sizes.cpus,
            network=network_spec(context, cloud, row.host),
            state_disk=None if attach else StateDisk(spec.sizes.state_mib),
            attach=attach,
            drive=drive,
        )
    )
    context.journal.machine_created(row, machine.id)
    return machine


def unmake(context: Context, cloud: CloudSpec, row: MachineRow) -> None:
    """Remove the machine; of one that is gone behind our back, what it left: disk and address."""
    driver, deployment, owner = context.sites.cloud(cloud), context.journal.deployment, ownership(context, row)
    machine = driver.find(owner)
    if machine is not None:
        driver.destroy(machine)
        return
    left = driver.orphans(deployment, [], evidence=[owner])
    driver.sweep(deployment, [o for o in left if o.owner is not None and o.owner.identity == owner.identity])


def _check_launch(agent: Agent, cloud: CloudSpec, row: MachineRow, image: Image, envelope: bytes) -> LaunchCertificate:
    """The certificate must be this agent's, of this incarnation, over this image: else the record would lie."""
    enrolled = base64.b64decode(cloud.agent_key, validate=True)
    key = enrolled or agent.key_of(GuestRef(row.group, row.replica, row.incarnation))
    certificate = open_launch(envelope, [key])
    expected = (row.group, row.replica, row.incarnation, row.role, image.digest, key_id(key))
    got = (certificate.group, certificate.replica, certificate.incarnation, certificate.role.value)
    if (*got, certificate.image, certificate.agent) != expected:
        raise BadError(
            f"launch certificate of {row.group}/{row.peer_id} is about {got} with image {certificate.image}, "
            f"expected image {image.digest}",
            next_command=f"cloudfit group destroy {row.group}",
        )
    return certificate


class _placer:  # noqa: N801  a function with the cloud bound to it
    def __init__(self, context: Context, cloud: CloudSpec) -> None:
        self._process = cloud.driver == "process"
        spec = network_spec(context, cloud)
        self._network = ipaddress.IPv4Network(f"{spec.address}/{spec.prefix}", strict=False)

    def __call__(self, taken: set[str]) -> tuple[str, int]:
        if self._process:
            return LOOPBACK, _free_port(taken)
        for number in range(FIRST_HOST, min(MAX_HOSTS, self._network.num_addresses - 2) + 1):
            host = str(self._network.network_address + number)
            if f"{host}:{REPLICA_PORT}" not in taken:
                return host, REPLICA_PORT
        raise PermanentError(f"no address of {self._network} is free", next_command="cloudfit group list")


def _free_port(taken: set[str]) -> int:
    """A port that is free, and with it the next one, where a guest's own agent would listen."""
    for _ in range(100):
        with socket.socket() as probe, socket.socket() as following:
            try:
                probe.bind((LOOPBACK, 0))
                port: int = probe.getsockname()[1]
                following.bind((LOOPBACK, port + CONTROL_OFFSET))
            except (OSError, OverflowError):
                continue
        if not any(f"{LOOPBACK}:{port + i}" in taken for i in (-CONTROL_OFFSET, 0, CONTROL_OFFSET)):
            return port
    raise PermanentError(f"100 ports in a row on {LOOPBACK} were in use or planned for other machines")
