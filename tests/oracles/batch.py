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


def plain_batch(examples: Sequence[Any], *, in_batch: bool) -> PlainBatch:
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
            if (is_own or in_batch) and not _may_answer(document, example, examples):
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


def _may_answer(document: PromptedText, example: Any, examples: Sequence[Any]) -> bool:
    _, text = document
    for other in examples:
        if other.query == example.query:
            answers = (other.query, other.positive, *other.further_positives)
            if text in answers or text in other.known_positives:
                return True
    for other in examples:
        if other.dataset != example.dataset:
            continue
        for positive in (other.positive, *other.further_positives):
            if document == _document(other, positive) and _share(example, other.positive_labels):
                return True
        for negative, labels in zip(other.negatives, other.negative_labels, strict=False):
            if document == _document(other, negative) and _share(example, labels):
                return True
    return False


def _share(example: Any, labels: Sequence[str]) -> bool:
    return any(label in example.labels for label in labels)
