"""Answers to requests of Cohere, Jina and Ollama, each in the form that its own client reads."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, cast

from nvembed.serving.engines import Cut, EmbedOptions
from nvembed.serving.handlers import Answer, ranking
from nvembed.serving.middleware import RequestContext
from nvembed.serving.service import Service
from nvembed.serving.vectors import as_rows
from nvembed.serving.vendor_bodies import (
    CohereEmbedRequest,
    CohereType,
    OllamaEmbedRequest,
    OllamaFields,
    OllamaOptions,
    OllamaPromptRequest,
    OllamaShowRequest,
    RankRequest,
)


async def cohere_embed(
    service: Service, body: CohereEmbedRequest, context: RequestContext
) -> Answer:
    """Answer ``/v2/embed``: the vectors in every type that was asked for."""
    cut = cast(Cut, (body.truncate or "END").lower())
    options = service.options_for(body.input_type, body.given_instruction(), cut)
    vectors = await service.vectors(body.texts, options, body.output_dimension, context)
    types: Collection[CohereType] = dict.fromkeys(body.embedding_types or ["float"])
    found = {
        name: as_rows(vectors, packed=True) if name == "base64" else as_rows(vectors, name)
        for name in types
    }
    answer = {
        "id": context.request_id,
        "response_type": "embeddings_by_type",
        "embeddings": found,
        "texts": body.texts,
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": context.tokens},
        },
    }
    return answer, vectors.size * len(types)


async def rank(service: Service, body: RankRequest, context: RequestContext) -> Answer:
    """Answer ``/v1/rerank`` (Jina's, and Cohere's older one) and ``/v2/rerank`` (Cohere's)."""
    documents = [{"text": d} if isinstance(d, str) else d.model_dump() for d in body.documents]
    texts = [document["text"] for document in documents]
    asked = body.query, body.given_instruction()
    ranked = (await ranking(service, asked, texts, "end", context))[: body.top_n]
    wanted = body.return_documents
    if wanted is None:
        wanted = context.path.startswith("/v1")
    results = [
        {"index": row, "relevance_score": score} | ({"document": documents[row]} if wanted else {})
        for row, score in ranked
    ]
    answer = {
        "id": context.request_id,
        "model": body.model or service.model_name,
        "object": "list",
        "results": results,
        "usage": {"total_tokens": context.tokens},
        "meta": {"api_version": {"version": context.path[2]}},
    }
    return answer, len(results)


# --- Ollama ---------------------------------------------------------------------------------------

LATEST = ":latest"  # of Ollama, a name without a version is this one


async def ollama_embed(
    service: Service, body: OllamaEmbedRequest, context: RequestContext
) -> Answer:
    """Answer ``/api/embed``."""
    cut: Cut = "none" if body.truncate is False else "end"
    options = _ollama_options(service, body, cut)
    vectors = await service.vectors(body.input, options, body.dimensions, context)
    answer = {
        "model": body.model or service.model_name,
        "embeddings": as_rows(vectors),
        "total_duration": int((time.perf_counter() - context.start) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": context.tokens,
    }
    return answer, vectors.size


async def ollama_prompt(
    service: Service, body: OllamaPromptRequest, context: RequestContext
) -> Answer:
    """Answer ``/api/embeddings``."""
    options = _ollama_options(service, body, "end")
    vectors = await service.vectors(body.prompt, options, None, context)
    return {"embedding": as_rows(vectors)[0]}, vectors.size


def _ollama_options(service: Service, body: OllamaFields, cut: Cut) -> EmbedOptions:
    given = body.options or OllamaOptions()
    return service.read_options(
        instruction=given.given_instruction(),
        prompt_name=given.prompt_name,
        input_type=given.input_type,
        cut=cut,
    )


async def ollama_show(service: Service, body: OllamaShowRequest, context: RequestContext) -> Answer:
    """Answer ``/api/show``."""
    engine = service.engine
    about = {
        "general.architecture": "nvembed",
        "nvembed.context_length": engine.max_tokens,
        "nvembed.embedding_length": engine.dimension,
        "nvembed.pooling_type": engine.pooling,
    }
    details = _details(engine.dtype)
    return {"details": details, "model_info": about, "capabilities": ["embedding"]}, len(about)


def ollama_tags(names: Sequence[str]) -> dict[str, Any]:
    """Answer ``/api/tags``, the list of models; what only a loaded model knows is left empty."""
    return {
        "models": [
            {"name": name, "model": name, "size": 0, "digest": "", "details": _details("")}
            for name in names
        ]
    }


def _details(dtype: str) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": "nvembed",
        "families": ["nvembed"],
        "parameter_size": "",
        "quantization_level": dtype,
    }
