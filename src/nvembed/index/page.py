"""A web page to search a database: HTML and JSON answers; nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import threading
import time
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from nvembed.core.errors import UserError
from nvembed.data.instructions import all_instructions
from nvembed.index.database import Database
from nvembed.index.fields import describe, plain
from nvembed.index.passages import PLACE_FIELDS, place_of
from nvembed.index.search import Found, SearchOptions, find, map_of, query_vector
from nvembed.index.where import MAX_CHARS
from nvembed.model.encoder import Encoder

_SHOWN_CHARS = 4000
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class SearchRequest(BaseModel):
    """A search: see ``SearchOptions``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Annotated[str, Field(max_length=10_000)]
    task: Annotated[str | None, Field(max_length=2_000)] = None
    where: Annotated[str | None, Field(max_length=MAX_CHARS)] = None
    top_k: Annotated[int, Field(ge=1, le=200)] = 20
    hybrid: bool = False


def page_app(database: Database, encoder: Encoder) -> FastAPI:
    """Build the page of a database: ``/``, ``/api/about`` and ``/api/search``."""
    app = FastAPI(title="nvembed search", docs_url=None, redoc_url=None, openapi_url=None)
    html = resources.files("nvembed.index").joinpath("page.html").read_text(encoding="utf-8")
    encoding = threading.Lock()  # one request at a time

    @app.middleware("http")
    async def guard(request: Request, answer: Any) -> Any:
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error), "where": error.where}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return html

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        return _about(database)

    @app.post("/api/search")
    def search(request: SearchRequest) -> dict[str, Any]:
        if not request.query.strip():
            raise UserError("the query is empty", where="query", expected="a text")
        where = request.where if request.where and request.where.strip() else None
        started = time.perf_counter()
        passing = database.count(where)  # checks the filter before anything is embedded
        with encoding:
            vector = query_vector(database, encoder, request.query, request.task)
        embedded = time.perf_counter()
        options = SearchOptions(top_k=request.top_k, where=where, hybrid=request.hybrid)
        hits = find(database, request.query, vector, options)
        found = time.perf_counter()
        places = map_of(np.stack([vector, *(hit.vector for hit in hits)])).tolist()
        return {
            "hits": [_hit(hit, place) for hit, place in zip(hits, places[1:], strict=True)],
            "query": places[0],
            "passing": passing,
            "encode_ms": 1000 * (embedded - started),
            "search_ms": 1000 * (found - embedded),
        }

    return app


def _about(database: Database) -> dict[str, Any]:
    return database.record.model_dump(include={"model", "dimension", "task"}) | {
        "name": database.path.name,
        "count": database.count(),
        "unit": database.unit,
        "approximate": database.approximate,
        "words": database.has_words,
        "fields": {name: describe(type) for name, type in database.filterable.items()},
        "tasks": {
            task.name: {"type": task.type, "instruction": task.instruction}
            for task in all_instructions().values()
            if task.type == "Retrieval"
        },
    }


def _hit(hit: Found, place: list[float]) -> dict[str, Any]:
    as_it_is = ("rank", "id", "cosine", "words", "fused")
    source = place_of(hit.id, hit.fields)
    told = PLACE_FIELDS if source else ()
    return {name: getattr(hit, name) for name in as_it_is} | {
        "source": source,
        "text": hit.text[:_SHOWN_CHARS],
        "cut": len(hit.text) > _SHOWN_CHARS,
        "fields": {n: _shown(plain(value)) for n, value in hit.fields.items() if n not in told},
        "place": place,
    }


def _shown(value: Any) -> Any:
    """A value that a browser does not change: it rounds whole numbers from 2^53 on."""
    big = isinstance(value, int) and abs(value) >= 2**53
    return value if isinstance(value, bool | int | float | str) and not big else json.dumps(value)
