"""A database for assistants: a server of the Model Context Protocol (MCP) with two tools.

It speaks over standard input and output, on which nothing else may be printed. What an assistant
does wrong is one line that it can read, as ``isError`` of the tool's answer.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import CallToolResult, ListToolsResult, TextContent, Tool, ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvembed.core import __version__
from nvembed.core.errors import DataError, UserError
from nvembed.index.database import Database
from nvembed.index.fields import describe, plain
from nvembed.index.search import SearchOptions, search_database
from nvembed.model.encoder import Encoder

_SHOWN_CHARS = 1500  # of a hit
_READ_CHARS = 20_000  # of one reading


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SearchArguments(_Arguments):
    """Arguments of the tool ``search``; see ``SearchOptions``."""

    query: str = Field(min_length=1, max_length=10_000, description="what to look for, in words")
    where: str | None = Field(default=None, description="a filter of fields, as SQL writes it")
    top_k: int = Field(default=10, ge=1, le=50, description="number of hits, 1 to 50")
    hybrid: bool = Field(default=False, description="by words as well: for names and exact terms")


class ReadArguments(_Arguments):
    """Arguments of the tool ``read``."""

    id: str = Field(description="the id of a hit")
    start: int = Field(default=0, ge=0, description="the first character that is wanted")


_ARGUMENTS: dict[str, type[_Arguments]] = {"search": SearchArguments, "read": ReadArguments}


def assistant_server(database: Database, encoder: Encoder) -> Server[Any]:
    """Build the server of a database; ``serve_assistant`` runs it."""
    one_at_a_time = asyncio.Lock()
    tools = {"search": partial(_search, database, encoder), "read": partial(_read, database)}

    async def list_tools(context: Any, parameters: Any) -> ListToolsResult:
        return ListToolsResult(tools=_described(database))

    async def call_tool(context: Any, parameters: Any) -> CallToolResult:
        try:
            if parameters.name not in tools:
                raise DataError(f"no tool {parameters.name!r}", expected=" or ".join(tools))
            given = _ARGUMENTS[parameters.name].model_validate(parameters.arguments or {})
            async with one_at_a_time:
                found = await asyncio.to_thread(tools[parameters.name], given)
        except ValidationError as error:
            return _text(_told(error), is_error=True)
        except UserError as error:
            return _text(str(error), is_error=True)
        return _text(json.dumps(found, ensure_ascii=False, allow_nan=False))

    return Server(
        f"nvembed {database.path.name}",
        version=__version__,
        instructions="Search documents by meaning, then read those that matter by their ids.",
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def serve_assistant(database: Database, encoder: Encoder) -> None:
    """Answer an assistant over standard input and output until it closes them."""
    server = assistant_server(database, encoder)

    async def run() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    asyncio.run(run())


def _described(database: Database) -> list[Tool]:
    fields = ", ".join(f"{name} ({describe(type)})" for name, type in database.filterable.items())
    unit = database.unit
    search = (
        f"Search the {database.count()} {unit}s of {database.path.name} by meaning. The hits, "
        f"best first, have an id, a text (the first {_SHOWN_CHARS} characters), fields. A filter "
        f"in `where`, such as \"year > 2000 AND lang = 'en'\", may name: {fields}."
    )
    read = f"Read a {unit} by its id: all fields, and {_READ_CHARS} characters from `start` on."
    reading = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    return [
        Tool(
            name=name,
            description=told,
            input_schema=_ARGUMENTS[name].model_json_schema(),
            annotations=reading,
        )
        for name, told in (("search", search), ("read", read))
    ]


def _search(database: Database, encoder: Encoder, given: SearchArguments) -> dict[str, Any]:
    where = given.where if given.where and given.where.strip() else None
    database.count(where)  # checks the filter before anything is embedded
    options = SearchOptions(top_k=given.top_k, where=where, hybrid=given.hybrid)
    hits = search_database(database, encoder, given.query, options)
    return {
        "hits": [
            {
                "id": hit.id,
                "cosine": round(hit.cosine, 4),
                **_part(hit.text, 0, _SHOWN_CHARS),
                "fields": plain(hit.fields),
            }
            for hit in hits
        ]
    }


def _read(database: Database, given: ReadArguments) -> dict[str, Any]:
    found = database.get("id", [given.id])
    if not found:
        raise DataError(f"no document {given.id!r}", where="read", expected="the id of a hit")
    (row,) = found
    part = _part(row["text"], given.start, _READ_CHARS)
    return {"id": given.id, **part, "fields": plain(row["fields"])}


def _part(text: str, start: int, length: int) -> dict[str, Any]:
    """A part of a text, and where the rest begins if it has one."""
    end = start + length
    return {"text": text[start:end]} | ({"continues_at": end} if end < len(text) else {})


def _told(error: ValidationError) -> str:
    """Say all that is wrong with arguments, in one line."""
    problems = error.errors(include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems)


def _text(text: str, *, is_error: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=is_error)
