"""What vectors are in an answer: numbers of 32, 8 or 1 bit, in a list or as base64 of their bytes.

Quantised by ``nvembed.model.encoding.quantize``, as ``encode(precision=...)`` is.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""8 bits are 127 times each number, rounded, ``uint8`` with 128 added. ``encode`` takes the range
from the texts of a call, which here would make a text's numbers depend on its company. Bits tell
whether a number is above 0, the first in the highest place; ``binary`` has 128 taken off."""

_BOUNDS = (-128.5 / 127, 126.5 / 127)  # of 256 steps of 1/127, with 0 in the middle of one


def as_type(vectors: NDArray[np.float32], dtype: Dtype) -> NDArray[Any]:
    """Turn unit vectors ``(N, D)`` into another type; bits are ``(N, ceil(D / 8))``."""
    if dtype == "float":
        return np.ascontiguousarray(vectors, dtype="<f4")
    import torch

    from nvembed.model.encoding import quantize

    return quantize(torch.from_numpy(vectors), dtype, _BOUNDS).numpy()


def as_rows(vectors: NDArray[np.float32], dtype: Dtype = "float", *, packed: bool = False) -> Any:
    """Render the rows as numbers, or ``packed``: each is base64 of little-endian bytes."""
    rows = as_type(vectors, dtype)
    return [base64.b64encode(row.tobytes()).decode() for row in rows] if packed else list(rows)
