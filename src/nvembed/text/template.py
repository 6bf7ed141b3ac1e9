"""The template: what a query looks like before it is tokenised.

``Instruct: {instruction}\\nQuery: {text}`` for queries, the bare text for documents (paper s4;
symmetric tasks such as STS carry the instruction on both sides). The rendered part before the text
is called the *prompt*; it is what sentence-transformers calls so too, and everything downstream
takes a prompt. Next file: ``text/tokens.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Side = Literal["query", "document"]

PromptedText = tuple[str, str]  # (prompt, text)

QUERY_PROMPT = "Instruct: {instruction}\nQuery: "


def query_prompt(instruction: str | None) -> str:
    """Render the prompt of an instruction; no instruction gives the empty prompt.

    >>> query_prompt("Given a question, retrieve passages that answer the question")
    'Instruct: Given a question, retrieve passages that answer the question\\nQuery: '
    """
    if instruction is None or not instruction.strip():
        return ""
    return QUERY_PROMPT.replace("{instruction}", instruction.strip())


def side_prompt(
    prompts: Mapping[str, str | None], side: Side, default_name: str | None = None
) -> str:
    """Return a model's own prompt of a side, as encode_query and encode_document choose it.

    Args:
        prompts: of the model, by name.
        side: of the texts.
        default_name: the model's prompt where none is of that side.
    """
    names = ("query",) if side == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in prompts), default_name)
    return (prompts.get(name) or "") if name is not None else ""
