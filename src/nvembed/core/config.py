"""Strict configuration: YAML plus ``key.path=value`` overrides, checked in one go.

All mistakes of a recipe are reported at once, with key path, line, what was found and expected.
Nothing is converted: ``"10"`` is not an integer. The YAML is 1.2 with the types of JSON alone, so
``1e-4`` is a number and ``no`` a text, and a key given twice is reported.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from nvembed.core.arguments import checked, kind_of, near_matches, shown_value
from nvembed.core.errors import ConfigError


@dataclass(frozen=True)
class _Origin:
    folder: Path | None = field(default=None, compare=False)  # no part of what is configured


class StrictModel(BaseModel):
    """Base of all configuration: unknown keys are refused and instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _origin: _Origin = PrivateAttr(default_factory=lambda: _Origin())

    @property
    def source_folder(self) -> Path | None:
        """Folder of the file that it was loaded from; ``None`` where there is none."""
        return self._origin.folder


ModelT = TypeVar("ModelT", bound=StrictModel)
KeyPath = tuple[str | int, ...]


@checked
def load_config(
    cls: type[ModelT], path: str | Path | None, overrides: Sequence[str] = ()
) -> ModelT:
    """Read a YAML file, apply overrides and validate.

    Args:
        cls: the configuration class.
        path: the YAML file; None starts from the defaults.
        overrides: ``a.b.0.c=value`` strings, applied in order; values are YAML
            (``8``, ``1e-4``, ``null``, ``[1, 2]``, ``text``). A list member that has a ``name`` may
            be called by it instead of its index.

    Raises:
        ConfigError: naming every problem of the file and of the overrides at once.
    """
    source = _Source("command line" if path is None else str(path))
    data = {} if path is None else source.read()
    for override in overrides:
        source.apply(data, override)
    # Through JSON, because only there strict mode takes a list for a tuple and a string for a path.
    config: ModelT | None = None
    try:
        config = cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        source.problems += [source.describe(cls, data, item) for item in _readable(error)]
    if config is None or source.problems:
        problems = list(dict.fromkeys(source.problems))
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ConfigError(count + "; ".join(problems), where=source.name)
    if path is not None:
        config._origin = _Origin(Path(path).parent)
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, as plain data."""
    return _read(str(path))[0]


def _read(name: str) -> tuple[dict[str, Any], ParsedYaml]:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=name, expected="a YAML recipe") from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", where=name, expected="YAML") from error
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read: {reason}", where=name) from error
    try:
        parsed = parse_yaml(text)
    except YamlError as error:
        line = "" if error.line is None else f":{error.line}"
        raise ConfigError(f"not valid YAML ({error})", where=name + line) from error
    data = {} if parsed.value is None else parsed.value
    if not isinstance(data, dict):
        message = f"the file holds {kind_of(data)}"
        raise ConfigError(message, where=name, expected="key: value lines")
    return data, parsed


def dump_config(model: StrictModel) -> str:
    """Render a configuration as YAML that ``load_config`` reads back to an equal object."""
    values = model.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass
class _Source:
    """One file with its overrides: where each key came from and what is wrong so far."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        data, parsed = _read(self.name)
        self.lines = parsed.lines
        for twice, line_number, first in parsed.repeated:
            self.problems.append(
                f"{_dotted(twice)} (line {line_number}): given twice, first on line {first}"
            )
        return data

    def apply(self, data: dict[str, Any], override: str) -> None:
        """Set one ``a.b.0.c=value`` in ``data``, or note why it cannot be done."""
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        path: list[str | int] = []
        here: Any = data
        try:
            if not equals or not all(parts):
                raise ValueError("expected key.path=value")
            parsed = parse_yaml(text)
            while parts:
                step, used = _step(here, parts, _dotted(path))
                path.append(step)
                parts = parts[used:]
                if not parts:
                    here[step] = parsed.value
                elif isinstance(here, dict) and here.get(step) is None:
                    here[step] = {}
                    self.overridden[tuple(path)] = override
                here = here[step]
        except ValueError as error:
            is_yaml = isinstance(error, YamlError)
            what = f"the value is not valid YAML ({error})" if is_yaml else error
            self.problems.append(f"override {override!r}: {what}")
            return
        self.overridden[tuple(path)] = override
        for twice, _, _ in parsed.repeated:
            key = _dotted((*path, *twice))
            self.problems.append(f"{key} (override {override!r}): given twice")

    def origin(self, path: KeyPath) -> str:
        """Say where a key was set: its override or its line; empty when it was not set at all."""
        # The nearest parent that is written somewhere speaks for a key that is not (a missing one).
        for length in range(len(path), 0, -1):
            if (override := self.overridden.get(path[:length])) is not None:
                return f" (override {override!r})"
            if (line := self.lines.get(path[:length])) is not None:
                return f" (line {line})"
        return ""

    def describe(self, cls: type[StrictModel], data: Any, item: dict[str, Any]) -> str:
        """Turn one pydantic error into ``key (line n): what, expected …``."""
        path = _path_in(data, item["loc"])
        where = f"{_dotted(path)}{self.origin(path)}"
        kind, value = item["type"], item["input"]
        if kind == "extra_forbidden":
            return f"{where}: unknown key{near_matches(str(path[-1]), _known_keys(cls, path[:-1]))}"
        if kind == "missing":
            return f"{where}: missing, and it has no default"
        message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if kind in ("value_error", "assertion_error"):
            return f"{where}: {message}" if path else message
        if (expected := message.removeprefix("Input should be ")) != message:
            return f"{where}: {shown_value(value)} given, expected {expected}"
        return f"{where}: {shown_value(value)} given; {message[:1].lower()}{message[1:]}"


