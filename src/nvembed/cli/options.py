"""Options that several commands have, and what is read from them and printed in one way."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from nvembed.core.arguments import PrecisionChoice, WeightBits
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import withdraw

if TYPE_CHECKING:
    from rich.console import Console

    from nvembed.data.config import Column


def overrides(help: str) -> Any:
    """``KEY=VALUE`` arguments, which change a configuration."""
    return typer.Argument(metavar="KEY=VALUE", help=help)


# Parameters that have one meaning in every command, by name.
_SHARED: dict[str, Any] = {
    "recipe": "YAML file; see recipes/.",
    "columns": typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        help="Where a value is found, as `columns` of a recipe says it: text=body, id=key, "
        "query=question. May be repeated; columns of one name are joined.",
    ),
    "layout": "How its rows become records; see data/sources/layouts.py.",
    "keep_going": "Leave bad lines out and count them.",
    "engine": "Who embeds: ray is a cluster's workers.",
    "dtype": "Type of the weights; auto is what this machine computes fastest in, but for int8, "
    "which is faster on many CPUs and less exact.",
    "quantize": "Hold the weights in 8 or 4 bits, for less memory.",
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a model computes in, and how its weights are held meanwhile."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    quantize: WeightBits | None = None

    @property
    def precision(self) -> PrecisionChoice:
        """Both as one choice."""
        if self.quantize is None:
            return self.dtype
        if self.dtype == "int8":
            raise ConfigError(
                "--dtype int8 holds weights in 8 bits already",
                where="--quantize",
                expected="--dtype auto, float32 or bfloat16 with it",
            )
        return cast(PrecisionChoice, f"{self.dtype}-{self.quantize}")


def described(**parameters: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Say what the parameters of a command are, but for those that many commands share.

    A parameter that is given by name alone is an option, a flag where it is a bool; the others are
    arguments. Where there is more to say than a help text, it is typer's own object. A dataclass
    stands for its fields, each of which is an option.
    """

    def describe(command: Callable[..., None]) -> Callable[..., None]:
        types, groups = get_type_hints(command), dict[str, type[Any]]()
        options: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            group = types[name]
            if isinstance(group, type) and is_dataclass(group):
                groups[name], hints = group, get_type_hints(group)
                own = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in _fields(group)]
            else:
                hints, own = types, [parameter]
            for each in own:
                told = _told(each, hints[each.name], parameters.get(each.name))
                options.append(each.replace(annotation=Annotated[hints[each.name], told]))

        @functools.wraps(command)
        def call(**given: Any) -> None:
            for name, group in groups.items():
                given[name] = group(**{each.name: given.pop(each.name) for each in _fields(group)})
            command(**given)

        call.__annotations__ = {each.name: each.annotation for each in options}
        call.__dict__.update(__signature__=Signature(options))
        return call

    return describe


def _fields(group: type[Any]) -> list[Parameter]:
    return list(signature(group).parameters.values())


def _told(parameter: Parameter, kind: Any, told: Any) -> Any:
    """Typer's object for a parameter, of what is told of it."""
    name, told = parameter.name, told or _SHARED[parameter.name]
    if not isinstance(told, str):
        return told
    if parameter.kind is not Parameter.KEYWORD_ONLY:
        return typer.Argument(metavar=name.upper(), help=told)
    return typer.Option(*((f"--{name.replace('_', '-')}",) if kind is bool else ()), help=told)


# Other spellings, which earlier versions had or which are near, by the present one.
OLD_OPTIONS = {
    "--task": "--mteb-task NAME (of evaluate)",
    "--columns": "--column NAME=COLUMN",
    "--field": "--column text=NAME",
    "--text-key": "--column text=NAME",
    "--id-field": "--column id=NAME",
    "--id-key": "--column id=NAME",
}


def read_columns(given: Sequence[str] | None) -> dict[str, Column]:
    """Read ``--column``; a ConfigError where one is not of the form NAME=COLUMN."""
    columns: dict[str, list[str]] = {}
    for one in given or ():
        name, equals, column = one.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"{one!r}", where="--column", expected="NAME=COLUMN")
        columns.setdefault(name, []).append(column)
    return {name: tuple(all) if len(all) > 1 else all[0] for name, all in columns.items()}


def asker() -> Callable[[str, Sequence[str]], str] | None:
    """What asks for a column, where somebody sits at a terminal."""
    if not sys.stdin.isatty():
        return None

    def ask(role: str, columns: Sequence[str]) -> str:
        withdraw()  # a line about loading would come in between
        told = f"Which column holds the {role}? ({', '.join(columns)})"
        while (answer := str(typer.prompt(told)).strip()) not in columns:
            continue
        return answer

    return ask


def echo_error(*lines: object) -> None:
    """Print lines on stderr."""
    for line in lines:
        typer.echo(line, err=True)


def bad_lines(first: Iterable[Any]) -> list[str]:
    """Render places and problems of the first lines that were left out."""
    return [f"{bad.place}: {bad.problem}" for bad in first]


def console() -> Console:
    """Stdout, with room for a table where it is no terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)
