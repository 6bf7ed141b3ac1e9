"""An encoder without a model, for tests: hashed bags of words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nvembed.data.instructions import read_task

_WORD = re.compile(r"\w+")


class HashEncoder:
    """Deterministic bag-of-words vectors: every lower-cased word adds ±1 to one hashed coordinate.

    Equal texts give equal vectors on every machine and in every process (CRC-32, not ``hash``), and
    texts that share words are close. The instruction moves a vector a little, so that tests can see
    that it arrived.

    Args:
        dimension: width of the vectors.
        instruction_weight: weight of the instruction's own vector; 0 ignores instructions.
    """

    def __init__(self, dimension: int = 256, instruction_weight: float = 0.05) -> None:
        self._dimension = dimension
        self._instruction_weight = instruction_weight
        self._word_codes: dict[str, tuple[int, float]] = {}

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self._dimension

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries, with the instruction mixed in; see :class:`Encoder`."""
        return self._encode(texts, task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(texts, task)

    def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        task = read_task(task)
        vectors = np.zeros((len(texts), self._dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._unit_vector(text)
        if task and self._instruction_weight:
            vectors += self._instruction_weight * self._unit_vector(task)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _unit_vector(self, text: str) -> NDArray[np.float32]:
        vector = np.zeros(self._dimension, dtype=np.float32)
        for word in _WORD.findall(text.lower()):
            code = self._word_codes.get(word)
            if code is None:
                value = zlib.crc32(word.encode("utf-8"))
                code = (value // 2) % self._dimension, 1.0 if value % 2 else -1.0
                self._word_codes[word] = code
            vector[code[0]] += code[1]
        length = float(np.linalg.norm(vector))
        if length == 0.0:
            # No words, or words that cancel out: still a unit vector, as the protocol promises.
            vector[zlib.crc32(text.encode("utf-8")) % self._dimension] = 1.0
            return vector
        return vector / np.float32(length)
