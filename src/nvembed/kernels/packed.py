"""Linear layers whose weights lie as oneDNN reads them, for products of few tokens on a CPU.

oneDNN copies a plain weight into blocks for every product. Of a long pack that is nothing, of one
short text a third of its time. Packed once, the products are the same to the bit; the plain weights
are gone, so this is for a process that encodes and nothing else. Letters: T tokens, I and O widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed.kernels.build import this_cpu
from nvembed.kernels.functions import has_onednn, onednn, onednn_pays


class PackedLinear(nn.Module):
    """What a linear layer computes, from its weight in oneDNN's blocks; no gradient passes.

    Neither saved nor moved: the blocks are memory of this process on this CPU.

    Attributes:
        dtype: type of what comes in and goes out.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        weight_OI = layer.weight.detach().contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``(…, I)`` → ``(…, O)``."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        out_TO = onednn(x.flatten(0, -2), self._packed, self._bias)
        return out_TO.view(*x.shape[:-1], self.out_features)


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Pack the linear layers of a model that is on a CPU, one by one, in place; return how many.

    Only those whose products are oneDNN's anyway: in bfloat16 where the CPU has instructions for
    it, in float32 where oneDNN is the faster one.
    """
    count = 0
    for name in [name for name, _ in model.named_modules()]:  # no layer outlives its turn
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear and _is_onednns(layer.weight):
            model.set_submodule(name, PackedLinear(layer))
            count += 1
    return count


def _is_onednns(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or type(weight_OI) is not nn.Parameter:
        return False  # a subclass is a weight of quantisation
    if weight_OI.dtype is torch.bfloat16:
        return has_onednn() and this_cpu().may_multiply_bfloat16 and this_cpu().has_wide_registers
    return weight_OI.dtype is torch.float32 and onednn_pays()
