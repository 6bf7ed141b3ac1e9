"""Request bodies of Cohere, Jina and Ollama: see ``bodies.py``."""

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


class OllamaOptions(InstructionFields):
    """The free fields of Ollama: ours are read, those of its own engine mean nothing here."""

    model_config = ConfigDict(extra="ignore")

    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None


class OllamaFields(ModelField):
    """What all requests to embed have."""

    options: OllamaOptions | None = optional(
        "an object; instruction, task, prompt_name and input_type are read, as in /v1/embeddings"
    )
    keep_alive: float | str | None = optional("a number or a text; it is not used")


class OllamaEmbedRequest(OllamaFields):
    """The body of ``/api/embed``."""

    input: str | list[str] = Field(description="a text or a list of texts")
    truncate: bool | None = optional("a boolean; false refuses texts that are too long", True)
    dimensions: int | None = optional("an integer from 1 to the model's width, or null", ge=1)


class OllamaPromptRequest(OllamaFields):
    """The body of ``/api/embeddings``, the older route for one text."""

    prompt: str = Field(description="a text")


class OllamaShowRequest(ModelField):
    """The body of ``/api/show``."""

    verbose: bool | None = optional("a boolean; it is not used")
