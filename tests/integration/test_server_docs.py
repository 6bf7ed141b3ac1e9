"""docs/server.md, run: every command, request and snippet in it, against a real server."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import nvembed.serving.server as serving_run
from nvembed.cli.main import run
from nvembed.model.encoder import load_encoder
from serving_fakes import running

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
PRINTED = {"openai": "2 1 16\n", "huggingface_hub": "2 2\n", "cohere": "1 1\n", "ollama": "2\n"}
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


SERVE = [words for block in blocks("bash") for words in commands(block)]
REQUESTS = [words for block in blocks("sh") for words in commands(block)]
SNIPPETS = blocks("python")


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path
) -> Iterator[list[dict[str, Any]]]:
    """What each serve command of the document would serve, in order."""
    place = tmp_path_factory.mktemp("server-docs")
    for name in ("MODEL", "SMALL"):
        shutil.copytree(tiny_decoder_dir, place / name)
    (place / "keys.txt").write_text("me:" + "k" * 20 + "\n")
    (place / "server.yaml").write_text("log_requests: false\n")
    seen: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place):
        patch.setattr(
            serving_run,
            "run_server",
            lambda engine, config, place, **rest: seen.append(
                {"of": (engine, config), "host": place[0], "port": place[1], **rest}
            ),
        )
        patch.setattr(
            serving_run, "bound_socket", lambda host, port: contextlib.nullcontext((host, port))
        )
        encoder = load_encoder(str(place / "MODEL"))  # once for all commands
        patch.setattr(serving_run, "load_encoder", lambda name, dtype: encoder)
        for words in SERVE:
            assert run(words[1:]) == 0
        yield seen


@pytest.fixture(scope="module")
def served(started: list[dict[str, Any]]) -> Iterator[str]:
    """The server of the first command; yields its address."""
    first = started[0]
    assert f"http://{first['host']}:{first['port']}" == ADDRESS
    with running(*first["of"], first["keys"]) as port:
        yield f"http://127.0.0.1:{port}"


def test_all_blocks_are_run_here() -> None:
    assert {words[0] for words in SERVE} == {"nvembed"}
    assert {words[0] for words in REQUESTS} == {"curl"}
    counts = len(SNIPPETS) + len(blocks("bash")) + len(blocks("sh"))
    assert DOCUMENT.count("\n```") == 2 * counts
    assert len(SERVE) == 4
    assert len(REQUESTS) == 1
    assert len(SNIPPETS) == len(PRINTED)


def test_every_command_serves_by_the_names_it_says(started: list[dict[str, Any]]) -> None:
    names = [config.model_name for config in (start["of"][1] for start in started)]
    assert names == ["docs", "MODEL", "MODEL", "MODEL"]
    assert started[0]["of"][1].model_aliases == ("MODEL",)
    assert [source.names for source in started[3]["sources"]] == [("MODEL",), ("small",)]
    assert "text-embedding-3-small" in started[1]["of"][1].model_aliases
    for start, has_keys in zip(started, (False, True, True, False), strict=True):
        assert (start["keys"] is not None) is has_keys


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_requests(served: str) -> None:
    for words in REQUESTS:
        command = [word.replace(ADDRESS, served) for word in words]
        done = subprocess.run([*command, "--silent"], capture_output=True, check=True)
        assert len(json.loads(done.stdout)["data"]) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets(
    served: str, snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = re.search(r"^from (\w+)", snippet)[1]
    pytest.importorskip(library)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # of the tests alone
    assert ADDRESS in snippet
    names: dict[str, Any] = {}
    exec(compile(snippet.replace(ADDRESS, served), "server.md", "exec"), names)
    if "client" in names:
        with names["client"]:  # which closes it
            pass
    assert capsys.readouterr().out == PRINTED[library]


def test_routes_and_settings_of_the_tables_exist(served: str) -> None:
    with urllib.request.urlopen(f"{served}/openapi.json", timeout=10) as answer:
        paths = json.load(answer)["paths"]
    for route, method in ((r, m) for r, methods in paths.items() for m in methods):
        assert f"`{route}`" in DOCUMENT or "{" in route, route
        if method != "post":
            continue
        body = paths[route][method]["requestBody"]["content"]["application/json"]["schema"]
        for field in body["properties"]:
            assert re.search(rf"`{field}\b", DOCUMENT) or field in ("user", "raw_scores"), field
