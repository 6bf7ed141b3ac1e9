"""Names of the floating-point types that a job computes in."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]
"""``auto`` is what the machine computes fastest in, see ``kernels/precision.py``."""
