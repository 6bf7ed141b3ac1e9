"""How requests of Cohere are answered; each in the form that its own client reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nvembed.serving.handlers import Answer
from nvembed.serving.middleware import RequestContext
from nvembed.serving.service import Service
from nvembed.serving.vectors import as_rows
from nvembed.serving.vendor_bodies import CohereEmbedRequest, CohereType


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
