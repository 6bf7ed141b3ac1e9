from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pytest
from pydantic import Field

from nvembed.core.arguments import check_arguments, check_settings, checked
from nvembed.core.errors import ConfigError, UserError


class Thing:
    @checked
    def work(
        self,
        count: Annotated[int, Field(ge=1)],
        kind: Literal["a", "b"] = "a",
        *,
        share: float | None = None,
        place: str | Path = ".",
        anything: Any = None,
        **others: Any,
    ) -> tuple[Any, ...]:
        """What it was given."""
        return self, count, kind, share, place, anything, others


def test_what_the_signature_allows_is_handed_on_as_it_is() -> None:
    thing, numbers = Thing(), object()
    assert thing.work(1) == (thing, 1, "a", None, ".", None, {})
    given = thing.work(np.int64(3), "b", share=0.5, place=Path("x"), anything=numbers, other=2)
    assert given == (thing, 3, "b", 0.5, Path("x"), numbers, {"other": 2})
    assert isinstance(given[1], np.int64)
    assert Thing.work.__doc__ == "What it was given."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, r"Thing\.work\(\): count: 0 given, expected greater than or equal to 1"),
        ({"count": "3"}, 'count: "3" given, expected a valid integer'),
        ({"count": True}, "count: true given, expected a valid integer"),
        ({"count": 1, "kind": "c"}, "kind: \"c\" given, expected 'a' or 'b'"),
        (
            {"count": 1, "place": 4},
            "place: 4 given, expected a valid string or an instance of Path",
        ),
        (
            {"count": 1.5, "share": "x"},
            'count: 1.5 given, .*; share: "x" given, expected a valid n',
        ),
        ({}, "missing a required argument: 'count'"),
    ],
)
def test_what_it_does_not_allow_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Thing().work(**arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_told_its_near_match() -> None:
    @checked
    def work(count: int = 1) -> int:
        return count

    with pytest.raises(
        ConfigError, match="unexpected keyword argument 'cuont', did you mean count"
    ):
        work(cuont=2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="too many positional arguments"):
        work(1, 2)  # type: ignore[call-arg]


@dataclass
class Settings:
    width: Annotated[int, Field(ge=1)]
    name: str = "x"


class Pair(NamedTuple):
    width: Annotated[int, Field(ge=1)]
    name: str = "x"


@pytest.mark.parametrize("of", [Settings, Pair])
def test_settings_files(of: Any) -> None:
    check_settings(of, {"width": 3}, where="f.json")
    for values, message in (
        ({}, "f.json: width: missing"),
        ({"width": 3, "nmae": "y"}, "f.json: nmae: unknown key, did you mean name"),
        ({"width": "3"}, 'f.json: width: "3" given, expected a valid integer'),
        ({"width": 3, "name": None}, "f.json: name: null given, expected a valid string"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_settings(of, values, where="f.json")


def test_an_argument_without_a_type_would_not_be_checked() -> None:
    def work(count) -> None:  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(AssertionError, match=r"work: \{'count'\} without a type"):
        check_arguments(work, {"count": 1})


def test_an_error_is_one_line_whatever_was_given() -> None:
    assert "\n" not in str(UserError("a\nb", where="x\r\ny"))


def test_a_method_is_named_by_the_class_of_its_object() -> None:
    class Other(Thing):
        @classmethod
        @checked
        def made(cls, count: int) -> int:
            return count

    with pytest.raises(ConfigError, match=r"Other\.work\(\): count: 0 given"):
        Other().work(0)
    with pytest.raises(ConfigError, match=r"Other\.work\(\): missing a required argument"):
        Other().work()
    with pytest.raises(ConfigError, match=r"Other\.made\(\): count: \"1\" given"):
        Other.made("1")
