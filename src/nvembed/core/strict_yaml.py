"""YAML 1.2 as recipes need it: no surprise of YAML 1.1, and nothing that a file could hide.

PyYAML follows YAML 1.1, where ``1e-4`` is a text, ``no`` is false and ``2024-01-01`` a date. Here
these are a number and two texts, keys are texts as they are written, and only the types of JSON
exist. A key given twice is reported, and so are aliases that contain themselves or that unfold to
more values than a recipe can have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MAX_VALUES = 100_000
"""Values that aliases may unfold to."""

_MAX_DEPTH = 100
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_KNOWN_TAGS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}

_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    ("merge", re.compile(r"^(?:<<)$"), ["<"]),
)


class YamlError(ValueError):
    """A text that is not YAML of this sort.

    Args:
        what: is wrong.
        line: where, from 1; ``None`` where it is not known.
    """

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


@dataclass
class ParsedYaml:
    """What a text holds.

    Args:
        value: of the types of JSON; an empty text holds ``None``.
        lines: the line of every key and list member, from 1.
        repeated: keys given twice or more: path, line, line of the first. The last one counts.
    """

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    repeated: list[tuple[KeyPath, int, int]] = field(default_factory=list)


def parse_yaml(text: str) -> ParsedYaml:
    """Read one document.

    Raises:
        YamlError: it is not YAML, or not of this sort.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return ParsedYaml()
            _Check().check(node)
            found = ParsedYaml()
            _note_lines(found, node, ())
            found.value = loader.construct_document(node)
            return found
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"a character that YAML does not allow: {error.character:#x}", line
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise YamlError(what, mark.line + 1 if mark is not None else None) from error
    except RecursionError as error:
        raise YamlError("nested too deep") from error


class _Loader(yaml.SafeLoader):
    """YAML as above, reading."""

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


class Dumper(yaml.SafeDumper):
    """YAML as above, writing: it quotes exactly the texts that the loader would take for more."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # The stock constructor reads 010 as octal.
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.yaml_implicit_resolvers = {}
Dumper.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
_Loader.add_constructor(f"{_TAG}int", _construct_int)


class _Check:
    """Walks a document as its aliases unfold it, before anything is made of it."""

    def __init__(self) -> None:
        self._count = 0
        self._above: list[int] = []

    def check(self, node: yaml.Node) -> None:
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
            for child in node.value:
                self.check(child)
        elif isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise YamlError("a key is a list or a mapping", key.start_mark.line + 1)
                self.check(child)
        self._above.pop()


def _note_lines(found: ParsedYaml, node: yaml.Node, path: KeyPath) -> None:
    """Remember the line of every key, and which keys are given twice (YAML keeps the last)."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            found.lines.setdefault((*path, index), child.start_mark.line + 1)
            _note_lines(found, child, (*path, index))
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, child in node.value:
            if key_node.tag == _MERGE:
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first:
                found.repeated.append(((*path, key), line, first[key]))
            first.setdefault(key, line)
            found.lines.setdefault((*path, key), line)
            _note_lines(found, child, (*path, key))
        for child in merged:  # after the mapping's own keys, which come before theirs
            _note_lines(found, child, path)