def _step(here: Any, parts: Sequence[str], path: str) -> tuple[str | int, int]:
    """The key or index that the next parts say, and how many they are: names may have dots."""
    part = parts[0]
    if isinstance(here, dict):
        return part, 1
    if not isinstance(here, list):
        raise ValueError(f"{path} is {kind_of(here)}, it has no key {part!r}")
    if part.isdecimal() and int(part) < len(here):
        return int(part), 1
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in here]
    for count in range(len(parts), 0, -1):
        if (name := ".".join(parts[:count])) in names:
            return names.index(name), count
    bounds = f"0 to {len(here) - 1}" if here else "none: the list is empty"
    known = ", ".join(name for name in names if isinstance(name, str))
    expected = f"an index ({bounds})" + (f" or a name ({known})" if known else "")
    raise ValueError(f"{path} is a list, expected {expected} instead of {part!r}")


def _readable(error: ValidationError) -> Iterator[dict[str, Any]]:
    """Yield the errors as plain dictionaries, without those that only follow from others."""
    items = error.errors(include_url=False, include_context=False)
    for item in items:
        own = item["loc"]
        # A list whose members are wrong counts as empty, and so as too short as well.
        if item["type"] != "too_short" or not any(
            len(other["loc"]) > len(own) and other["loc"][: len(own)] == own for other in items
        ):
            yield dict(item)


def _path_in(data: Any, loc: Sequence[str | int]) -> KeyPath:
    """Drop the parts of a pydantic location that are union tags and not keys of the file."""
    path: list[str | int] = []
    here = data
    for position, part in enumerate(loc):
        inside = here if isinstance(here, dict | list) else {}
        try:
            here = inside[part]  # type: ignore[index]
        except (LookupError, TypeError):  # a tag, or the key that is missing
            if not (isinstance(here, dict) and position == len(loc) - 1):
                continue
        path.append(part)
    return tuple(path)


def _known_keys(cls: type[BaseModel], path: KeyPath) -> list[str]:
    """List the keys that ``cls`` knows at ``path`` (of all members, where the type is a union)."""
    models = [cls]
    for part in path:
        found: list[type[BaseModel]] = []
        for model in models:
            if isinstance(part, str) and part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
        # An index or a free key of a mapping leaves the element type, which is already in `models`.
        models = found or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


# --- YAML -----------------------------------------------------------------------------------------

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
        loader, walk = _Loader(text), _Walk()
        if (node := loader.get_single_node()) is not None:
            walk.visit(node, ())
            walk.found.value = loader.construct_document(node)
        return walk.found
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
    """Notes the lines of all keys and those given twice, walking as aliases unfold the document."""

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
