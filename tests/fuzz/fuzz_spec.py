"""Spec files: a group that can be placed, or all mistakes with their positions."""

from contextlib import suppress

from cloudfit_orchestrator.controller.spec import SpecError, from_json, parse_spec, to_json
from cloudfit_orchestrator.model.errors import BadInputError

GOOD = b"""apiVersion: cloudfit/v1
group: ledger
service: kv
f: 1
clouds:
  - {name: a, process: {}}
  - {name: b, libvirt: {uri: "qemu:///system", network: 10.84.3.0/24}}
  - {name: c, process: {}}
recovery: {every: 6h, lease: 8h}
machine: {memory_mib: 384}
"""


def run(data: bytes) -> None:
    """Text of a spec, and of one stored in the journal."""
    text = data.decode(errors="replace")
    try:
        spec = parse_spec(text, "fuzz.yaml")
    except SpecError as error:
        lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029")
        assert error.problems
        assert all(1 <= p.line <= lines + 2 and p.column >= 1 for p in error.problems), error.problems
    except BadInputError:
        pass
    else:
        assert from_json(to_json(spec)) == spec
    with suppress(BadInputError):
        from_json(text)


def seeds() -> list[bytes]:
    """A good spec, and tags that YAML knows."""
    tags = b"a: !!bool x\nb: !!int ''\nc: !!timestamp x\nd: !!float .\ne: !!binary '='\nf: !!set {a}\n"
    return [GOOD, tags, b"&a [*a]", b"? [x]\n: y\n<<: {a: 1}\n"]
