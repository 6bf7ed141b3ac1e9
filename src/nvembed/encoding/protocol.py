"""What evaluation, mining and search need of an embedding model, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring the rows of ``(N, D)`` to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def prompts_of(encoder: Encoder) -> Mapping[str, str | None]:
    """Return the prompts that were saved with a model, by name; none where it keeps none."""
    prompts: Mapping[str, str | None] | None = getattr(encoder, "prompts", None)
    return prompts or {}


class Encoder(Protocol):
    """Turns texts into unit vectors, one side at a time.

    ``NVEmbed``, any sentence-transformers model behind a thin wrapper and ``HashEncoder`` satisfy
    it. An encoder chooses its own order and batches (sorting by length, packing); rows come back in
    input order. One that has prompts of its own says so, see ``prompts_of``.

    A task is the name of an MTEB task or of a prompt of the model, or the instruction itself in
    plain words; ``nvembed.text.instructions.resolve_prompt`` makes it a prompt.
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
            task: see the class; ``None`` is no instruction.

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
            task: see the class; only for symmetric tasks, where documents get it as well.

        Returns:
            float32 of shape ``(len(texts), dimension)``, rows of length 1.
        """
        ...
