"""An encoder that notes what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hash_encoder import HashEncoder


class Counting(HashEncoder):
    """Counts and keeps what it is asked for."""

    def __init__(self, dimension: int = 64) -> None:
        super().__init__(dimension)
        self.asked: list[tuple[str, str, str | None]] = []

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> Any:
        self.asked += [("query", text, task) for text in texts]
        return super().encode_query(texts, task=task)

    def encode_document(self, texts: Sequence[str], *, task: str | None = None) -> Any:
        self.asked += [("document", text, task) for text in texts]
        return super().encode_document(texts, task=task)
