"""Smaller vectors: cut to their first dimensions, and numbers of 8 bits or 1 bit.

The formats are those of sentence-transformers (``truncate_dim``, ``quantize_embeddings``), applied
to a file of any size: the ranges of ``int8`` and ``uint8`` come from all of its vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.inference.protocol import unit_rows

OutputPrecision = Literal["float32", "int8", "uint8", "binary"]

_WINDOW_ROWS = 4096


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How vectors are written.

    Attributes:
        truncate_dim: keep the first dimensions and normalise again; ``None`` keeps all.
        precision: ``int8`` and ``uint8`` divide each dimension's range into 256 steps; ``binary``
            keeps the sign, eight to a byte.
    """

    truncate_dim: int | None = None
    precision: OutputPrecision = "float32"


def shorten(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """Keep the first dimensions of unit vectors ``(N, D)`` and bring them back to length 1."""
    return unit_rows(vectors[:, :dimension])


def quantize_file(
    source: Path, target: Path, precision: OutputPrecision
) -> NDArray[np.float32] | None:
    """Quantise a ``.npy`` file of float32 vectors, window by window.

    Returns:
        the ranges ``(2, D)`` (least and greatest value) of ``int8`` and ``uint8``: other vectors
        are only comparable when they are quantised with the same; ``None`` for ``binary``.
    """
    from sentence_transformers.util import quantize_embeddings

    vectors = np.load(source, mmap_mode="r")
    windows = range(0, len(vectors), _WINDOW_ROWS)
    ranges = None
    if precision in ("int8", "uint8"):
        parts = [vectors[start : start + _WINDOW_ROWS] for start in windows]
        least = np.min([part.min(axis=0) for part in parts], axis=0)
        greatest = np.max([part.max(axis=0) for part in parts], axis=0)
        ranges = np.stack([least, greatest])
    width = -(-vectors.shape[1] // 8) if precision == "binary" else vectors.shape[1]
    kind = "|u1" if precision == "uint8" else "|i1"
    header = {"descr": kind, "fortran_order": False, "shape": (len(vectors), width)}
    with open(target, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in windows:
            window = np.asarray(vectors[start : start + _WINDOW_ROWS])
            done = np.asarray(quantize_embeddings(window, precision, ranges=ranges))
            file.write(done.tobytes())
    return ranges
