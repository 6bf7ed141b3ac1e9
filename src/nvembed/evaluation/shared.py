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
from nvembed.encoding.bulk import Side
from nvembed.encoding.load import load_encoder
from nvembed.encoding.processes import death_told, process_pool
from nvembed.encoding.protocol import Encoder

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
        self._pool = self._ending.enter_context(process_pool(processes, _start, model, dtype))
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
        with death_told():
            return self._pool.submit(_answer, question).result()

    def encode_query(self, texts: Sequence[str], *, task: str | None = None) -> NDArray[np.float32]:
        """Embed queries; see :class:`Encoder`."""
        return self._encode(texts, "query", task)

    def encode_document(
        self, texts: Sequence[str], *, task: str | None = None
    ) -> NDArray[np.float32]:
        """Embed documents; see :class:`Encoder`."""
        return self._encode(texts, "document", task)

    def _encode(self, texts: Sequence[str], side: Side, task: str | None) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with death_told():
            parts = [
                (rows, self._pool.submit(_embed, [texts[row] for row in rows], side, task))
                for rows in shares(texts, self._count)
            ]
            for rows, part in parts:
                vectors[rows] = part.result()
        return vectors


def shares(texts: Sequence[str], count: int) -> list[list[int]]:
    """Deal the rows of texts into up to ``count`` shares: as many texts, much the same length."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    return [part for start in range(count) if (part := rows[start::count])]


# --- in the processes -----------------------------------------------------------------------------

_load: Callable[[], Encoder] | None = None
_encoder: Encoder | None = None


def _start(model: str, dtype: Precision | None) -> None:
    """Prepare a process; the model is loaded by its first job, whose error reaches the caller."""
    global _load
    _load = partial(load_encoder, model, dtype)


def _own_encoder() -> Encoder:
    global _encoder
    if _encoder is None:
        assert _load is not None
        _encoder = _load()
    return _encoder


def _answer(question: Callable[[Encoder], T]) -> T:
    return question(_own_encoder())


def _facts(encoder: Encoder) -> tuple[int, int | None]:
    return encoder.dimension, getattr(encoder, "max_seq_length", None)


def _embed(texts: Sequence[str], side: Side, task: str | None) -> NDArray[np.float32]:
    encoder = _own_encoder()
    encode = encoder.encode_query if side == "query" else encoder.encode_document
    return encode(texts, task=task)
