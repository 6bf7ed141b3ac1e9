"""A transformer that was saved as adapters: its base, with what they add in its weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from nvembed.interop.adapter_folder import ADAPTER, ADAPTER_CONFIG, find_base, read_bases
from nvembed.interop.loading import loading
from nvembed.interop.model_folder import ModelSource
from nvembed.interop.weights import Misfit, check_finite, read_header
from nvembed.model.placement import DeviceMap
from nvembed.model.transformer_load import load_transformer


def with_adapters(model: PreTrainedModel, settings: Any) -> Any:
    """Put fresh adapters on a model, in place, by a configuration of peft; a ``PeftModel``."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft reads a property that transformers 5 has renamed; nothing a user could do about.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        # Of an int8 base: that adapters could not be merged into it, which nobody does.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        return get_peft_model(model, settings)


def load_adapted(
    source: ModelSource, dtype: torch.dtype | str | None, device_map: DeviceMap | None
) -> tuple[PreTrainedModel, Any]:
    """The base of an adapter's folder with the adapters merged, and the base's tokenizer.

    They are added in float32, since what they add is small beside the weights, and rounded to
    ``dtype`` afterwards; ``None`` and ``"auto"`` are float32.
    """
    from peft import PeftConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    place = source.place
    file = source.require(ADAPTER)
    folder = source.require(ADAPTER_CONFIG).parent
    found = find_base(source)
    load = load_adapted if read_bases(found) else load_transformer
    base, tokenizer = load(found, torch.float32, device_map)
    stored = read_header(file)
    with loading(place, expected="adapters of peft"):
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        settings.base_model_name_or_path = base.name_or_path  # peft warns where it is another
        adapted = with_adapters(base, settings)
        needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    sizes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    shapes = {
        name: (list(tensor.shape), list(sizes[name]))
        for name, tensor in stored.items()
        if name in sizes and tensor.shape != sizes[name]
    }
    Misfit([*sizes.keys() - stored.keys()], [*stored.keys() - sizes.keys()], shapes).check(place)
    with loading(place, expected="adapters of peft"):
        set_peft_model_state_dict(adapted, load_file(file))
        merged: Any = adapted.merge_and_unload()
    check_finite(merged, where=place)
    if dtype not in (None, "auto"):
        merged.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return merged, tokenizer
