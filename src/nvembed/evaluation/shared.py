"""One encoder made of several processes, each with the model and a GPU where there are some.

In: texts; out: their vectors, each process having embedded a share of every call. So any task is
shared, however large its corpus is and whoever scores it, and the caller sees one encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from nvembed.core.dtypes import Precision
from nvembed.core.reporting import release_notes
from nvembed.encoding.embed import InputType, encode_window
from nvembed.encoding.encoder import Encoder
from nvembed.encoding.workers import Loader, process_pool, result_of

T = TypeVar("T")


class SharedEncoder:
    """See the module. A context manager: the processes end with the block.

    Args:
        model: folder or hub id.
        dtype: of the weights, ``None`` as saved.
        processes: how many.

    Raises:
        ModelError: the model cannot be loaded.
        UserError: a process died; raised by the call that needed it.
    """

    def __init__(self, model: str, dtype: Precision | None, processes: int) -> None:
        self._count = processes
        self._ending = ExitStack()
        self._pool = self._ending.enter_context(process_pool(processes, Loader(model, dtype)))
        try:
            self.dimension, self.max_seq_length = self.ask(_facts)
            release_notes()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def ask(self, question: Callable[[Encoder], T]) -> T:
        """Ask the encoder of one of the processes; question and answer go through a pipe."""
        return result_of(self._pool.submit(question))

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(texts, "query", task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(texts, "document", task)

    def _encode(
        self, texts: Sequence[str], input_type: InputType, task: str | None
    ) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        parts = []
        for rows in shares(texts, self._count):
            mine = [texts[row] for row in rows]
            ask = partial(encode_window, texts=mine, side=input_type, task=task)
            parts.append((rows, self._pool.submit(ask)))
        for rows, part in parts:
            vectors[rows] = result_of(part)
        return vectors


def shares(texts: Sequence[str], count: int) -> list[list[int]]:
    """Deal the rows of texts into up to ``count`` shares: as many texts, much the same length."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    return [part for start in range(count) if (part := rows[start::count])]


def _facts(encoder: Encoder) -> tuple[int, int | None]:
    return encoder.dimension, getattr(encoder, "max_seq_length", None)
