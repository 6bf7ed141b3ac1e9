"""Quantisation of the linear layers of a backbone: of weights alone, or of the products too.

int8           8 bits, one scale per output row                        (torchao)
fp8            8 bits, E4M3 floating point, one scale per output row   (torchao)
nf4            4 bits, quantiles of a normal, one scale per 64 weights (bitsandbytes)
int8_products  int8, inputs in 8 bits too, with one scale per token    (``kernels/int8.py``);
               down projections stay

Computation is that of the weights' type but with the last, which is for encoding on a CPU. A model
that is loaded so has each layer quantised as soon as it is read: it is never whole in memory.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from sentence_transformers.util import get_device_name
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from nvembed.core.arguments import WeightBits
from nvembed.core.errors import ConfigError, ModelError
from nvembed.interop.loading import usable_device
from nvembed.interop.model_folder import ModelSource
from nvembed.interop.weights import INDEX, LM_HEAD, SINGLE, fill, fit, stored_tensors
from nvembed.kernels.int8 import Int8Linear
from nvembed.model.attention import FLAT_ATTENTION

Quantization = Literal[WeightBits, "int8_products"]

# Single channels of what comes in may be larger than all others together, which one scale per token
# cannot hold: of SmolLM2-135M vectors had a cosine of 0.984 with them in 8 bits, 0.993 without.
_IN_FLOATS = "down_proj"
# What bitsandbytes' layout for CPUs with AVX512-BF16 needs; others would take any width.
_BLOCK, _ROWS = 64, 32


@dataclass(frozen=True)
class Quantizer:
    """Makes quantised layers of the linear layers of a backbone, one by one.

    ``frozen`` layers are the base of adapters: those of the libraries are made for encoding, and
    gradients do not pass them, or cost memory. ``device`` is where the model will be.
    """

    kind: Quantization
    frozen: bool = False
    device: str = "cpu"

    def prepare(self, backbone: nn.Module) -> None:
        """Refuse a backbone that cannot be quantised, of which the shapes are enough; mark it."""
        if hasattr(backbone, "peft_config"):
            raise ModelError("the backbone has adapters", hint="Merge them first (merge_lora)")
        if quantized_as(backbone) is not None:
            raise ModelError("the backbone is quantised already", hint="Load it again")
        if self.kind == "int8_products" and torch.device(self.device).type != "cpu":
            raise ModelError(f"products in int8 on {self.device}", expected="a CPU")
        if self.kind in get_args(WeightBits):
            _library(self.kind)
        for name, layer in backbone.named_modules():
            fits = getattr(layer, "in_features", 0) % _BLOCK == 0
            fits = fits and getattr(layer, "out_features", 0) % _ROWS == 0
            if self.kind == "nf4" and isinstance(layer, nn.Linear) and not fits:
                raise ModelError(
                    f"nf4 cannot take {name} of {layer.out_features} × {layer.in_features}",
                    expected=f"rows in multiples of {_ROWS}, columns of {_BLOCK}",
                    hint="Use int8",
                )
        backbone.quantized_as = self.kind  # type: ignore[assignment]  # no module of it

    @torch.no_grad()
    def __call__(self, name: str, layer: nn.Module) -> nn.Module:
        """A layer of the backbone by its name: quantised, or as it is where it is not linear."""
        if not isinstance(layer, nn.Linear):
            return layer
        if self.kind == "int8_products":
            return layer if name.endswith(_IN_FLOATS) else Int8Linear(layer)
        made = _four_bit(layer) if self.kind == "nf4" else _eight_bit(layer, self.kind)
        return FrozenLinear(made) if self.frozen else made

    def quantize(self, backbone: nn.Module) -> None:
        """Quantise all layers of a loaded backbone, in place."""
        self.prepare(backbone)
        for name in [name for name, _ in backbone.named_modules()]:  # no layer outlives its turn
            layer = backbone.get_submodule(name)
            if (made := self(name, layer)) is not layer:
                backbone.set_submodule(name, made)


def load_quantized(
    source: ModelSource, dtype: torch.dtype | str | None, quantize: Quantizer, config: Any
) -> PreTrainedModel | None:
    """Quantise a model tensor by tensor; None where they are stored in another form than its own.

    So are mixtures of experts, tied tables, heads other than a language model's and ``.bin`` files.
    """
    wanted = config.dtype if dtype == "auto" else dtype or torch.float32
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    with init_empty_weights():  # but for buffers, which are computed
        model = AutoModel.from_config(config, attn_implementation=FLAT_ATTENTION, dtype=wanted)
    if not (source.find(INDEX) or source.find(SINGLE)) or model._keep_in_fp32_modules:
        return None
    found = stored_tensors(source).items()
    stored = {name: tensor for name, tensor in found if LM_HEAD not in name.split(".")}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    try:
        fit(shapes, stored, where=source.place)
    except ModelError:  # transformers' way says what is wrong, if it is
        return None
    quantize.prepare(model)
    device = torch.device(quantize.device)
    fill(
        model,
        stored,
        where=source.place,
        place=lambda name: device,
        dtype=lambda value: wanted,
        filled=quantize,
    )
    return model.to(device).eval()


def wanted_quantizer(
    quantize: WeightBits | Quantizer | None, dtype: object, device: str | torch.device | None
) -> Quantizer:
    """What ``from_pretrained`` asks for by one of both; a ConfigError by two."""
    if dtype == "int8" and quantize is not None:
        expected = "one of them: dtype int8 holds weights in 8 bits already"
        raise ConfigError("dtype int8 and quantize", expected=expected)
    kind = quantize or "int8_products"
    made = kind if isinstance(kind, Quantizer) else Quantizer(kind)
    return replace(made, device=usable_device(device) or get_device_name())


def quantize_backbone(model: Any, kind: Quantization) -> None:
    """Quantise the linear layers of an NVEmbed's backbone, which has no adapters, in place.

    ``NVEmbed.from_pretrained(quantize=…)`` gives the same without the whole weights in between.
    """
    Quantizer(kind, device=str(model.device)).quantize(model.backbone.model)


def quantized_as(backbone: nn.Module) -> Quantization | None:
    """How a backbone is held; None of one that is not quantised."""
    kind: Quantization | None = getattr(backbone, "quantized_as", None)
    return kind


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


def _library(kind: Quantization) -> Any:
    """The module of the library that makes layers of a kind."""
    try:
        return importlib.import_module(
            "bitsandbytes.nn" if kind == "nf4" else "torchao.quantization"
        )
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{kind} needs the package {error.name!r}",
            hint="Install it with: pip install 'nvembed[quantization]'",
        ) from error


def _eight_bit(layer: nn.Linear, kind: Quantization) -> Any:
    library, holder = _library(kind), nn.Sequential(layer)
    config = library.Int8WeightOnlyConfig if kind == "int8" else library.Float8WeightOnlyConfig
    library.quantize_(holder, config())
    return holder[0]


def _four_bit(layer: nn.Linear) -> nn.Linear:
    library, weight = _library("nf4"), layer.weight
    made: Any = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    # Quantised by the move to a device, on a CPU too.
    whole = library.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    made.weight, made.bias = whole.to(weight.device), layer.bias
    result: nn.Linear = made
    return result
