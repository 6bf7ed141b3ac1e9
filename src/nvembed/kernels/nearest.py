"""Exact nearest documents by tiled matrix products with a running top-k.

What costs is looking for the best in the products. So every query keeps a floor, the k-th best
score at the last count, and of a tile only scores above it are looked at.
Letters: Q queries, N documents, D width, K results per query, B and M rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

# Ranks are held as one int64 per result: the score's bits above, the inverted row number below.
_LOW_BITS = np.int64(0xFFFFFFFF)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
# Below every key of a real score: the bits of minus infinity are far above the smallest int32.
_NO_RESULT = np.int64(np.iinfo(np.int64).min)

# Queries that are held at once, each with its results so far; documents are read once for them.
GROUP_QUERIES = 4096
# Tiles that a thread looks at before it waits for the others.
SLAB_TILES = 4
# Places for what is found between two counts, where k is smaller.
FEWEST_NEW = 256

_RunAll = Callable[[Callable[[slice], None], Sequence[slice]], object]


def top_k(
    queries_QD: NDArray[np.float32],
    documents_ND: NDArray[np.float32] | Iterable[NDArray[np.float32]],
    k: int,
    *,
    block_queries: int = 256,
    block_documents: int = 2048,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the ``k`` documents with the largest inner product, best first, ties by the lower row.

    Nothing is approximated; columns of different tiles may be rounded differently, by one unit in
    the last place. The documents are one matrix (which may be memory-mapped) or parts, gone through
    once for every ``GROUP_QUERIES`` queries: with more they must not be an iterator. Returns
    scores_QK and indices_QK, rows of all documents, with K = min(k, N).
    """
    if queries_QD.ndim != 2:
        raise ValueError("top_k takes two matrices, one vector a row")
    if min(k, block_queries, block_documents) < 1:
        raise ValueError(f"{k=}, {block_queries=}, {block_documents=}: all must be at least 1")
    parts: Iterable[NDArray[np.float32]] = documents_ND
    if isinstance(documents_ND, np.ndarray):
        parts = [documents_ND]
        k = max(min(k, len(documents_ND)), 1)
    num_queries, slab_size = len(queries_QD), SLAB_TILES * block_documents
    with _threads() as run_all:
        for first in range(0, max(num_queries, 1), GROUP_QUERIES):
            rows = slice(first, min(first + GROUP_QUERIES, num_queries))
            group_BD = np.require(queries_QD[rows], np.float32, ["C", "W"])
            best = RunningTopK(len(group_BD), k)
            for slab_MD in _slabs(parts, group_BD.shape[1], slab_size):
                _search(best, group_BD, slab_MD, block_queries, block_documents, run_all)
            scores_BK, indices_BK = best.results()
            if first == 0:  # now it is known how many documents there are
                scores_QK = np.empty((num_queries, scores_BK.shape[1]), dtype=np.float32)
                indices_QK = np.empty(scores_QK.shape, dtype=np.int64)
            scores_QK[rows], indices_QK[rows] = scores_BK, indices_BK
    return scores_QK, indices_QK


def _search(
    best: RunningTopK,
    group_BD: NDArray[np.float32],
    slab_MD: NDArray[np.float32],
    block_queries: int,
    block_documents: int,
    run_all: _RunAll,
) -> None:
    def look(rows: slice) -> None:
        for start in range(0, len(slab_MD), block_documents):
            tile_MD = slab_MD[start : start + block_documents]
            best.offer(_product(group_BD[rows], tile_MD), rows, best.num_seen + start)

    starts = range(0, len(group_BD), block_queries)
    run_all(look, [slice(row, min(row + block_queries, len(group_BD))) for row in starts])
    best.num_seen += len(slab_MD)


@contextmanager
def _threads() -> Iterator[_RunAll]:
    """Give a function that does something for all blocks, on as many threads as torch may use.

    Each multiplies alone: OpenMP's threads wait for each other at every product, which on a busy
    machine took ten times as long, and no result depends on the number of cores.
    """
    import torch

    count = torch.get_num_threads()
    if count == 1:
        yield lambda function, blocks: list(map(function, blocks))
        return

    def start() -> None:
        torch.get_num_threads()  # sets what a new thread starts with, which the next line replaces
        torch.set_num_threads(1)

    with ThreadPoolExecutor(count, initializer=start) as pool:

        def run_all(function: Callable[[slice], None], blocks: Sequence[slice]) -> None:
            try:
                list(pool.map(function, blocks))
            finally:
                torch.set_num_threads(count)  # the setting is this thread's and of threads to come

        yield run_all


