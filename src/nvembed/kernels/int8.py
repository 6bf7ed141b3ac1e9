"""Linear layers whose products are taken in 8 bits on a CPU: weights and inputs, sums in 32.

A weight has a scale for each row of it, an input one for each token, found when it comes; so the
vector of a text depends on no other. The product is oneDNN's, by instructions for it (VNNI), and
what stands around it one pass of compiled code. Letters: T tokens, I and O widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed.kernels.build import library
from nvembed.kernels.functions import UNIT, call

_SOURCE = "int8.cpp"


class Int8Linear(nn.Module):
    """What a linear layer computes, from a copy of its weight in 8 bits; no gradient passes.

    Attributes:
        dtype: type of what comes in and goes out.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        weight_OI, scale_O = rows_to_int8(layer.weight.detach().float().contiguous())
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_O)
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, I)`` → ``(…, O)``, in the type of ``x``."""
        x_TI = x.flatten(0, -2).contiguous()
        bytes_TI, scale_T = rows_to_int8(x_TI)
        sums_TO = torch._int_mm(bytes_TI, self.weight.T)
        out_TO = numbers_of(sums_TO, scale_T, self.scale, self.bias, x.dtype)
        return out_TO.view(*x.shape[:-1], self.out_features)


def rows_to_int8(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers from −127 to 127, ties to even, and the scale of each ``(T,)``."""
    if not _compiled(x_TI.dtype, x_TI.shape[1]):
        top_T = x_TI.abs().amax(dim=1).float()
        factor_T = torch.where(top_T > 0, 127 / top_T, 0.0)
        return (x_TI.float() * factor_T[:, None]).round().to(torch.int8), top_T / 127
    out_TI = torch.empty(x_TI.shape, dtype=torch.int8)
    scale_T = torch.empty(len(x_TI), dtype=torch.float32)
    call(_SOURCE, "to_int8", x_TI, out_TI, scale_T, x_TI.dtype is torch.float32, *x_TI.shape)
    return out_TI, scale_T


def numbers_of(
    sums_TO: Tensor, scale_T: Tensor, scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sums of products as numbers: times both scales, plus the bias, rounded once."""
    if not _compiled(dtype, sums_TO.shape[1]):
        exact_TO = sums_TO.float() * scale_T[:, None] * scale_O
        return (exact_TO if bias_O is None else exact_TO + bias_O).to(dtype)
    out_TO = torch.empty(sums_TO.shape, dtype=dtype)
    wide = dtype is torch.float32
    call(_SOURCE, "from_sums", sums_TO, scale_T, scale_O, bias_O, out_TO, wide, *sums_TO.shape)
    return out_TO


def _compiled(dtype: torch.dtype, width: int) -> bool:
    known = dtype in (torch.float32, torch.bfloat16) and width % UNIT == 0
    return known and library(_SOURCE) is not None
