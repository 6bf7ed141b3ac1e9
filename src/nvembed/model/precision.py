"""Which floating-point type a machine computes fastest in: measured, not guessed from its name.

CPUs with AVX512-BF16 or AMX multiply matrices in bfloat16 several times as fast as in float32; on
others bfloat16 is emulated and slower, and no flag says which it will be (docs/log.md has both).
"""

from __future__ import annotations

from functools import cache
from typing import overload

import torch

from nvembed.model.products import fastest_seconds, product
from nvembed.model.settings import Precision, PrecisionChoice

MIN_GAIN = 1.5
"""How much faster products in bfloat16 must be: everything around them gains nothing."""

_ROWS, _INNER, _COLUMNS = 1024, 256, 704


@overload
def settle_precision(choice: PrecisionChoice) -> Precision: ...
@overload
def settle_precision(choice: PrecisionChoice | None) -> Precision | None: ...
def settle_precision(choice: PrecisionChoice | None) -> Precision | None:
    """Return the choice, ``auto`` replaced by what this machine's default device is fastest in."""
    if choice != "auto":
        return choice
    return fastest_precision("cuda" if torch.cuda.is_available() else "cpu")


@cache
def fastest_precision(device_type: str) -> Precision:
    """Return the type that matrix products are fastest in.

    On a CPU, two products of a small decoder's size are timed (a few milliseconds); the answer
    holds for the process. CUDA devices with bfloat16 arithmetic get bfloat16, others float32.

    Args:
        device_type: ``torch.device.type``.
    """
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device_type != "cpu":
        return "float32"
    gain = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    return "bfloat16" if gain >= MIN_GAIN else "float32"


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds of one product, the fastest of a few: whatever else runs only adds."""
    left = torch.ones(_ROWS, _INNER, dtype=dtype)
    right = torch.ones(_COLUMNS, _INNER, dtype=dtype)
    return fastest_seconds(lambda: product(left, right))