class RunningTopK:
    """The best ``k`` so far of a group of queries, while documents come tile by tile, in order."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.num_seen = 0
        self._k = k
        # The first k of a row are its best at the last count, behind them what came since. Few, so
        # that floors are fresh: the higher they are, the less is found above them.
        self._keys = np.full((num_queries, k + max(k, FEWEST_NEW)), _NO_RESULT)
        self._filled = np.zeros(num_queries, dtype=np.int64)
        self._floor = np.full(num_queries, np.float32(-np.inf))

    def offer(self, scores_BM: NDArray[np.float32], rows: slice, first_index: int) -> None:
        """Look at the scores of some queries for documents ``first_index`` and following."""
        num_rows, num_columns = scores_BM.shape
        filled, keys = self._filled[rows], self._keys[rows]
        if first_index < self._k < num_columns:  # just below the k-th best of the tile
            place = num_columns - self._k
            kth_B = np.partition(scores_BM, place)[:, place]
            self._floor[rows] = np.nextafter(kth_B, np.float32(-np.inf))
        # Later documents lose ties, so a score equal to the floor is out.
        found = np.flatnonzero(scores_BM > self._floor[rows, None])
        if not len(found):
            return
        row, column = np.divmod(found, num_columns)
        new = np.bincount(row, minlength=num_rows)
        if (filled + new > keys.shape[1]).any():
            self._count(rows)
            if (filled + new > keys.shape[1]).any():  # more than there is room for
                indices_M = np.arange(first_index, first_index + num_columns)
                packed = _pack(scores_BM, indices_M)
                self._keep(np.concatenate([keys[:, : self._k], packed], axis=1), rows)
                return
        at = np.arange(len(found)) + (filled - (np.cumsum(new) - new))[row]
        keys[row, at] = _pack(scores_BM[row, column], first_index + column)
        filled += new

    def results(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores_BK and indices_BK, best first."""
        self._count(slice(None))
        wanted = min(self._k, self.num_seen)
        return _unpack(np.sort(self._keys[:, :wanted])[:, ::-1])

    def _count(self, rows: slice) -> None:
        """Keep the best k of what was found for each row."""
        keys = self._keys[rows]
        used = int(self._filled[rows].max(initial=0))
        if used > self._k:
            self._keep(keys[:, :used], rows)
            keys[:, self._k : used] = _NO_RESULT

    def _keep(self, keys_BN: NDArray[np.int64], rows: slice) -> None:
        """Keep the best k of more keys, and raise the floor of each row to the k-th."""
        cut = keys_BN.shape[1] - self._k
        best_BK = np.partition(keys_BN, cut)[:, cut:]
        # Of a row with fewer results the other places hold none, wherever they lie among the k.
        self._filled[rows] = self._k
        self._keys[rows, : self._k] = best_BK
        worst_B = best_BK.min(axis=1)
        self._floor[rows] = np.where(worst_B == _NO_RESULT, -np.inf, _unpack(worst_B)[0])


def _slabs(
    parts: Iterable[NDArray[np.float32]], width: int, size: int
) -> Iterator[NDArray[np.float32]]:
    for part in parts:
        if part.ndim != 2:
            raise ValueError("top_k takes two matrices, one vector a row")
        if part.shape[1] != width:
            raise ValueError(f"widths differ: {width} and {part.shape[1]}")
        for start in range(0, len(part), size):
            # Of a memory-mapped matrix a copy, since torch takes nothing that cannot be written.
            yield np.require(part[start : start + size], dtype=np.float32, requirements=["C", "W"])


def _product(queries_BD: NDArray[np.float32], tile_MD: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch  # so that wrong input is told without waiting for it

    from nvembed.kernels.functions import same_in_every_process

    # Training mines inside its autocast, which would round the scores to 16 bits.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        scores_BM = same_in_every_process(torch.from_numpy(queries_BD), torch.from_numpy(tile_MD))
        return scores_BM.numpy()


def _pack(scores: NDArray[np.float32], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each score an integer of its own that sorts by score, then by lower document row.

    Sortable form of a float: its bits, with the magnitude inverted for negative numbers.
    """
    # Adding zero turns -0.0 into 0.0, which would otherwise sort apart.
    bits = np.ascontiguousarray(scores + np.float32(0.0)).view(np.int32)
    sortable = bits ^ ((bits >> 31) & _MAGNITUDE_BITS)
    return (sortable.astype(np.int64) << 32) | (_LOW_BITS - indices)


def _unpack(keys: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    indices = _LOW_BITS - (keys & _LOW_BITS)
    sortable = (keys >> 32).astype(np.int32)
    bits = sortable ^ ((sortable >> 31) & _MAGNITUDE_BITS)
    return bits.view(np.float32), indices
