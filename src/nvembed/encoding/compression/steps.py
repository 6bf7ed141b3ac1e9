"""What each step of a compression left of a model: its size, its time, and how far vectors went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed.encoding.compression.recovery import instructions_of
from nvembed.model.bulk import encode_window
from nvembed.model.embedder import NVEmbed


class Step(NamedTuple):
    """The model after a step."""

    step: str  # what was made smaller; "whole" is the model as it came
    parameters: int
    bytes: int
    cosine: float  # mean to the whole model's vectors, of the held-out texts as documents
    queries: float  # the same of every other one as a query, with the model's instructions in turn
    seconds: float  # that the documents took


class Measured:
    """The whole model's vectors of texts that choose nothing, and what becomes of them.

    Queries have up to sixteen of the instructions that the model has now.
    """

    def __init__(self, model: NVEmbed, texts: Sequence[str]) -> None:
        self._documents, self._queries = texts, texts[::2]
        self._instructions = instructions_of(model)
        self._documents_ND, seconds = self._of_documents(model)
        self._queries_ND = self._of_queries(model)
        self.whole = self._row("whole", model, self._documents_ND, self._queries_ND, seconds)

    def after(self, step: str, model: NVEmbed) -> Step:
        """Measure the model after a step."""
        documents_ND, seconds = self._of_documents(model)
        return self._row(step, model, documents_ND, self._of_queries(model), seconds)

    def _of_documents(self, model: NVEmbed) -> tuple[NDArray[np.float32], float]:
        encode_window(model, self._documents[:8], side="document")  # the first texts take longer
        started = time.perf_counter()
        vectors_ND = encode_window(model, self._documents, side="document")
        return vectors_ND, time.perf_counter() - started

    def _of_queries(self, model: NVEmbed) -> NDArray[np.float32]:
        turns = len(self._instructions)
        parts = [
            encode_window(model, texts, side="query", task=instruction)
            for number, instruction in enumerate(self._instructions)
            if (texts := self._queries[number::turns])
        ]
        return np.concatenate(parts)

    def _row(
        self,
        step: str,
        model: NVEmbed,
        documents_ND: NDArray[np.float32],
        queries_ND: NDArray[np.float32],
        seconds: float,
    ) -> Step:
        weights = list(model.parameters())
        return Step(
            step,
            sum(weight.numel() for weight in weights),
            sum(weight.numel() * weight.element_size() for weight in weights),
            float((documents_ND * self._documents_ND).sum(axis=1).mean()),
            float((queries_ND * self._queries_ND).sum(axis=1).mean()),
            round(seconds, 3),
        )
