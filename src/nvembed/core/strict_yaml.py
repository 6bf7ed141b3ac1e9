"""YAML 1.2 as recipes need it: no surprise of YAML 1.1, and nothing that a file could hide."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
MAX_VALUES = 100_000  # that aliases may unfold to
_MAX_DEPTH = 100
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_KNOWN_TAGS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
# Type, pattern, characters that it can begin with.
_FLOAT = (
    r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", r"^(?:<<)$", ["<"]),
)


class YamlError(ValueError):
    """A text that is not YAML of this sort; ``line`` counts from 1."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


@dataclass
class ParsedYaml:
    """What a text holds; of an empty text the value is ``None``."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)  # of every key and list member, from 1
    # Keys given twice or more: path, line, line of the first. The last one counts.
    repeated: list[tuple[KeyPath, int, int]] = field(default_factory=list)


def parse_yaml(text: str) -> ParsedYaml:
    """Read one document; a YamlError where it is not YAML, or not of this sort."""
    try:
        loader = _Loader(text)
        try:
            walk = _Walk()
            if (node := loader.get_single_node()) is not None:
                walk.visit(node, ())
                walk.found.value = loader.construct_document(node)
            return walk.found
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        message = f"a character that YAML does not allow: {error.character:#x}"
        raise YamlError(message, text.count("\n", 0, error.position) + 1) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise YamlError(what, mark.line + 1 if mark is not None else None) from error
    except RecursionError as error:
        raise YamlError("nested too deep") from error


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {
            str(key.value): self.construct_object(child, deep=deep) for key, child in node.value
        }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError) as error:  # of !!int and the like, and of gigantic numbers
            shown = str(node.value)[:20]
            kind = node.tag.removeprefix(_TAG)
            raise YamlError(f"{shown!r} as {kind}", node.start_mark.line + 1) from error


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that the loader would take for more."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
# The stock constructor reads 010 as octal.
_Loader.add_constructor(f"{_TAG}int", lambda _, node: int(str(node.value).replace("_", "")))


class _Walk:
    """Walks a document as its aliases unfold it, before anything is made of it.

    It notes the line of every key, and which keys are given twice (YAML keeps the last).
    """

    def __init__(self) -> None:
        self.found = ParsedYaml()
        self._count = 0
        self._above: list[int] = []

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_VALUES:
            raise YamlError(f"aliases unfold to more than {MAX_VALUES:,} values", line)
        if id(node) in self._above:
            raise YamlError("an alias contains itself", line)
        if len(self._above) > _MAX_DEPTH:
            raise YamlError("nested too deep", line)
        if node.tag not in _KNOWN_TAGS:
            shown = node.tag.replace(_TAG, "!!")
            raise YamlError(f"the tag {shown} has no meaning here", line)
        self._above.append(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self._note((*path, index), child.start_mark.line + 1, child)
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path)
        self._above.pop()

    def _note(self, path: KeyPath, line: int, child: yaml.Node) -> None:
        self.found.lines.setdefault(path, line)
        self.visit(child, path)

    def _visit_mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, child in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("a key is a list or a mapping", line)
            if key_node.tag == _MERGE:
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if key in first:
                self.found.repeated.append(((*path, key), line, first[key]))
            first.setdefault(key, line)
            self._note((*path, key), line, child)
        for child in merged:  # after the mapping's own keys, which come before theirs
            self.visit(child, path)
