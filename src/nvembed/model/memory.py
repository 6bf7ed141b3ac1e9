"""How much memory a model takes, and a forecast of encoding.

    one forward of T tokens, at its fullest point, in elements of the compute dtype:
    attention   T · (3 D + 4 Q + 2 K + max(Q, 2 N L))    L: texts whose scores are held
    MLP         T · (4 D + 3 I)
    pooling     T · max(2 H R + 4 D, 20 D) for latent attention, T · 3 D for the others

D hidden width, N query heads, Q and K query and key heads · head width, I width of the MLP, H and R
heads and latents of latent attention. ``tests/unit/model/test_memory.py`` has it within 15 %.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

BYTES = {"float32": 4, "bfloat16": 2}

FORMULA = (
    "weights + the fullest point of one forward: "
    "T · max(3 D + 4 Q + 2 K + max(Q, 2 N L), 4 D + 3 I) · bytes, or the pooling if that needs more"
)


class Shape(NamedTuple):
    """The numbers of a model that memory depends on; see the module docstring."""

    width: int
    num_heads: int
    query_width: int
    key_width: int
    mlp_width: int
    pooling_heads: int = 0
    pooling_latents: int = 0

    @classmethod
    def of_config(cls, config: Any, *, pooling_heads: int = 0, pooling_latents: int = 0) -> Shape:
        """Read them from a transformers config; unusual families fall back to common ratios."""
        width = int(config.hidden_size)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        head_width = int(getattr(config, "head_dim", None) or width // heads)
        key_width = int(getattr(config, "num_key_value_heads", None) or heads) * head_width
        mlp_width = int(getattr(config, "intermediate_size", None) or 4 * width)
        backbone = (width, heads, heads * head_width, key_width, mlp_width)
        return cls(*backbone, pooling_heads, pooling_latents)


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes that encoding needs in a dtype, Python and its libraries left out."""

    dtype: str
    tokens: int  # of one forward
    weights: int  # with the folded latents
    activations: int  # at the fullest point of one forward

    @property
    def total(self) -> int:
        """Weights and activations."""
        return self.weights + self.activations


def activation_bytes(
    shape: Shape, tokens: int, bytes_per_element: int, *, score_tokens: int
) -> int:
    """Forecast the fullest point of one forward; ``score_tokens`` is 0 where no scores are held."""
    scores = max(shape.query_width, 2 * shape.num_heads * score_tokens)
    attention = 3 * shape.width + 4 * shape.query_width + 2 * shape.key_width + scores
    mlp = 4 * shape.width + 3 * shape.mlp_width
    if shape.pooling_latents:
        latent_scores = 2 * shape.pooling_heads * shape.pooling_latents + 4 * shape.width
        pooling = max(latent_scores, 20 * shape.width)
    else:
        pooling = 3 * shape.width
    return tokens * max(attention, mlp, pooling) * bytes_per_element


def folded_elements(shape: Shape) -> int:
    """Elements of the folded latents that ``encode`` keeps."""
    return 2 * shape.pooling_heads * shape.pooling_latents * shape.width


def forecast(
    shape: Shape, dtype: str, tokens: int, elements: int, *, score_tokens: int
) -> MemoryForecast:
    """Forecast encoding in a dtype (a key of ``BYTES``) of a model of so many weights."""
    size = BYTES[dtype]
    weights = (elements + folded_elements(shape)) * size
    activations = activation_bytes(shape, tokens, size, score_tokens=score_tokens)
    return MemoryForecast(dtype, tokens, weights, activations)


def weight_bytes(module: nn.Module) -> dict[tuple[str, str], int]:
    """Count the bytes of parameters and buffers by (device, dtype); shared ones once."""
    found: Counter[tuple[str, str]] = Counter()
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in inner_tensors(tensor):
            key = (str(part.device), str(part.dtype).removeprefix("torch."))
            found[key] += part.numel() * part.element_size()
    return dict(found)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """List the plain tensors that a tensor holds: itself, or those of a quantised subclass."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        state = getattr(tensor, "quant_state", None)  # 4-bit weights keep their scales beside them
        scales = [] if state is None else [state.absmax, state.code]
        return [tensor, *scales]
    return [part for name in flatten()[0] for part in inner_tensors(getattr(tensor, name))]
