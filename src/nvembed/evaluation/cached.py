"""An encoder that keeps its vectors on disk, so that no text is embedded twice.

A file holds the vectors of the texts of one call and is named after the model's fingerprint, side,
instruction and those very texts: another model, length limit or number type never meets them. It is
written whole, by one process at a time; others that need it wait, and take it over from one that
died. So a task that was killed half way goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import DataError
from nvembed.inference.encoding import Side
from nvembed.inference.protocol import Encoder
from nvembed.mining.vectors import (
    SHARD_TEXTS,
    Batch,
    Vectors,
    shard_paths,
    shard_texts,
    write_shard,
)
from nvembed.mining.work import make_missing


class CachedEncoder:
    """Vectors from files where they are there, else from an encoder.

    Args:
        encoder: asked for what is missing.
        folder: of the files; made when the first is written.
        fingerprint: of the model and all its settings.
    """

    def __init__(self, encoder: Encoder, folder: Path, fingerprint: str) -> None:
        self._encoder = encoder
        self._folder = folder
        self._fingerprint = fingerprint

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._encoder.dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(texts, "query", task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(texts, "document", task)

    def _encode(self, texts: Sequence[str], side: Side, task: str | None) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        batch = Batch(texts, side, task, "encode")
        paths = shard_paths(batch, self._folder, self._fingerprint)
        make_missing(paths, self._maker(batch, paths))
        parts = list(Vectors(paths, SHARD_TEXTS))
        for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
            expected = (len(shard_texts(batch, number)), self.dimension)
            if part.shape != expected:
                raise DataError(
                    f"holds vectors of shape {part.shape}, the model gives {expected}",
                    where=str(path),
                    hint="The cache and the model disagree: delete the file",
                )
        return np.concatenate(parts)

    def _maker(self, batch: Batch, paths: Sequence[Path]) -> Callable[[int], None]:
        def make(number: int) -> None:
            texts = shard_texts(batch, number)
            write_shard(
                paths[number], texts, batch.side, batch.task, self._encoder, done=lambda _: None
            )

        return make
