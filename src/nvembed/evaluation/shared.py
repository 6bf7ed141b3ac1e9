"""One encoder made of several processes, each with the model and a GPU where there are some.

In: texts; out: their vectors, each process having embedded a share of every call. So any task is
shared, however large its corpus is and whoever scores it, and the caller sees one encoder.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.inference.encoding import Side
from nvembed.inference.protocol import Encoder
from nvembed.model.settings import Precision

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
        context = multiprocessing.get_context("spawn")
        ranks = context.Queue()
        for rank in range(processes):
            ranks.put(rank)
        self._count = processes
        self._pool = ProcessPoolExecutor(
            processes, context, _start, (model, dtype, processes, ranks)
        )
        try:
            self.dimension, self.max_seq_length = self.ask(_facts)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: Callable[[Encoder], T]) -> T:
        """Ask the encoder of one of the processes; question and answer go through a pipe."""
        with _death_told():
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
        with _death_told():
            parts = [
                (rows, self._pool.submit(_embed, [texts[row] for row in rows], side, task))
                for rows in shares(texts, self._count)
            ]
            for rows, part in parts:
                vectors[rows] = part.result()
        return vectors


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the evaluation died, perhaps for lack of memory",
            hint="Finished tasks are kept: run it again, with fewer --processes",
        ) from error


def shares(texts: Sequence[str], count: int) -> list[list[int]]:
    """Deal the rows of texts into up to ``count`` shares: as many texts, much the same length."""
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    return [part for start in range(count) if (part := rows[start::count])]


# --- in the processes -----------------------------------------------------------------------------

_load: Callable[[], Encoder] | None = None
_encoder: Encoder | None = None


def _start(model: str, dtype: Precision | None, count: int, ranks: Any) -> None:
    """Prepare a process; the model is loaded by its first job, whose error reaches the caller."""
    global _load
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["NVEMBED_PROGRESS"] = "0"
    rank = ranks.get()

    def load() -> Encoder:
        import torch

        from nvembed.inference.load import load_encoder

        if (gpus := torch.cuda.device_count()) > 0:
            torch.cuda.set_device(rank % gpus)
        else:
            torch.set_num_threads(max(torch.get_num_threads() // count, 1))
        return load_encoder(model, dtype)

    _load = load


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
