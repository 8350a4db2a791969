"""The group spec: YAML in, a checked and placed `GroupSpec` out. All mistakes are reported at once, with positions.

pydantic judges form at this boundary; what fields mean together is judged after it, on whatever fields are sound.
"""

import difflib
import ipaddress
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from cloudfit_orchestrator.controller import yaml_nodes
from cloudfit_orchestrator.controller.image_rules import ImageRules, Signature
from cloudfit_orchestrator.controller.placement import Placed, members_needed, place
from cloudfit_orchestrator.controller.yaml_nodes import Document, Problem
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import MAX_MEMBERS, Algorithm, Parameters
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, OpenStackPlace, Recovery, Sizes, Trust

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


class _HostAgent(_Strict):
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


class _OpenStack(_Strict):
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
    agent: _HostAgent | None = None


class _Agent(_Strict):
    socket: Annotated[str, StringConstraints(pattern=r"^/[^\s]{1,106}$")]
    key: _PublicKey = ""


class _Cloud(_Strict):
    name: Name
    libvirt: _Libvirt | None = None
    process: _Process | None = None
    openstack: _OpenStack | None = None
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
    window: Annotated[int, Field(strict=True, ge=1, le=1 << 18)] = _Defaults.window
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
    clouds: Annotated[list[_Cloud], Field(min_length=1, max_length=MAX_MEMBERS)]
    placement: _Placement = _Placement()
    image: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*(@sha256:[0-9a-f]{64})?$")] = "replica"
    allow_adversary: bool = False
    adversary: list[str] = []
    recovery: _Recovery = _Recovery()
    machine: _Machine = _Machine()
    parameters: _Parameters = _Parameters()
    protect: bool = False


class SpecError(BadInputError):
    """A spec with mistakes, all of them."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        """`problems` are put in the order of the file."""
        self.problems = sorted(problems, key=lambda p: (p.line, p.column))
        lines = [f"{source}: {len(problems)} mistake{'s' * (len(problems) != 1)} in the spec"]
        lines += [f"  {source}:{p.line}:{p.column}: {p.message}" + f" ({p.hint})" * bool(p.hint) for p in self.problems]
        super().__init__("\n".join(lines), next_command=f"correct {source} and run the command again")


def json_schema() -> dict[str, Any]:
    """JSON Schema of the spec, for editors."""
    return SpecFile.model_json_schema()


def read_spec(path: Path) -> GroupSpec:
    """The spec in the file at `path`. Raises SpecError, or BadInputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(yaml_nodes.MAX_SPEC_BYTES + 1)
        return parse_spec(raw.decode(), str(path))
    except OSError as error:
        raise BadInputError(f"cannot read spec {path}: {error.strerror}", next_command="check the file name") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"spec {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_spec(text: str, source: str) -> GroupSpec:
    """The spec in `text`; `source` names it in errors. Raises SpecError."""
    document = yaml_nodes.load(text)
    if document.problems and document.data is None:
        raise SpecError(source, document.problems)
    problems = [*document.problems]
    if not isinstance(document.data, dict):
        raise SpecError(source, [*problems, Problem(1, 1, "a spec is a mapping", "begin with apiVersion: cloudfit/v1")])
    bad = _form(document, problems)
    sound = _sound_fields(document.data, bad)
    placement = _meaning(document, sound, problems)
    if problems or placement is None:
        raise SpecError(source, problems)
    return _group_spec(SpecFile.model_validate(document.data), *placement)


def _form(document: Document, problems: list[Problem]) -> set[str]:
    """Append pydantic's findings; return the top-level fields that are not sound."""
    try:
        SpecFile.model_validate(document.data)
    except ValidationError as error:
        bad = set()
        for e in error.errors(include_url=False):
            path = _real_path(document, e["loc"])
            bad.add(str(e["loc"][0]))
            problems.append(_explain(document, path, e["type"], e["msg"], e.get("ctx", {})))
        return bad
    return set()


def _real_path(document: Document, loc: tuple[Any, ...]) -> yaml_nodes.Path:
    """The location that pydantic names, without the names of union branches, which are not in the file."""
    path: yaml_nodes.Path = ()
    for i, part in enumerate(loc):
        if (*path, part) in document.values or i == len(loc) - 1:
            path = (*path, part)
    return path if path in document.values or path[:-1] in document.values else path[:-1]


