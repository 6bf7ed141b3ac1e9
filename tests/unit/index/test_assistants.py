"""The tools for assistants, called by the official client: in this process, and over stdio."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.core.files import write_jsonl
from nvembed.index.build import index_documents
from nvembed.index.database import Database
from nvembed.index.search import SearchOptions, search_database

mcp = pytest.importorskip("mcp", reason="needs the extra nvembed[mcp]")
from nvembed.index.assistants import assistant_server

LONG = "the sun " * 5000
ROWS = [
    {"id": "a", "text": "the moon turns around the earth", "year": 1999},
    {"id": "b", "text": "the moon is bright tonight", "year": 2010, "far": float("inf")},
    {"id": "c'd", "text": LONG, "year": 2020},
]
ENCODER = HashEncoder(64)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("assistants")
    write_jsonl(folder / "docs.jsonl", ROWS)
    index_documents(folder / "db", [folder / "docs.jsonl"], model=ENCODER, task="Find it")
    return Database.open(folder / "db")


def talk(server: Any, work: Callable[[Any], Awaitable[None]]) -> None:
    async def session() -> None:
        async with mcp.Client(server) as client:
            await work(client)

    asyncio.run(asyncio.wait_for(session(), 120))


async def call(client: Any, name: str, **arguments: Any) -> Any:
    answer = await client.call_tool(name, arguments)
    assert not answer.is_error, answer
    return json.loads(answer.content[0].text)


@pytest.mark.parametrize("hybrid", [False, True])
def test_hits_are_those_of_the_search(database: Database, hybrid: bool) -> None:
    async def work(client: Any) -> None:
        asked = {"top_k": 2, "where": "year > 2000", "hybrid": hybrid}
        found = (await call(client, "search", query="bright moon", **asked))["hits"]
        oracle = search_database(database, ENCODER, "bright moon", SearchOptions(**asked))
        assert [hit["id"] for hit in found] == [hit.id for hit in oracle] == ["b", "c'd"]
        assert [hit["cosine"] for hit in found] == [round(hit.cosine, 4) for hit in oracle]
        assert found[0]["text"] == ROWS[1]["text"]
        assert found[0]["fields"]["year"] == 2010
        assert "continues_at" not in found[0]
        assert (found[1]["text"], found[1]["continues_at"]) == (LONG[:1500], 1500)
        assert len((await call(client, "search", query="moon", where=" "))["hits"]) == 3

    talk(assistant_server(database, ENCODER), work)


def test_tools_say_documents_or_passages(database: Database, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Moon\n\nThe moon turns around the earth.\n")
    index_documents(tmp_path / "db", [tmp_path / "a.md"], model=ENCODER)
    for opened, told in (
        (database, ("Search the 3 documents of db", "Read a document by")),
        (Database.open(tmp_path / "db"), ("Search the 1 passages of db", "Read a passage by")),
    ):

        async def work(client: Any, told: tuple[str, ...] = told) -> None:
            tools = (await client.list_tools()).tools
            for tool, start in zip(tools, told, strict=True):
                assert tool.description.startswith(start)

        talk(assistant_server(opened, ENCODER), work)


def test_a_document_is_read_in_parts(database: Database) -> None:
    async def work(client: Any) -> None:
        whole, start = "", 0
        while start is not None:
            part = await call(client, "read", id="c'd", start=start)
            assert part["fields"] == {"year": 2020}
            whole, start = whole + part["text"], part.get("continues_at")
        assert whole == LONG

    talk(assistant_server(database, ENCODER), work)


def test_the_tools_say_what_they_take(database: Database) -> None:
    async def work(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools.keys() == {"search", "read"}
        assert "3 documents of db" in tools["search"].description
        assert "year (number)" in tools["search"].description
        properties = tools["search"].input_schema["properties"]
        assert properties.keys() == {"query", "where", "top_k", "hybrid"}
        assert all(tool.annotations.read_only_hint for tool in tools.values())

    talk(assistant_server(database, ENCODER), work)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("search", {}, "query: Field required"),
        ("search", {"query": " "}, "the query is empty"),
        ("search", {"query": "x", "where": "yeer > 3"}, "yeer"),
        ("search", {"query": "x", "where": "1=1; DROP TABLE documents"}, "cannot be read"),
        ("search", {"query": "x", "top_k": 0}, "top_k: Input should be greater"),
        ("search", {"query": "x", "top_k": "3", "limit": 3}, "limit: Extra inputs"),
        ("read", {"id": "z' OR 1=1"}, "no document"),
        ("read", {"id": 3}, "id: Input should be a valid string"),
        ("write", {}, "no tool 'write'; expected search or read"),
    ],
)
def test_mistakes_are_one_line(
    database: Database, name: str, arguments: dict[str, Any], told: str
) -> None:
    async def work(client: Any) -> None:
        answer = await client.call_tool(name, arguments)
        assert answer.is_error
        (content,) = answer.content
        assert told in content.text
        assert "\n" not in content.text

    talk(assistant_server(database, ENCODER), work)


@pytest.mark.slow
def test_the_command_over_stdio(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", ROWS[:2])
    command = ["index", str(tmp_path / "docs.jsonl"), "--to", str(tmp_path / "db")]
    assert run([*command, "--model", str(tiny_decoder_dir), "--dtype", "float32"]) == 0
    server = mcp.StdioServerParameters(
        command=sys.executable,
        args=["-m", "nvembed", "serve", str(tmp_path / "db"), "--mcp"],
        env=dict(os.environ),
    )

    async def work(client: Any) -> None:
        hits = (await call(client, "search", query="the moon is bright tonight"))["hits"]
        assert hits[0]["id"] == "b"
        assert (await call(client, "read", id="a"))["text"] == ROWS[0]["text"]

    talk(server, work)


def test_a_database_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path / "none"), "--mcp"]) == 2
    error = capsys.readouterr().err
    assert "no database" in error
    assert error.count("\n") == 1
