"""How requests of OpenAI and TEI are answered.

``/rerank`` gives the cosine of each text with the query: this is an embedding model, no
cross-encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nvembed.core import __version__
from nvembed.serving.bodies import (
    EmbedRequest,
    OpenAIRequest,
    RerankRequest,
    RootRequest,
    SimilarityParameters,
    SimilarityRequest,
    TokenizeRequest,
)
from nvembed.serving.engines import Cut
from nvembed.serving.middleware import RequestContext
from nvembed.serving.service import Inputs, Service
from nvembed.serving.vectors import as_rows

Answer = tuple[object, int]
"""What is rendered as JSON, and about how many numbers it has."""


async def embeddings(service: Service, body: OpenAIRequest, context: RequestContext) -> Answer:
    """Answer ``/v1/embeddings``."""
    instruction = body.given_instruction()
    if body.purpose is not None and body.input_type is None and body.prompt_name is None:
        options = service.options_for(body.purpose, instruction, body.cut)
    else:
        options = service.read_options(
            instruction=instruction,
            prompt_name=body.prompt_name,
            input_type="document" if body.input_type == "passage" else body.input_type,
            cut=body.cut,
        )
    width, (dtype, packed) = body.one_of("dimensions", "output_dimension"), body.form
    vectors = await service.vectors(body.input, options, width, context)
    rows = as_rows(vectors, dtype, packed=packed)
    data = [
        {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": context.tokens, "total_tokens": context.tokens}
    model = body.model or service.model_name
    return {"object": "list", "data": data, "model": model, "usage": usage}, vectors.size


async def embed(service: Service, body: EmbedRequest, context: RequestContext) -> Answer:
    """Answer ``/embed``."""
    options = service.read_options(
        instruction=body.given_instruction(),
        prompt_name=body.prompt_name,
        cut=body.cut,
        normalize=body.normalize is not False,
    )
    vectors = await service.vectors(body.inputs, options, body.dimensions, context)
    return as_rows(vectors, packed=body.encoding_format == "base64"), vectors.size


async def root(service: Service, body: RootRequest, context: RequestContext) -> Answer:
    """Answer ``/``: as ``/embed``, or as ``/similarity``."""
    other = body.as_similarity()
    return await (
        embed(service, body, context) if other is None else similarity(service, other, context)
    )


async def rerank(service: Service, body: RerankRequest, context: RequestContext) -> Answer:
    """Answer ``/rerank``."""
    asked = body.query, body.given_instruction()
    ranked = await ranking(service, asked, body.texts, body.cut, context)
    answer = [
        {"index": row, "score": score} | ({"text": body.texts[row]} if body.return_text else {})
        for row, score in ranked
    ]
    return answer, len(answer)


async def ranking(
    service: Service,
    asked: tuple[str, str | None],
    texts: list[str],
    cut: Cut,
    context: RequestContext,
) -> list[tuple[int, float]]:
    """Sort texts by the cosine with what is asked, a query and its instruction, nearest first."""
    text, instruction = asked
    query = service.read_options(instruction=instruction, input_type="query", cut=cut)
    documents = replace(query, input_type="document", task=None)
    vectors = await service.embed([(texts, documents), ([text], query)], context)
    scores = (vectors[:-1] @ vectors[-1]).astype(float)
    order = np.argsort(-scores, kind="stable")
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


async def similarity(service: Service, body: SimilarityRequest, context: RequestContext) -> Answer:
    """Answer ``/similarity``."""
    given, inputs = body.parameters or SimilarityParameters(), body.inputs
    options = service.read_options(prompt_name=given.prompt_name, cut=given.cut)
    parts: list[tuple[Inputs, Any]] = [
        (inputs.sentences, options),
        ([inputs.source_sentence], options),
    ]
    vectors = await service.embed(parts, context)
    return (vectors[:-1] @ vectors[-1]).tolist(), len(inputs.sentences)


async def tokenize(service: Service, body: TokenizeRequest, context: RequestContext) -> Answer:
    """Answer ``/tokenize``."""
    prompt = "" if body.prompt_name is None else service.named_prompt(body.prompt_name)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    special = body.add_special_tokens is not False
    rows = await service.tokens(texts, prompt, special, context)
    return rows, 8 * sum(map(len, rows))


async def info(service: Service, body: None, context: RequestContext) -> Answer:
    """Answer ``/info``: model and limits by the names that TEI has for them."""
    engine, limits = service.engine, service.config.limits
    answer = {
        "model_id": service.model_name,
        "model_sha": None,
        "model_dtype": engine.dtype,
        "model_type": {"embedding": {"pooling": engine.pooling}},
        "max_concurrent_requests": limits.max_requests,
        "max_input_length": engine.max_tokens,
        "max_batch_tokens": service.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.max_texts,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    return answer, len(answer)
