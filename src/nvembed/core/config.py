"""Strict configuration: YAML plus ``key.path=value`` overrides, checked in one go.

A recipe with five mistakes is reported once, with all five: key path, line, what was found, what
was expected, and the near match of a misspelt key. Nothing is converted behind the user's back:
``"10"`` is not an integer and ``true`` is not 1.
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
from pydantic import BaseModel, ConfigDict, ValidationError

from nvembed.core.arguments import checked, kind_of, near_matches, shown_value
from nvembed.core.errors import ConfigError

KeyPath = tuple[str | int, ...]


class StrictModel(BaseModel):
    """Base of all configuration: unknown keys are refused and instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ModelT = TypeVar("ModelT", bound=StrictModel)


@checked
def load_config(
    cls: type[ModelT], path: str | Path | None, overrides: Sequence[str] = ()
) -> ModelT:
    """Read a YAML file, apply overrides and validate.

    Args:
        cls: the configuration class.
        path: the YAML file; None starts from the defaults.
        overrides: ``a.b.0.c=value`` strings, applied in order; values are YAML
            (``8``, ``1e-4``, ``null``, ``[1, 2]``, ``text``).

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
        config = cls.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        source.problems += [source.describe(cls, data, item) for item in _readable(error)]
    if config is None or source.problems:
        problems = list(dict.fromkeys(source.problems))
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ConfigError(count + "; ".join(problems), where=source.name)
    return config


def dump_config(model: StrictModel) -> str:
    """Render a configuration as YAML that ``load_config`` reads back to an equal object."""
    return yaml.dump(
        model.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )


# --- YAML -----------------------------------------------------------------------------------------

# PyYAML follows YAML 1.1: 1e-4 is a string, `no` is false, 2024-01-01 a date. Here: YAML 1.2.
_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """YAML as above, reading."""


class _Dumper(yaml.SafeDumper):
    """YAML as above, writing: it quotes exactly the texts that the loader would take for more."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # The stock constructor reads 010 as octal.
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _parse_value(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


@dataclass
class _Source:
    """One file with its overrides: where each key came from and what is wrong so far."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        try:
            text = Path(self.name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError("no such file", where=self.name, expected="a YAML recipe") from error
        except UnicodeDecodeError as error:
            raise ConfigError("not UTF-8 text", where=self.name, expected="YAML") from error
        except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot read: {reason}", where=self.name) from error
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if node is not None else {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            what = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError(f"not valid YAML ({what})", where=self.name + line) from error
        finally:
            loader.dispose()
        if not isinstance(data, dict):
            raise ConfigError(
                f"the file holds {kind_of(data)}", where=self.name, expected="key: value lines"
            )
        if node is not None:
            self._note_lines(node, ())
        return data

    def _note_lines(self, node: yaml.Node, path: KeyPath) -> None:
        """Remember the line of every key, and report keys given twice (YAML keeps the last)."""
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self.lines[(*path, index)] = child.start_mark.line + 1
                self._note_lines(child, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key_node, child in node.value:
                key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in seen:
                    first = self.lines[(*path, key)]
                    self.problems.append(
                        f"{_dotted((*path, key))} (line {line}): given twice, first on line {first}"
                    )
                seen.add(key)
                self.lines.setdefault((*path, key), line)
                self._note_lines(child, (*path, key))

    def apply(self, data: dict[str, Any], override: str) -> None:
        """Set one ``a.b.0.c=value`` in ``data``, or note why it cannot be done."""
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            self.problems.append(f"override {override!r}: expected key.path=value")
            return
        try:
            value = _parse_value(text)
        except yaml.YAMLError:
            self.problems.append(f"override {override!r}: the value is not valid YAML")
            return
        path: list[str | int] = []
        here: Any = data
        for depth, part in enumerate(parts):
            try:
                step = _step(here, part, _dotted(path))
            except ValueError as error:
                self.problems.append(f"override {override!r}: {error}")
                return
            path.append(step)
            if depth == len(parts) - 1:
                here[step] = value
            elif isinstance(here, dict) and here.get(part) is None:
                here[step] = {}
                self.overridden[tuple(path)] = override
            here = here[step]
        self.overridden[tuple(path)] = override

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


def _step(here: Any, part: str, path: str) -> str | int:
    """Check that ``part`` leads on from ``here`` and return it as key or index."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        bounds = f"0 to {len(here) - 1}" if here else "none: the list is empty"
        raise ValueError(f"{path} is a list, expected an index ({bounds}) instead of {part!r}")
    raise ValueError(f"{path} is {kind_of(here)}, it has no key {part!r}")


# --- Errors ---------------------------------------------------------------------------------------


def _readable(error: ValidationError) -> Iterator[dict[str, Any]]:
    """Yield the errors as plain dictionaries, without those that only follow from others."""
    items = error.errors(include_url=False, include_context=False)
    for item in items:
        # A list whose members are wrong counts as empty, and so as too short as well.
        inside = (other["loc"] for other in items if len(other["loc"]) > len(item["loc"]))
        if item["type"] == "too_short" and any(
            loc[: len(item["loc"])] == item["loc"] for loc in inside
        ):
            continue
        yield dict(item)


def _has(here: Any, part: str | int) -> bool:
    if isinstance(here, dict):
        return part in here
    return isinstance(here, list) and isinstance(part, int) and part < len(here)


def _path_in(data: Any, loc: Sequence[str | int]) -> KeyPath:
    """Drop the parts of a pydantic location that are union tags and not keys of the file."""
    path: list[str | int] = []
    here = data
    for position, part in enumerate(loc):
        if _has(here, part):
            here = here[part]
        elif not (isinstance(here, dict) and position == len(loc) - 1):
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
    return ".".join(str(part) for part in path)
