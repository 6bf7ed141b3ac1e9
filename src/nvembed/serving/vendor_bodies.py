"""Request bodies of Cohere and Jina: see ``bodies.py``."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from nvembed.serving.bodies import Body, InstructionFields, ModelField, optional
from nvembed.serving.service import CoherePurpose
from nvembed.serving.vectors import Dtype

CohereType = Dtype | Literal["base64"]


class CohereEmbedRequest(ModelField, InstructionFields):
    """The body of ``/v2/embed``: Cohere's fields for texts, and those of instructions."""

    texts: list[str] = Field(description="a list of texts")
    input_type: CoherePurpose = Field(
        description="'search_query', 'search_document', 'classification' or 'clustering'"
    )
    embedding_types: list[CohereType] | None = optional(
        "a list of 'float', 'int8', 'uint8', 'binary', 'ubinary' and 'base64', or null for 'float'"
    )
    output_dimension: int | None = optional("an integer from 1 to the model's width, or null", ge=1)
    truncate: Literal["END", "START", "NONE"] | None = optional(
        "'END' or 'START' (cut of long texts) or 'NONE' (these are refused)", "END"
    )


class RankDocument(Body):
    """A text with whatever else a client keeps with it."""

    model_config = ConfigDict(extra="allow")

    text: str


class RankRequest(ModelField, InstructionFields):
    """The body of ``/v1/rerank`` and ``/v2/rerank``: the fields that Jina and Cohere have both."""

    query: str = Field(description="a text")
    documents: list[str | RankDocument] = Field(
        description="a list of texts, or of objects that have a text"
    )
    top_n: int | None = optional("an integer from 1: so many results, or null for all", ge=1)
    return_documents: bool | None = optional(
        "a boolean: the document with each result; null is true for /v1/rerank alone"
    )
