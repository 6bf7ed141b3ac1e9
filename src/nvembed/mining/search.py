"""Exact nearest documents by tiled matrix products with a running top-k.

In: query and document vectors; out: the best ``k`` documents of every query. Next: ``filters.py``.

Letters: B queries, N documents, D width, K results per query.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Ranks are held as one int64 per result: the score's bits above, the inverted row number below.
_LOW_BITS = np.int64(0xFFFFFFFF)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
# Below every key of a real score: the bits of minus infinity are far above the smallest int32.
_NO_RESULT = np.iinfo(np.int64).min


def top_k(
    queries_BD: NDArray[np.float32],
    documents_ND: NDArray[np.float32],
    k: int,
    *,
    block_queries: int = 128,
    block_documents: int = 4096,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the ``k`` documents with the largest inner product, best first, ties by the lower row.

    Nothing is approximated. Memory beside the inputs is a few arrays of ``block_queries`` times
    ``block_documents + k`` entries, whatever N is; ``documents_ND`` may be memory-mapped.

    Equal documents tie only as far as the matrix product gives them equal scores: a BLAS may round
    the columns of different tiles differently, by one unit in the last place.

    Args:
        queries_BD: float32 vectors; unit length makes the scores cosines.
        documents_ND: float32 vectors of the same width.
        k: results wanted, at least 1; K = min(k, N) come back.
        block_queries: rows of a tile.
        block_documents: columns of a tile.

    Returns:
        scores_BK, descending in each row, and indices_BK, rows of ``documents_ND``.

    Raises:
        ValueError: widths differ, or ``k`` or a block size is below 1.

    Source: checked against a full sort in tests/unit/mining/test_mining_search.py.
    """
    if queries_BD.ndim != 2 or documents_ND.ndim != 2:
        raise ValueError("top_k takes two matrices, one vector a row")
    if queries_BD.shape[1] != documents_ND.shape[1]:
        raise ValueError(f"widths differ: {queries_BD.shape[1]} and {documents_ND.shape[1]}")
    if min(k, block_queries, block_documents) < 1:
        raise ValueError(f"{k=}, {block_queries=}, {block_documents=}: all must be at least 1")
    num_queries, num_documents = len(queries_BD), len(documents_ND)
    num_results = min(k, num_documents)
    scores_BK = np.empty((num_queries, num_results), dtype=np.float32)
    indices_BK = np.empty((num_queries, num_results), dtype=np.int64)
    for start in range(0, num_queries, block_queries):
        rows = slice(start, min(start + block_queries, num_queries))
        keys_BK = _best_keys(queries_BD[rows], documents_ND, num_results, block_documents)
        scores_BK[rows], indices_BK[rows] = _unpack(keys_BK)
    return scores_BK, indices_BK


def _best_keys(
    queries_BD: NDArray[np.float32],
    documents_ND: NDArray[np.float32],
    num_results: int,
    block_documents: int,
) -> NDArray[np.int64]:
    best_BK = np.full((len(queries_BD), num_results), _NO_RESULT, dtype=np.int64)
    for start in range(0, len(documents_ND), block_documents):
        # Copied to float32 tile by tile, so that a memory-mapped matrix is never read as a whole.
        tile_ND = np.asarray(documents_ND[start : start + block_documents], dtype=np.float32)
        keys_BN = _pack(queries_BD @ tile_ND.T, first_index=start)
        keys_BN = np.concatenate([best_BK, keys_BN], axis=1)
        cut = keys_BN.shape[1] - num_results
        best_BK = np.partition(keys_BN, cut, axis=1)[:, cut:] if cut else keys_BN
    return np.sort(best_BK, axis=1)[:, ::-1]


def _pack(scores_BN: NDArray[np.float32], *, first_index: int) -> NDArray[np.int64]:
    """Give each score an integer of its own that sorts by score, then by lower document row.

    Sortable form of a float: its bits, with the magnitude inverted for negative numbers.
    """
    # Adding zero turns -0.0 into 0.0, which would otherwise sort apart.
    bits_BN = np.ascontiguousarray(scores_BN + np.float32(0.0)).view(np.int32)
    sortable_BN = bits_BN ^ ((bits_BN >> 31) & _MAGNITUDE_BITS)
    indices_N = np.arange(first_index, first_index + scores_BN.shape[1], dtype=np.int64)
    keys_BN: NDArray[np.int64] = (sortable_BN.astype(np.int64) << 32) | (_LOW_BITS - indices_N)
    return keys_BN


def _unpack(keys_BK: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    indices_BK = _LOW_BITS - (keys_BK & _LOW_BITS)
    sortable_BK = (keys_BK >> 32).astype(np.int32)
    bits_BK = sortable_BK ^ ((sortable_BK >> 31) & _MAGNITUDE_BITS)
    return bits_BK.view(np.float32), indices_BK
