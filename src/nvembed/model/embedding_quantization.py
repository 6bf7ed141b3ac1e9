"""Vectors of 8 bits or 1 bit per number, made on the device: less has to be copied from it.

The values are those of ``sentence_transformers.util.quantize_embeddings``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SmallPrecision = Literal["int8", "uint8", "binary", "ubinary"]


def quantize(vectors_ND: Tensor, precision: SmallPrecision) -> Tensor:
    """Quantise vectors on their device.

    Args:
        vectors_ND: at least one; of ``int8`` and ``uint8`` they give the range of each dimension.
        precision: ``int8`` and ``uint8`` divide that into 256 steps; ``binary`` and ``ubinary``
            keep the sign, eight to a byte.

    Returns:
        ``(N, D)``, or ``(N, ceil(D / 8))``; int8, or uint8 where the name begins with ``u``.
    """
    vectors_ND = vectors_ND.float()
    if precision in ("binary", "ubinary"):
        small = _packed_signs(vectors_ND)
        return small if precision == "ubinary" else (small.short() - 128).to(torch.int8)
    least_D, greatest_D = vectors_ND.amin(dim=0), vectors_ND.amax(dim=0)
    step_D = (greatest_D - least_D) / 255
    step_D = torch.where(step_D == 0, torch.ones_like(step_D), step_D)
    number_ND = ((vectors_ND - least_D) / step_D).floor().clamp(0, 255)
    return number_ND.to(torch.uint8) if precision == "uint8" else (number_ND - 128).to(torch.int8)


def _packed_signs(vectors_ND: Tensor) -> Tensor:
    """One bit per number, the first in the highest place, as ``numpy.packbits`` has it."""
    count = -(-vectors_ND.shape[1] // 8)
    bits = torch.nn.functional.pad((vectors_ND > 0).short(), (0, 8 * count - vectors_ND.shape[1]))
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.short, device=bits.device)
    return (bits.unflatten(1, (count, 8)) * places).sum(dim=2).to(torch.uint8)
