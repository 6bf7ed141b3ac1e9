"""How much memory a model takes, a forecast of encoding, and what training holds in which type.

    one forward of T tokens, at its fullest point, in elements of the compute dtype:
    attention   T · (3 D + 4 Q + 2 K + max(Q, 2 N L))
                                         embedding, residual, normed input; queries, their copies,
                                         output; keys and values; scores and softmax where attention
                                         is plain products (a CPU, texts of L tokens, not too long)
    MLP         T · (4 D + 3 I)          the same and the attention's output; gate, up and product
    pooling     T · (2 H R + 4 D) or T · 20 D, whichever is more (latent attention: scores and
                softmax, or its GEGLU); T · 3 D for the others
    activations = the largest of the three

D hidden width, N query heads, Q and K query and key heads · head width, I width of the MLP, H and R
heads and latents of latent attention. Checked against counted tensors in
``tests/unit/model/test_memory.py`` (within 15 %).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nvembed.core.errors import ModelError
from nvembed.model.attention import OTHER_BACKBONE
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import NVEmbed

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
    """Forecast the fullest point of one forward without gradients; see the module docstring.

    ``score_tokens`` is the length of the texts whose scores are held, 0 where kernels hold none.
    """
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
    """Forecast encoding in a dtype (a key of ``BYTES``) of a model that has so many weights.

    sentence-transformers gives all modules the dtype of the first.
    """
    size = BYTES[dtype]
    weights = (elements + folded_elements(shape)) * size
    activations = activation_bytes(shape, tokens, size, score_tokens=score_tokens)
    return MemoryForecast(dtype, tokens, weights, activations)


def weight_bytes(module: nn.Module) -> dict[tuple[str, str], int]:
    """Count the bytes of parameters and buffers by (device, dtype); shared ones once.

    Quantised weights count what they hold, under the dtype of their integers.
    """
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


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU what the machine or the container has left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current")
        )
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


# --- Of training ----------------------------------------------------------------------------------


def recompute_layers(backbone: Backbone) -> None:
    """Checkpoint activations: of a layer only its input is kept in training, in place.

    The rest is computed again in the backward pass. Memory for the graph of a token falls to about
    one state per layer, for one more forward. Dropout is the same in both, since torch keeps the
    generator's state for each layer.
    """
    modules = backbone.model.modules()
    layers: list[Any] = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"the layers of {backbone.model.config.model_type} cannot be computed again",
            where="activation_checkpointing",
            hint=f"Leave it out, or: {OTHER_BACKBONE}",
        )
    for layer in layers:
        # transformers' own switch has another name in every other release; it sets the same.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def hold_frozen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in the dtype that autocast computes in, in place.

    The products are the same, since autocast would cast the weights each time. Half the memory.
    """
    for module in backbone.model.modules():
        weight = module.weight if isinstance(module, nn.Linear) else None
        # Quantised weights are of types of their own.
        if type(weight) is nn.Parameter and not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def hold_masters(model: NVEmbed) -> None:
    """Hold all parameters that receive gradients in float32, in place.

    A weight of 16 bits has 8 or 11 digits. An update at a usual learning rate is smaller than half
    a unit of its last one for nearly every weight, so it would round to nothing. The masters take
    all updates, autocast computes in 16 bits with copies of them, and ``release_masters`` rounds
    once, when the model is saved.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            model.types_before_training[name] = parameter.dtype
            parameter.data = parameter.data.float()


def release_masters(model: NVEmbed) -> None:
    """Round what ``hold_masters`` holds to the types that it had, in place."""
    parameters = dict(model.named_parameters())
    for name, dtype in model.types_before_training.items():
        parameters[name].data = parameters[name].data.to(dtype)
    model.types_before_training = {}
