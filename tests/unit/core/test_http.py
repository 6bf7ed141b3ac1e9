"""What a request that comes to nothing means: try again, when, or not at all."""

from __future__ import annotations

from email.utils import formatdate

import httpx2
import pytest

from nvembed.core.errors import ConfigError
from nvembed.core.http import pause, read_key, retry_after, trouble_of

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.25", 0.25),
        ("-3", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, NOW) == seconds


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_passes_and_what_is_final(status: int) -> None:
    found = trouble_of(httpx2.Response(status, headers={"Retry-After": "3"}), None)
    assert found is not None
    assert (found.problem, found.asked, found.refused) == (f"status {status}", 3.0, None)
    for final in (301, 400, 401, 404, 422):
        found = trouble_of(httpx2.Response(final), None)
        assert found is not None
        assert found.refused == final
    assert trouble_of(httpx2.Response(200), None) is None


def test_pauses_double_up_to_a_minute_unless_the_endpoint_says() -> None:
    assert [pause(attempt, 0.5, None) for attempt in range(9)] == [
        *(0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        *(60.0, 60.0),
    ]
    assert pause(8, 0.5, 0.25) == 0.25


def test_what_an_endpoint_says_is_shown_without_the_key() -> None:
    response = httpx2.Response(401, text="  wrong\nkey sk-secret-1  " + "x" * 500)
    found = trouble_of(response, "sk-secret-1")
    assert found is not None
    assert found.said.startswith("wrong key …")
    assert len(found.said) == 200
    long = httpx2.Response(429, headers={"Retry-After": "1000"})
    found = trouble_of(long, None)
    assert found is not None
    assert found.problem == "status 429, asks to wait 1,000 s"


def test_the_key_is_the_first_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST", " ")
    monkeypatch.setenv("SECOND", " sk-one\n")
    assert read_key("FIRST", "SECOND") == "sk-one"
    assert read_key("FIRST") is None
    for value in ("two words", "umläut", "a\tb"):
        monkeypatch.setenv("FIRST", value)
        with pytest.raises(ConfigError, match="environment variable FIRST: holds blanks") as error:
            read_key("FIRST", "SECOND")
        assert value not in str(error.value)
