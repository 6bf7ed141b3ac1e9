"""Prompts, settings and the command of a synthesis."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chat_endpoint import fake_endpoint
from nvembed.building.synthesis.prompts import (
    EXAMPLE_KINDS,
    VERSION,
    ExampleKind,
    SynthesisConfig,
    example_prompt,
    tasks_prompt,
)
from nvembed.cli.main import run


@pytest.mark.parametrize("kind", EXAMPLE_KINDS)
def test_prompts_are_pure_functions_and_differ(kind: ExampleKind) -> None:
    prompts = [tasks_prompt(kind, 20, 0, number) for number in range(50)]
    assert prompts == [tasks_prompt(kind, 20, 0, number) for number in range(50)]
    assert len(set(prompts)) == 50
    assert tasks_prompt(kind, 20, 1, 0) != prompts[0]
    assert all("20 different" in prompt and '{"tasks": [' in prompt for prompt in prompts)
    examples = [example_prompt(kind, "Find X", 0, number) for number in range(20)]
    assert examples == [example_prompt(kind, "Find X", 0, number) for number in range(20)]
    assert len(set(examples)) == 20
    for prompt in examples:
        assert "Here is a task: Find X\n" in prompt
        assert all(f'- "{key}": ' in prompt for key in ("query", "positive", "negative"))
        assert "{query_length}" not in prompt


def test_the_words_are_those_of_their_version() -> None:
    """A journal goes on with the prompts that it was begun with: others need another VERSION."""
    asked = [tasks_prompt(kind, 20, 0, n) for kind in EXAMPLE_KINDS for n in range(50)]
    asked += [example_prompt(kind, "$x {y}", 0, n) for kind in EXAMPLE_KINDS for n in range(50)]
    digest = hashlib.sha256("".join(asked).encode()).hexdigest()
    assert (VERSION, digest[:16]) == (1, "267e81ceb952a3de")


def test_kinds_ask_for_different_things() -> None:
    assert len({tasks_prompt(kind, 5, 0, 0) for kind in EXAMPLE_KINDS}) == 3
    assert len({example_prompt(kind, "x", 0, 0).split("Rules")[0] for kind in EXAMPLE_KINDS}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "localhost:8000"},
        {"endpoint": "ftp://host/v1"},
        {"endpoint": "https://me:secret@host/v1"},
        {"endpoint": "https://host/v1?key=secret"},
        {"key_variable": "sk-secret"},
        {"kinds": ()},
        {"tasks": 0},
        {"requests_per_minute": 0},
        {"unknown": 1},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SynthesisConfig(**({"endpoint": "http://host/v1", "model": "m"} | change))
    config = SynthesisConfig(endpoint="http://host/v1/chat/completions", model="m")
    assert config.endpoint == "http://host/v1"


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("httpx2")
    monkeypatch.setenv("NO_PROXY", "*")
    with fake_endpoint() as fake:
        command = ["data", "synthesize", str(tmp_path), "--endpoint", fake.url, "--model", "m"]
        assert run([*command, "tasks=4", "tasks_per_request=2", "examples_per_task=1"]) == 0
    out = capsys.readouterr().out
    counts = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in counts] == [
        *([kind, "4", "0", "4", "0", "0"] for kind in EXAMPLE_KINDS),
        ["all", "12", "0", "12", "0", "0"],
    ]
    assert "tokens: 180 in prompts, 90 in answers; cost unknown" in out
    assert f"written: {tmp_path}/examples.jsonl" in out
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [
        kind for kind in EXAMPLE_KINDS for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "http://me:hidden@host/v1"], "--endpoint: holds a name, a password"),
        (["--endpoint", "hidden"], "--endpoint: is no address"),
        (
            ["--endpoint", "http://host/v1", "--key-variable", "sk-hidden"],
            "--key-variable: is no name of an environment variable",
        ),
    ],
)
def test_misplaced_secrets_are_not_shown(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "synthesize", str(tmp_path / "x"), "--model", "m", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hidden" not in error
    assert not (tmp_path / "x").exists()


def test_without_the_library_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    command = ["data", "synthesize", str(tmp_path), "--endpoint", "http://host/v1", "--model", "m"]
    assert run(command) == 2
    assert "pip install 'nvembed[synth]'" in capsys.readouterr().err
