"""Arguments of the Python API, checked against the annotations of the function they are given to.

What a signature does not allow is one line that names the argument, before the function runs. Types
are strict: ``"512"`` is not a number and ``True`` is not 1. Settings files, whose keys are the
arguments of a constructor, are checked in the same way.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NotRequired, ParamSpec, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, InstanceOf, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict, TypeIs

from nvembed.core.errors import ConfigError

FloatPrecision = Literal["float32", "bfloat16"]
WeightBits = Literal["int8", "fp8", "nf4"]
Precision = Literal[
    "float32", "float32-int8", "float32-fp8", "float32-nf4",
    "bfloat16", "bfloat16-int8", "bfloat16-fp8", "bfloat16-nf4", "int8",
]  # fmt: skip
PrecisionChoice = Literal[Precision, "auto", "auto-int8", "auto-fp8", "auto-nf4"]
"""What a job computes in; ``auto`` is the machine's fastest type of floats, see
``kernels/machine.py``, and ``int8`` is of encoding on a CPU (``kernels/int8.py``). Behind a
hyphen stands how weights are held meanwhile (``model/quantization.py``)."""


def is_settled(choice: PrecisionChoice | None) -> TypeIs[Precision | None]:
    """Whether no ``auto`` is left in a choice; ``None`` is what was saved."""
    return choice is None or not choice.startswith("auto")


def goes_on(choice: PrecisionChoice, begun: Precision | None) -> bool:
    """Whether a choice with ``auto`` in it allows the type that a job was begun in."""
    held = choice.removeprefix("auto")
    return begun is not None and held != choice and begun.endswith(held)


P = ParamSpec("P")
R = TypeVar("R")

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse, by a ConfigError that names each, what its annotations do not allow.

    Arguments are handed on as they were given; ``*args`` and ``**kwargs`` are not looked at.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            _, unknown, name = str(error).partition("unexpected keyword argument '")
            near = near_matches(name.rstrip("'"), list(signature.parameters)) if unknown else ""
            raise ConfigError(f"{error}{near}", where=_called(function, args)) from error
        check_arguments(function, bound.arguments, where=_called(function, args))
        return function(*args, **kwargs)

    return call


def _called(function: Callable[..., Any], args: Sequence[Any]) -> str:
    """The name of a function as its caller knows it: a method is that of the object's class."""
    if args and next(iter(inspect.signature(function).parameters), "") in ("self", "cls"):
        owner = args[0] if isinstance(args[0], type) else type(args[0])
        return f"{owner.__qualname__}.{function.__name__}()"
    return f"{function.__qualname__}()"


def check_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], *, where: str | None = None
) -> None:
    """Check values by name against the annotations of a function or of a class's constructor."""
    function = inspect.unwrap(function)
    values = {name: value for name, value in values.items() if name in _named(function)}
    try:
        _adapter(function).validate_python({name: _plain(v) for name, v in values.items()})
    except ValidationError as error:
        # Of a union every member has its say.
        expected: dict[str, dict[str, None]] = {}
        for item in error.errors(include_url=False, include_context=False):
            message = str(item["msg"]).removeprefix("Input should be ")
            expected.setdefault(str(item["loc"][0]), {})[message] = None
        problems = "; ".join(
            f"{name}: {shown_value(values[name])} given, expected {' or '.join(allowed)}"
            for name, allowed in expected.items()
        )
        raise ConfigError(problems, where=where or f"{function.__qualname__}()") from error


def check_settings(function: Callable[..., Any], values: Mapping[str, Any], *, where: str) -> None:
    """Check a settings file whose keys are the arguments of a constructor: all there, none else."""
    parameters = _named(function)
    for name in values:
        if name not in parameters:
            hint = near_matches(name, list(parameters))
            raise ConfigError(f"{name}: unknown key{hint}", where=where)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in values
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing, and without a default", where=where)
    check_arguments(function, values, where=where)


def _named(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind not in fixed}


@functools.cache
def _adapter(function: Callable[..., Any]) -> TypeAdapter[Any]:
    home: Any = function
    if isinstance(function, type) and not issubclass(function, tuple):  # a NamedTuple's own
        home = getattr(function, "__init__")  # noqa: B009  # mypy: unsound on an instance
    hints = get_type_hints(home, include_extras=True)
    for name, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            # Or a mapping of the same keys would do.
            hints[name] = InstanceOf[hint]  # type: ignore[misc, valid-type]
    unchecked = _named(function).keys() - hints.keys() - {"self", "cls"}
    assert not unchecked, f"{function.__qualname__}: {unchecked} without a type"
    # self is an extra key, and those are let through.
    allowed = {name: NotRequired[hints[name]] for name in _named(function) if name in hints}
    arguments = TypedDict("arguments", allowed)  # type: ignore[misc]
    return TypeAdapter(with_config(_STRICT)(arguments))


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, which strict types ask for."""
    is_scalar = getattr(value, "ndim", None) == 0 and type(value).__module__ == "numpy"
    return value.item() if is_scalar else value


def near_matches(key: str, names: Sequence[str]) -> str:
    """The rest of a sentence about an unknown key: its near matches, or all that is known."""
    if matches := difflib.get_close_matches(key, names, n=2, cutoff=0.6):
        return f", did you mean {' or '.join(matches)}?"
    return f", known here: {', '.join(names)}" if names else ""


def kind_of(value: Any) -> str:
    """What a value is, in words of YAML and JSON."""
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "empty" if value is None else f"a number ({value})")


def shown_value(value: Any) -> str:
    """A value as an error shows it, in at most 60 characters."""
    if isinstance(value, dict | list):
        return kind_of(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
