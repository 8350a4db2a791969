"""What may stand in a spec file: names, types and ranges of its fields. What they mean together: `spec_rules`."""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from cloudfit_orchestrator.controller import yaml_nodes
from cloudfit_orchestrator.controller.image_rules import ImageRules, Signature
from cloudfit_orchestrator.model.record import MAX_MEMBERS, Parameters

API_VERSION = "cloudfit/v1"
MIN_BATCH_BYTES = 4096  # room for one small request with its signature
MAX_BATCH_BYTES = 4 << 20  # a batch and what is said about it must fit into a peer's frame of 8 MiB
_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$")]
Small = Annotated[int, Field(strict=True, ge=0, le=MAX_MEMBERS)]


def _seconds(value: Any) -> int:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match or int(match[1]) < 1:
        raise ValueError("a duration is a whole number with a unit, such as 30s, 15m, 6h or 2d")
    return int(match[1]) * _UNIT_S[match[2]]


def _cidr(value: Any) -> str:
    try:
        network = ipaddress.IPv4Network(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"an IPv4 network is written 10.84.3.0/24: {error}") from error
    if not network.is_private or not 16 <= network.prefixlen <= 28:
        raise ValueError("the network must be private and between /16 and /28")
    return str(network)


def _any_cidr(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Network(value))
    except (ValueError, TypeError) as error:
        raise ValueError(f"an IPv4 network is written 192.0.2.0/24: {error}") from error


Duration = Annotated[
    int, BeforeValidator(_seconds, json_schema_input_type=Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")])
]
Cidr = Annotated[str, BeforeValidator(_cidr)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Libvirt(_Strict):
    uri: Annotated[str, StringConstraints(pattern=r"^(qemu|test)(\+[a-z]+)?://[^\s]*$")]
    network: Cidr = ""


class _Process(_Strict):
    pass


# 32 bytes in base64, as `cloudfit-agent` says and enrolment writes them.
_PublicKey = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=)?$")]


class HostAgentForm(_Strict):
    """The agent on an OpenStack cloud's compute host."""

    socket: Annotated[str, StringConstraints(pattern=r"^/[^\s]{1,106}$")] = ""  # empty: started here by the controller
    ssh: Annotated[str, StringConstraints(pattern=r"^([\w.-]+@)?[\w.-]+(:\d{1,5})?$")] = ""  # empty: this host
    # What `wormhole.measure.check_local` accepts: a libvirt of the agent's own host.
    hypervisor: Annotated[
        str,
        StringConstraints(
            pattern=r"^(qemu:///(system|session)|test:///default|qemu\+unix:///system\?socket=/[^\s&#]+)$"
        ),
    ] = "qemu:///system"
    key: _PublicKey = ""


_Label = Annotated[str, StringConstraints(pattern=r"^[^\s/][^/\n]{0,254}$")]


class OpenStackForm(_Strict):
    cloud: _Label
    flavor: _Label
    network: _Label
    region: Annotated[str, StringConstraints(max_length=255)] = ""
    availability_zone: Annotated[str, StringConstraints(max_length=255)] = ""
    volume_type: Annotated[str, StringConstraints(max_length=255)] = ""
    state: Literal["", "volume", "instance"] = ""
    clients: Annotated[list[Annotated[str, BeforeValidator(_any_cidr)]], Field(max_length=64)] = []
    boot: Literal["kernel", "uefi"] = "kernel"
    images: ImageRules = ImageRules()
    agent: HostAgentForm | None = None


class _Agent(_Strict):
    socket: Annotated[str, StringConstraints(pattern=r"^/[^\s]{1,106}$")]
    key: _PublicKey = ""


class CloudForm(_Strict):
    name: Name
    libvirt: _Libvirt | None = None
    process: _Process | None = None
    openstack: OpenStackForm | None = None
    agent: _Agent | None = None
    reserve: Annotated[bool, Field(strict=True)] = False


class _Placement(_Strict):
    max_per_cloud: Literal["f"] | Annotated[int, Field(strict=True, ge=1, le=MAX_MEMBERS)] = "f"
    images: Literal["same", "diverse"] = "same"


class _Recovery(_Strict):
    every: Duration | None = None
    lease: Duration = 30 * 86400  # past it a machine falls silent: longer than any sensible `every`
    on_suspicion: bool = False
    keep_evidence: Annotated[int, Field(strict=True, ge=0, le=100)] = 3


class _Machine(_Strict):
    memory_mib: Annotated[int, Field(strict=True, ge=192, le=1 << 20)] = 384
    cpus: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    state_mib: Annotated[int, Field(strict=True, ge=32, le=1 << 20)] = 256


_Defaults = Parameters()


class _Parameters(_Strict):
    """What members agree on besides membership; each has a sound default."""

    checkpoint_period: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = _Defaults.checkpoint_period
    window: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = _Defaults.window
    max_batch_requests: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = _Defaults.max_batch_requests
    max_batch_bytes: Annotated[int, Field(strict=True, ge=MIN_BATCH_BYTES, le=MAX_BATCH_BYTES)] = (
        _Defaults.max_batch_bytes
    )
    progress_timeout_ms: Annotated[int, Field(strict=True, ge=100, le=600_000)] = _Defaults.progress_timeout_ms


class SpecFile(_Strict):
    """What may stand in a spec file."""

    apiVersion: Literal["cloudfit/v1"]  # noqa: N815  as users write it
    group: Name
    service: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?$")]
    f: Small
    k: Small = 0
    replicas: Annotated[int, Field(strict=True, ge=1, le=MAX_MEMBERS)] | None = None
    trust: Literal["hypervisor", "none"] = "hypervisor"
    algorithm: Literal["ebawa", "minbft", "pbft"] = "ebawa"
    clouds: Annotated[list[CloudForm], Field(min_length=1, max_length=MAX_MEMBERS)]
    placement: _Placement = _Placement()
    image: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*(@sha256:[0-9a-f]{64})?$")] = "replica"
    allow_adversary: bool = False
    adversary: list[str] = []
    recovery: _Recovery = _Recovery()
    machine: _Machine = _Machine()
    parameters: _Parameters = _Parameters()
    protect: bool = False


_MODELS: dict[str, type[BaseModel]] = {
    "placement": _Placement,
    "recovery": _Recovery,
    "machine": _Machine,
    "parameters": _Parameters,
    "libvirt": _Libvirt,
    "process": _Process,
    "openstack": OpenStackForm,
    "images": ImageRules,
    "signature": Signature,
    "agent": _Agent,
}
_HOST_AGENT_KEYS = ("openstack", "agent")


def known_keys(parent: yaml_nodes.Path) -> list[str]:
    """What may stand in the mapping at that path."""
    if not parent:
        model: type[BaseModel] = SpecFile
    elif parent[-2:] == _HOST_AGENT_KEYS:
        model = HostAgentForm
    elif isinstance(parent[-1], int):
        model = CloudForm
    else:
        model = _MODELS.get(parent[-1], SpecFile)
    return list(model.model_fields)
