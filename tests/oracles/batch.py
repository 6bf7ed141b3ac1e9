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
    weights: list[float]
    candidates: list[list[tuple[PromptedText, float | None]]]  # own documents with their scores


def prompted(text: str, instruction: str | None) -> PromptedText:
    return (f"Instruct: {instruction}\nQuery: " if instruction else "", text)


def plain_batch(examples: Sequence[Any], *, in_batch: bool, same_source_only: bool) -> PlainBatch:
    documents: list[PromptedText] = []
    for example in examples:
        for text in _own_texts(example):
            if _document(example, text) not in documents:
                documents.append(_document(example, text))
    batch = PlainBatch(set(documents), [], documents, [], [], [], [])
    for example in examples:
        against = set()
        for document in documents:
            is_own = any(document == _document(example, text) for text in example.negatives)
            is_offered = in_batch and (
                not same_source_only
                or any(_brought(other, document) for other in examples if _akin(other, example))
            )
            if (is_own or is_offered) and not _may_answer(document, example, examples):
                against.add(document)
        positives = [example.positive, *example.further_positives]
        for number, positive in enumerate(positives):
            query = prompted(example.query, example.instruction)
            batch.texts.add(query)
            batch.queries.append(query)
            batch.positives.append(_document(example, positive))
            batch.negatives.append(against)
            batch.weights.append(1 / len(positives))
            own = [(positive, example.positive_scores[number] if example.positive_scores else None)]
            for place, text in enumerate(example.negatives):
                if _document(example, text) in against and text not in example.negatives[:place]:
                    # Of one text twice the last score counts.
                    last = max(n for n, other in enumerate(example.negatives) if other == text)
                    scores = example.negative_scores
                    own.append((text, scores[last] if scores else None))
            batch.candidates.append([(_document(example, text), score) for text, score in own])
    return batch


def _own_texts(example: Any) -> list[str]:
    return [example.positive, *example.further_positives, *example.negatives]


def _document(example: Any, text: str) -> PromptedText:
    return prompted(text, example.instruction if example.symmetric else None)


def _brought(example: Any, document: PromptedText) -> bool:
    return any(document == _document(example, text) for text in _own_texts(example))


def _akin(one: Any, other: Any) -> bool:
    return bool(one.dataset == other.dataset)


def _may_answer(document: PromptedText, example: Any, examples: Sequence[Any]) -> bool:
    _, text = document
    if text == example.query or text in (example.positive, *example.further_positives):
        return True
    if text in example.known_positives:
        return True
    if example.label is None:
        return False
    for other in examples:
        if other.dataset != example.dataset:
            continue
        positives = [other.positive, *other.further_positives]
        if other.label == example.label and document in [_document(other, t) for t in positives]:
            return True
        for negative, label in zip(other.negatives, other.negative_labels, strict=False):
            if label == example.label and document == _document(other, negative):
                return True
    return False
