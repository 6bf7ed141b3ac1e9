"""The server against requests made from its own OpenAPI document: no 5xx but 503, as documented."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from serving_fakes import HeldEngine, make_config, running

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (extra dev)")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    import nvembed.model.encoding  # noqa: F401  # as in a server that has a real model

    with running(HeldEngine(), make_config(limits={"max_texts": 8})) as made:
        yield made


def fuzz(port: int, examples: int, expected: set[int]) -> set[int]:
    """Send generated requests to every route; returns the statuses that came back."""
    address = f"http://127.0.0.1:{port}"
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    seen: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        statuses = seen.setdefault(operation.path, set())
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            test = given(case=operation.as_strategy(generation_mode=mode))(
                checked(address, statuses)
            )
            quiet = settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            with contextlib.suppress(Unsatisfiable):  # without parameters none can be wrong
                quiet(test)()
    posted = {path for path, methods in schema.raw_schema["paths"].items() if "post" in methods}
    assert len(posted) > 8
    for path in posted - {"/tokenize"}:
        assert expected <= seen[path], (path, seen[path])
    assert expected - {200} <= seen["/tokenize"]  # the fake model has no tokenizer
    return set().union(*seen.values())


def checked(address: str, statuses: set[int]):
    """Build a test of one case."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    def send(case) -> None:
        answer = case.call(base_url=address, timeout=20)
        statuses.add(answer.status_code)
        wanted = [checks.content_type_conformance, checks.response_schema_conformance]
        if answer.status_code != 503:  # a text that the fake model fails on
            wanted.append(not_a_server_error)
        case.validate_response(answer, checks=wanted)

    return send


def quiet_fuzz(port: int, examples: int, expected: set[int]) -> set[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuzz(port, examples, expected)


def test_fuzz_briefly(port: int) -> None:
    assert quiet_fuzz(port, 3, {400}) <= {200, 400, 404, 405, 413, 415, 503}


@pytest.mark.slow
def test_fuzz_long(port: int) -> None:
    assert quiet_fuzz(port, 150, {200, 400}) <= {200, 400, 404, 405, 413, 415, 503}