def _explain(document: Document, path: yaml_nodes.Path, kind: str, message: str, context: dict[str, Any]) -> Problem:
    dotted = ".".join(str(p) for p in path)
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return Problem(*document.where(path, key=True), f"unknown key {path[-1]!r}", hint)
    if kind == "missing":
        return Problem(*document.where(path[:-1]), f"{dotted} is missing", f"add {path[-1]}:")
    line, column = document.where(path)
    if kind == "string_pattern_mismatch":
        return Problem(line, column, f"{dotted}: has not the right form", f"must match {context['pattern']}")
    return Problem(line, column, f"{dotted}: {message.removeprefix('Value error, ')}")


_MODELS: dict[str, type[BaseModel]] = {
    "placement": _Placement,
    "recovery": _Recovery,
    "machine": _Machine,
    "parameters": _Parameters,
    "libvirt": _Libvirt,
    "process": _Process,
    "openstack": _OpenStack,
    "images": ImageRules,
    "signature": Signature,
    "agent": _Agent,
}
_HOST_AGENT_KEYS = ("openstack", "agent")


def _known_keys(parent: yaml_nodes.Path) -> list[str]:
    if not parent:
        model: type[BaseModel] = SpecFile
    elif parent[-2:] == _HOST_AGENT_KEYS:
        model = _HostAgent
    elif isinstance(parent[-1], int):
        model = _Cloud
    else:
        model = _MODELS.get(parent[-1], SpecFile)
    return list(model.model_fields)


def _sound_fields(data: dict[str, Any], bad: set[str]) -> dict[str, Any]:
    """The values of all top-level fields without a mistake, defaults included; the others are absent."""
    fields = {}
    for name, info in SpecFile.model_fields.items():
        if name in bad:
            continue
        if name not in data:
            fields[name] = info.get_default(call_default_factory=True)
            continue
        form: Any = Annotated[info.annotation, info]
        fields[name] = TypeAdapter(form).validate_python(data[name])
    return fields


