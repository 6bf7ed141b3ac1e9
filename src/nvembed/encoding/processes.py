"""Several processes, each with a model: on a GPU of its own where there are some.

Used by evaluation (shares of a call) and encoding (parts of an output).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nvembed.core.background import end_with_parent
from nvembed.core.dtypes import Precision
from nvembed.core.errors import UserError
from nvembed.core.reporting import release_notes
from nvembed.encoding.bulk import Way, prepare_window
from nvembed.encoding.load import load_encoder
from nvembed.encoding.parts import Part, Tally, Window, part_of, save_part
from nvembed.encoding.protocol import Encoder


@contextmanager
def process_pool(
    count: int, start: Callable[..., None], *given: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the machine, ended with the block; what waits then is dropped.

    Args:
        count: at least 1.
        start: is called once in each process, on its device.
        given: arguments of ``start``.

    Raises:
        UserError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    ranks = context.Queue()
    for rank in range(count):
        ranks.put(rank)
    pool = ProcessPoolExecutor(count, context, _start, (ranks, count, start, given))
    try:
        with death_told():
            yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def death_told() -> Iterator[None]:
    """Say in one line that a process of a pool died in the block, as a ``UserError``."""
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, perhaps for lack of memory",
            hint="What is finished is kept: run it again, with fewer --processes",
        ) from error


def _start(
    ranks: multiprocessing.Queue[int],
    count: int,
    start: Callable[..., None],
    given: tuple[Any, ...],
) -> None:
    import torch

    end_with_parent(lambda: os._exit(1))
    rank = ranks.get()
    if (gpus := torch.cuda.device_count()) > 0:
        torch.cuda.set_device(rank % gpus)
    else:
        torch.set_num_threads(max(torch.get_num_threads() // count, 1))
    os.environ["NVEMBED_PROGRESS"] = "0"
    start(*given)


@dataclass
class Worker:
    """Makes parts with a model that is loaded when the first is asked for.

    Its type was settled by the process that asks, so that all parts have one.
    """

    model: str
    dtype: Precision | None
    way: Way
    encoder: Encoder | None = None

    def embed(self, texts: Sequence[str]) -> tuple[Part, int | None]:
        """Make the part of a window; also tells how many tokens the model has read."""
        if self.encoder is None:
            self.encoder = load_encoder(self.model, self.dtype)
        work = prepare_window(self.encoder, texts, self.way)
        vectors = work.launch()()
        return part_of(work, vectors, texts, self.way.width(self.encoder)), work.tokens


_own_worker: Worker | None = None


def _start_worker(worker: Worker) -> None:
    global _own_worker
    _own_worker = worker


def _make(window: Window) -> int | None:
    assert _own_worker is not None
    part, tokens = _own_worker.embed(window.texts)
    save_part(window.path, part)
    return tokens


def make_by_processes(missing: Iterable[Window], worker: Worker, count: int, tally: Tally) -> None:
    """Make parts in several processes; only as many windows are read ahead as keep all busy.

    Args:
        missing: windows whose part is not there.
        worker: what each process has.
        count: of processes.
        tally: is told what has been written.

    Raises:
        UserError: what a process raised, or that it died.
    """
    running: dict[Future[int | None], int] = {}
    with process_pool(count, _start_worker, worker) as pool:
        for window in missing:
            running[pool.submit(_make, window)] = len(window.texts)
            if len(running) >= 2 * count:
                _collect(running, tally)
        while running:
            _collect(running, tally)


def _collect(running: dict[Future[int | None], int], tally: Tally) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        tally.made(running.pop(future), future.result())
        release_notes()  # a model has been loaded
