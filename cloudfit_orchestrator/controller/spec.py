"""The group spec: YAML in, a checked and placed `GroupSpec` out. All mistakes are reported at once, with positions.

pydantic judges form at this boundary (`spec_form`); what fields mean together is judged after it, on whatever fields
are sound (`spec_rules`).
"""

import difflib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from cloudfit_orchestrator.controller import spec_rules, yaml_nodes
from cloudfit_orchestrator.controller.placement import Placed
from cloudfit_orchestrator.controller.spec_form import CloudForm, HostAgentForm, OpenStackForm, SpecFile, known_keys
from cloudfit_orchestrator.controller.yaml_nodes import Document, Problem
from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.record import Algorithm, Parameters
from cloudfit_orchestrator.model.spec import CloudSpec, GroupSpec, OpenStackPlace, Recovery, Sizes, Trust


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
    placement = spec_rules.check(document, sound, problems)
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
        known = known_keys(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return Problem(*document.where(path, key=True), f"unknown key {path[-1]!r}", hint)
    if kind == "missing":
        return Problem(*document.where(path[:-1]), f"{dotted} is missing", f"add {path[-1]}:")
    line, column = document.where(path)
    if kind == "string_pattern_mismatch":
        return Problem(line, column, f"{dotted}: has not the right form", f"must match {context['pattern']}")
    return Problem(line, column, f"{dotted}: {message.removeprefix('Value error, ')}")


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


def _cloud_spec(c: CloudForm) -> CloudSpec:
    if c.openstack:
        return replace(_openstack_spec(c.name, c.openstack), reserve=c.reserve)
    driver = "libvirt" if c.libvirt else "process"
    uri, network = (c.libvirt.uri, c.libvirt.network) if c.libvirt else ("", "")
    socket, key = (c.agent.socket, c.agent.key) if c.agent else ("", "")
    return CloudSpec(c.name, driver, uri, network, socket, agent_key=key, reserve=c.reserve)


def _openstack_spec(name: str, o: OpenStackForm) -> CloudSpec:
    agent = o.agent or HostAgentForm()
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