def _meaning(document: Document, v: dict[str, Any], problems: list[Problem]) -> tuple[Placed] | None:
    def wrong(path: yaml_nodes.Path, message: str, hint: str = "") -> None:
        problems.append(Problem(*document.where(path), message, hint))

    trust = v.get("trust")
    _check_clouds(v.get("clouds", []), trust, wrong)
    if trust == Trust.NONE:
        _check_untrusted(v, wrong)
    p = v.get("parameters")
    if p is not None and p.window < p.checkpoint_period:
        hint = "4 * checkpoint_period leaves room"
        wrong(("parameters", "window"), f"window {p.window} is below checkpoint_period {p.checkpoint_period}", hint)
    n = None
    if "f" in v and "k" in v and "replicas" in v:
        row = "3f+2k+1" if v.get("algorithm") == Algorithm.PBFT else "2f+k+1"
        needed = members_needed(v.get("algorithm", ""), v["f"], v["k"])
        n = needed if v["replicas"] is None else v["replicas"]
        if n < needed:
            where = ("replicas",)
            wrong(where, f"{n} replicas are too few for f={v['f']}, k={v['k']}", f"at least {row} = {needed}")
            n = None
        elif n > MAX_MEMBERS:
            wrong(("f",), f"f={v['f']}, k={v['k']} needs {n} replicas, the limit is {MAX_MEMBERS}")
            n = None
    _check_adversary(v, n, wrong)
    if n is None or "placement" not in v or len({c.name for c in v.get("clouds", [])}) != len(v.get("clouds", [None])):
        return None
    limit = (v["f"] or n) if v["placement"].max_per_cloud == "f" else v["placement"].max_per_cloud
    names = [c.name for c in v["clouds"] if not c.reserve]
    if len(names) * limit < n:
        more = -(-n // limit)
        hint = f"name {more} clouds, reserves apart, or raise placement.max_per_cloud, which gives up the loss of one"
        wrong(("clouds",), f"{n} replicas do not fit on {len(names)} clouds with at most {limit} on each", hint)
        return None
    return (place(n, v["f"], names, limit),)


def _check_clouds(clouds: list[_Cloud], trust: str | None, wrong: Any) -> None:
    seen: set[str] = set()
    for i, cloud in enumerate(clouds):
        kinds = [k for k in ("libvirt", "process", "openstack") if getattr(cloud, k) is not None]
        if len(kinds) != 1:
            what = " and ".join(kinds) or "no kind"
            wrong(("clouds", i), f"cloud {cloud.name!r} has {what}", "exactly one of libvirt, process, openstack")
        if cloud.name in seen:
            wrong(("clouds", i, "name"), f"cloud {cloud.name!r} is named twice", "each cloud needs its own name")
        seen.add(cloud.name)
        if trust == Trust.HYPERVISOR:
            _check_agent(i, cloud, wrong)
        elif trust == Trust.NONE and (cloud.agent or (cloud.openstack and cloud.openstack.agent)):
            where = ("clouds", i, "agent") if cloud.agent else ("clouds", i, "openstack", "agent")
            hint = "leave agent: out, or with agents on all hosts say trust: hypervisor"
            wrong(where, f"cloud {cloud.name!r} has an agent, and trust: none uses none", hint)
    nets = [
        (i, ipaddress.IPv4Network(c.libvirt.network)) for i, c in enumerate(clouds) if c.libvirt and c.libvirt.network
    ]
    for at, (i, net) in enumerate(nets):
        for j, other in nets[:at]:
            if net.overlaps(other):
                wrong(("clouds", i, "libvirt", "network"), f"{net} overlaps the network of {clouds[j].name!r}")


def _check_agent(i: int, cloud: _Cloud, wrong: Any) -> None:
    """trust: hypervisor rests on a wormhole at the hypervisor, and that needs root on the compute hosts."""
    if cloud.libvirt and "+ssh://" in cloud.libvirt.uri and cloud.agent is None:
        hint = "add agent: {socket: /run/cloudfit/agent.sock}; without root there, trust: none"
        wrong(("clouds", i), f"cloud {cloud.name!r} is remote: the controller cannot start its agent", hint)
    if cloud.openstack is None:
        return
    agent = cloud.openstack.agent
    if cloud.agent is not None:
        wrong(("clouds", i, "agent"), "an openstack cloud names its agent inside openstack", "openstack: {agent: …}")
    if agent is None:
        hint = (
            "with root on its compute hosts run cloudfit-agent there and add agent: {ssh: root@host, socket: /run/…}, "
            "or agent: {} if the compute host is this one; without, say trust: none with algorithm: pbft"
        )
        wrong(("clouds", i, "openstack"), f"cloud {cloud.name!r} has no agent: nobody measures what boots there", hint)
    elif agent.ssh and not agent.socket:
        hint = "add socket: /run/cloudfit/agent.sock"
        wrong(("clouds", i, "openstack", "agent"), "a remote agent is not started by the controller", hint)


def _check_untrusted(v: dict[str, Any], wrong: Any) -> None:
    """Without a trusted component only PBFT stands, and a cloud that is malicious itself must count within f."""
    if v.get("algorithm", Algorithm.PBFT) != Algorithm.PBFT:
        hint = "algorithm: pbft, with 3f+1 replicas; or trust: hypervisor with an agent on every host"
        says = f"{v['algorithm']} believes the counters of a wormhole, and with trust: none there is none"
        wrong(("trust",), says, hint)
    if v.get("f") == 0:
        wrong(("f",), "with f=0 a malicious cloud would have the group", "f: 1 or more, on 3f+1 replicas")
    placement = v.get("placement")
    if placement is not None and "f" in v and placement.max_per_cloud != "f" and placement.max_per_cloud > v["f"] > 0:
        says = f"a malicious cloud would have {placement.max_per_cloud} replicas, more than f={v['f']}"
        wrong(("placement", "max_per_cloud"), says, f"max_per_cloud: f, which is {v['f']}")


def _check_adversary(v: dict[str, Any], n: int | None, wrong: Any) -> None:
    names = v.get("adversary") or []
    if names and v.get("allow_adversary") is False:
        hint = "tests and demonstrations only: allow_adversary: true"
        wrong(("adversary",), "adversary names replicas, but allow_adversary is not set", hint)
    if n is None:
        return
    for i, name in enumerate(names):
        if name not in {f"r{j}" for j in range(n)}:
            wrong(("adversary", i), f"there is no replica {name!r}", f"replicas are r0 to r{n - 1}")
    if len(set(names)) > v["f"]:
        wrong(("adversary",), f"{len(set(names))} adversaries, but f={v['f']}", "name at most f replicas")


def _group_spec(s: SpecFile, placed: Placed) -> GroupSpec:
    return GroupSpec(
        group=s.group,
        service=s.service,
        f=s.f,
        k=s.k,
        algorithm=Algorithm(s.algorithm),
        clouds=tuple(replace(_cloud_spec(c), trust=Trust(s.trust)) for c in s.clouds),
        placement=placed.placement,
        image=s.image,
        allow_adversary=s.allow_adversary,
        adversary=tuple(dict.fromkeys(s.adversary)),
        recovery=Recovery(
            every_s=s.recovery.every,
            lease_s=s.recovery.lease,
            on_suspicion=s.recovery.on_suspicion,
            keep_evidence=s.recovery.keep_evidence,
        ),
        protect=s.protect,
        sizes=Sizes(s.machine.memory_mib, s.machine.cpus, s.machine.state_mib),
        parameters=Parameters(**s.parameters.model_dump()),
        not_tolerated=placed.not_tolerated,
    )


def _cloud_spec(c: _Cloud) -> CloudSpec:
    if c.openstack:
        return replace(_openstack_spec(c.name, c.openstack), reserve=c.reserve)
    driver = "libvirt" if c.libvirt else "process"
    uri, network = (c.libvirt.uri, c.libvirt.network) if c.libvirt else ("", "")
    socket, key = (c.agent.socket, c.agent.key) if c.agent else ("", "")
    return CloudSpec(c.name, driver, uri, network, socket, agent_key=key, reserve=c.reserve)


def _openstack_spec(name: str, o: _OpenStack) -> CloudSpec:
    agent = o.agent or _HostAgent()
    signature = o.images.signature
    place = OpenStackPlace(
        cloud=o.cloud,
        flavor=o.flavor,
        network=o.network,
        region=o.region,
        availability_zone=o.availability_zone,
        volume_type=o.volume_type,
        state=o.state,
        clients=tuple(o.clients),
        hypervisor=agent.hypervisor,
        boot=o.boot,
        hidden=o.images.hidden,
        protected=o.images.protected,
        certificate=signature.certificate if signature else "",
        signing_key=signature.key if signature else "",
    )
    uri = f"openstack+ssh://{agent.ssh}" if agent.ssh else "openstack:"
    return CloudSpec(name, "openstack", uri, "", agent.socket, place, agent.key)


def _cloud_from_json(doc: dict[str, Any]) -> CloudSpec:
    place = doc.pop("openstack", None)
    if place is not None:
        place = OpenStackPlace(**{**place, "clients": tuple(place["clients"])})
    doc["trust"] = Trust(doc.get("trust", Trust.HYPERVISOR))  # specs from before there was a choice
    return CloudSpec(**doc, openstack=place)


def to_json(spec: GroupSpec) -> str:
    """`spec` as canonical JSON, for the journal."""
    return json.dumps(asdict(spec), sort_keys=True)


def from_json(text: str) -> GroupSpec:
    """The inverse of `to_json`. Raises BadInputError if the text is none of ours."""
    try:
        doc = json.loads(text)
        doc["clouds"] = tuple(_cloud_from_json(c) for c in doc["clouds"])
        doc["placement"] = tuple((r, c) for r, c in doc["placement"])
        doc["adversary"] = tuple(doc["adversary"])
        doc["not_tolerated"] = tuple(doc["not_tolerated"])
        doc["algorithm"] = Algorithm(doc["algorithm"])
        doc["recovery"] = Recovery(**doc["recovery"])
        doc["sizes"] = Sizes(**doc["sizes"])
        doc["parameters"] = Parameters(**doc["parameters"])
        return GroupSpec(**doc)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"stored spec is malformed: {type(error).__name__}: {error}") from error
