"""YAML to plain data with the position of every key and value, so that errors can name file, line and column.

Only what SafeLoader knows. Refused, each with its position: duplicate keys, keys that are no text, anchors and
aliases (they make small files huge), more than one document.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_SPEC_BYTES = 256 << 10  # a spec of 64 replicas on 64 clouds takes under 10 KB
MAX_DEPTH = 32
# What PyYAML raises where a scalar does not suit its explicit tag: `!!bool x`, `!!int ''`, `!!timestamp x`.
_TAG_ERRORS = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. Lines and columns count from 1; `hint` says what to write instead, or is empty."""

    line: int
    column: int
    message: str
    hint: str = ""


@dataclass(slots=True)
class Document:
    """The data, where each path stands, and what was wrong with the YAML itself."""

    data: Any = None
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: Path, *, key: bool = False) -> tuple[int, int]:
        """Line and column of the value (or key) at `path`, or of the nearest parent that exists."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, (1, 1))


def load(text: str) -> Document:
    """Parse one document. Never raises: what is wrong stands in `problems`."""
    document = Document()
    if len(text.encode()) > MAX_SPEC_BYTES:
        document.problems.append(Problem(1, 1, f"the spec is larger than {MAX_SPEC_BYTES} bytes"))
        return document
    try:
        document.problems += _forbidden_events(text)
        node = None if document.problems else yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        what = ", ".join(x for x in (error.context, error.problem) if x)
        document.problems.append(_problem(error.problem_mark or error.context_mark, f"not YAML: {what}"))
        return document
    except (yaml.YAMLError, ValueError) as error:
        document.problems.append(Problem(1, 1, f"not YAML: {error}"))
        return document
    if node is not None:
        document.data = _Builder(document).build(node, ())
    return document


def _forbidden_events(text: str) -> list[Problem]:
    """Anchors, aliases, and nesting that is too deep; looked for before any tree is built."""
    found: list[Problem] = []
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if getattr(event, "anchor", None):
            found.append(_problem(event.start_mark, "anchors and aliases are not allowed", "write it out"))
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return [*found, _problem(event.start_mark, f"nested deeper than {MAX_DEPTH}")]
    return found


def _problem(mark: Any, message: str, hint: str = "") -> Problem:
    return Problem(mark.line + 1, mark.column + 1, message, hint) if mark else Problem(1, 1, message, hint)


class _Builder:
    def __init__(self, document: Document) -> None:
        self._out = document
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path) -> Any:
        self._out.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, *_TAG_ERRORS) as error:
            self._out.problems.append(_problem(node.start_mark, f"cannot be read as {node.tag}: {error}"))
            return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                self._out.problems.append(_problem(key_node.start_mark, "a key must be text"))
                continue
            here = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if key in result:
                first = self._out.keys[(*path, key)][0]
                self._out.problems.append(Problem(*here, f"key {key!r} stands here again", f"first on line {first}"))
                continue
            self._out.keys[(*path, key)] = here
            result[key] = self.build(value_node, (*path, key))
        return result
