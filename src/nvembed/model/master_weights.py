"""Trained parameters in float32, whatever type a model was loaded in and will be saved in.

A weight of 16 bits has 8 or 11 digits. An update at a usual learning rate is smaller than half a
unit of its last one for nearly every weight, so it would round to nothing. The masters take all
updates, autocast computes in 16 bits with copies of them, and the model is rounded once, when it is
saved.
"""

from __future__ import annotations

import torch

from nvembed.model.embedder import NVEmbed


def hold_masters(model: NVEmbed) -> None:
    """Hold all parameters that receive gradients in float32, in place.

    Their types are remembered for ``release_masters``.
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
