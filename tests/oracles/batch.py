"""The contrastive batch by definition: every query is held against every document, in loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PromptedText = tuple[str, str]


@dataclass
class PlainBatch:
    texts: set[PromptedText]
    queries: list[PromptedText]
    documents: list[PromptedText]
    positives: list[PromptedText]
    negatives: list[set[PromptedText]]


def prompted(text: str, instruction: str | None) -> PromptedText:
    return (f"Instruct: {instruction}\nQuery: " if instruction else "", text)


def plain_batch(examples: Sequence[Any], *, in_batch: bool, same_source_only: bool) -> PlainBatch:
    queries = [prompted(example.query, example.instruction) for example in examples]
    positives = [_document(example, example.positive) for example in examples]
    documents: list[PromptedText] = []
    for example in examples:
        for text in (example.positive, *example.negatives):
            if _document(example, text) not in documents:
                documents.append(_document(example, text))
    negatives = []
    for example in examples:
        mine = set()
        for document in documents:
            is_own = any(document == _document(example, text) for text in example.negatives)
            is_offered = in_batch and (
                not same_source_only
                or any(_brought(other, document) for other in examples if _akin(other, example))
            )
            if (is_own or is_offered) and not _may_answer(document, example, examples):
                mine.add(document)
        negatives.append(mine)
    return PlainBatch(set(queries) | set(documents), queries, documents, positives, negatives)


def _document(example: Any, text: str) -> PromptedText:
    return prompted(text, example.instruction if example.symmetric else None)


def _brought(example: Any, document: PromptedText) -> bool:
    return any(
        document == _document(example, text) for text in (example.positive, *example.negatives)
    )


def _akin(one: Any, other: Any) -> bool:
    return bool(one.dataset == other.dataset)


def _may_answer(document: PromptedText, example: Any, examples: Sequence[Any]) -> bool:
    _, text = document
    if text == example.query or text == example.positive or text in example.known_positives:
        return True
    if example.label is None:
        return False
    for other in examples:
        if other.dataset != example.dataset:
            continue
        if other.label == example.label and document == _document(other, other.positive):
            return True
        for negative, label in zip(other.negatives, other.negative_labels, strict=False):
            if label == example.label and document == _document(other, negative):
                return True
    return False
