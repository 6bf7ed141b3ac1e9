"""Quantisation of the linear layers of a backbone: of weights alone, or of the products too.

int8           8 bits, one scale per output row                        (torchao)
fp8            8 bits, E4M3 floating point, one scale per output row   (torchao)
nf4            4 bits, quantiles of a normal, one scale per 64 weights (bitsandbytes)
int8_products  int8, inputs in 8 bits too, with one scale per token    (``kernels/int8.py``);
               down projections stay

Computation is that of the weights' type but with the last, which is for encoding on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.kernels.int8 import Int8Linear

if TYPE_CHECKING:
    from nvembed.model.packs import PackModel

Quantization = Literal["int8", "fp8", "nf4", "int8_products"]

# Single channels of what comes in may be larger than all others together, which one scale per token
# cannot hold: of SmolLM2-135M vectors had a cosine of 0.984 with them in 8 bits, 0.993 without.
_IN_FLOATS = "down_proj"
# What bitsandbytes' layout for CPUs with AVX512-BF16 needs; others would take any width.
_BLOCK, _ROWS = 64, 32


@torch.no_grad()
def quantize_backbone(model: PackModel, kind: Quantization) -> None:
    """Quantise the linear layers of the backbone, which has no adapters, in place."""
    backbone = model.backbone.model
    if hasattr(backbone, "peft_config"):
        raise ModelError("the backbone has adapters", hint="Merge them first (merge_lora)")
    linear = [(name, m) for name, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not linear or any(type(m.weight) is not nn.Parameter for _, m in linear):
        raise ModelError("the backbone is quantised already", hint="Load it again")
    if kind == "int8_products":
        if model.device.type != "cpu":
            raise ModelError(f"products in int8 on {model.device.type}", expected="a CPU")
        for name, layer in linear:
            if not name.endswith(_IN_FLOATS):
                backbone.set_submodule(name, Int8Linear(layer))
        return
    try:
        if kind == "nf4":
            _four_bit(backbone, linear)
        else:
            _eight_bit(backbone, kind)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{kind} needs the package {error.name!r}",
            hint="Install it with: pip install 'nvembed[quantization]'",
        ) from error


@torch.no_grad()
def quantize_frozen(model: PackModel, kind: Literal["int8", "nf4"]) -> None:
    """Quantise the linear layers of the backbone to be the frozen base of adapters, in place.

    The layers of the libraries are made for encoding: gradients do not pass, or cost memory.
    """
    quantize_backbone(model, kind)
    backbone = model.backbone.model
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Linear):
            backbone.set_submodule(name, FrozenLinear(layer))


class FrozenLinear(nn.Linear):
    """A linear layer of a quantised weight that gradients pass; it is whole for products alone."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """``(…, in_features)`` → ``(…, out_features)``."""
        return _FrozenProduct.apply(input, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        # Under autocast the product is taken in its dtype, otherwise in that of the input.
        return nn.functional.linear(x, dequantized(weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        product = gradient @ dequantized(ctx.weight).to(gradient.dtype)
        return product.to(ctx.dtype), None, None


def dequantized(weight: Any) -> Tensor:
    """The whole weight ``(out_features, in_features)``, in the dtype it had, of a layer here."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    return weight.dequantize()


def _eight_bit(backbone: nn.Module, kind: Literal["int8", "fp8"]) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(backbone, config)


def _four_bit(backbone: nn.Module, linear: list[tuple[str, nn.Linear]]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in linear:
        if layer.in_features % _BLOCK or layer.out_features % _ROWS:
            raise ModelError(
                f"nf4 cannot take {name} of {layer.out_features} × {layer.in_features}",
                expected=f"rows in multiples of {_ROWS}, columns of {_BLOCK}",
                hint="Use int8",
            )
    for name, layer in linear:
        weight = layer.weight
        made: Any = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        # Quantised by the move to a device, on a CPU too.
        made.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4").to(
            weight.device
        )
        made.bias = layer.bias
        backbone.set_submodule(name, made)
