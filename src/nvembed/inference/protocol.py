"""What evaluation, mining and search need of an embedding model, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring the rows of ``(N, D)`` to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


class Encoder(Protocol):
    """Turns texts into unit vectors, one side at a time.

    ``NVEmbed``, any sentence-transformers model behind a thin wrapper and ``HashEncoder`` satisfy
    it. An encoder chooses its own order and batches (sorting by length, packing); rows come back in
    input order.
    """

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        ...

    def encode_query(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed queries.

        Args:
            texts: the queries, without an instruction.
            task: the instruction in plain words; ``None`` is no instruction.

        Returns:
            float32 of shape ``(len(texts), dimension)``, rows of length 1.
        """
        ...

    def encode_document(
        self, texts: Sequence[str], /, *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents.

        Args:
            texts: the documents.
            task: the instruction, only for symmetric tasks, where documents get it as well.

        Returns:
            float32 of shape ``(len(texts), dimension)``, rows of length 1.
        """
        ...
