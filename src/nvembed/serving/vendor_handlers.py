"""How requests of Cohere and Jina are answered; each in the form that its own client reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nvembed.serving.handlers import Answer, ranking
from nvembed.serving.middleware import RequestContext
from nvembed.serving.service import Service
from nvembed.serving.vectors import as_rows
from nvembed.serving.vendor_bodies import CohereEmbedRequest, CohereType, RankRequest


async def cohere_embed(
    service: Service, body: CohereEmbedRequest, context: RequestContext
) -> Answer:
    """Answer ``/v2/embed``: the vectors in every type that was asked for."""
    cut: Any = (body.truncate or "END").lower()
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
