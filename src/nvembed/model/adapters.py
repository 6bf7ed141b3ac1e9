"""LoRA on the backbone (peft); the pooling head is trained in full or not at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from nvembed.core.files import atomic_folder
from nvembed.core.runs import TRAIN
from nvembed.kernels.accelerate import accelerate
from nvembed.model.backbone import Backbone
from nvembed.model.settings import LoraSettings


def add_lora(backbone: Backbone, settings: LoraSettings) -> None:
    """Freeze the backbone and put fresh adapters on it, in place."""
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )
    with warnings.catch_warnings():
        # peft reads a property that transformers 5 has renamed; nothing a user could do about.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        # Of an int8 base: that adapters could not be merged into it, which nobody does.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        adapted: Any = get_peft_model(backbone.model, config)
    accelerate(adapted)
    backbone.model = adapted


def hold_frozen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in the dtype that autocast computes in, in place.

    The products are the same, since autocast would cast the weights each time. Half the memory.
    """
    for module in backbone.model.modules():
        weight = module.weight if isinstance(module, torch.nn.Linear) else None
        # Quantised weights are of types of their own.
        if type(weight) is torch.nn.Parameter and not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def save_adapter(backbone: Backbone, folder: Path) -> None:
    """Write the adapters alone as a peft folder, which must happen before they are merged."""
    model: Any = backbone.model
    with atomic_folder(folder, TRAIN) as temporary:
        # "auto" would ask the hub whether the vocabulary was changed; it never is.
        model.save_pretrained(str(temporary), save_embedding_layers=False)


def merge_lora(backbone: Backbone) -> None:
    """Add the adapters into the weights and drop them, in place; does nothing without adapters."""
    model: Any = backbone.model
    if isinstance(model, PeftModel):
        backbone.model = model.merge_and_unload()
