"""Activation checkpointing: of a layer only the input is kept, the rest is computed again.

Memory for the graph of a token falls to about one state per layer, for one more forward in the
backward pass. Dropout is the same in both, since torch keeps the generator's state for each layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nvembed.core.errors import ModelError
from nvembed.model.attention import OTHER_BACKBONE
from nvembed.model.backbone import Backbone


def recompute_layers(backbone: Backbone) -> None:
    """Let the layers keep their inputs alone in training, in place.

    transformers' own switch has another name in every other release; what it sets is the same.

    Raises:
        ModelError: the family has no layers that can do that.
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
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
