"""The layout of ``nvidia/NV-Embed-v1`` and ``-v2``: names of the weights and configuration.

One table serves loading and exporting; its facts are those of the released files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import MistralConfig

from nvembed.core.errors import ModelError
from nvembed.interop.model_folder import OFFICIAL_TYPE

# Official name, ours in ``NVEmbed`` (module 0 is the backbone, 1 the pooling). A name that ends in
# a dot stands for all that begin so; below embedding_model. both sides use transformers' names.
NAMES = (
    ("embedding_model.", "0.model."),
    ("latent_attention_model.latents", "1.layer.latents_RD"),
    ("latent_attention_model.cross_attend_blocks.0.norm.", "1.layer.norm_query."),
    ("latent_attention_model.cross_attend_blocks.0.norm_context.", "1.layer.norm_latents."),
    ("latent_attention_model.cross_attend_blocks.0.fn.to_q.", "1.layer.to_query."),
    ("latent_attention_model.cross_attend_blocks.0.fn.to_kv.", "1.layer.to_key_value."),
    ("latent_attention_model.cross_attend_blocks.0.fn.to_out.", "1.layer.to_out."),
    ("latent_attention_model.cross_attend_blocks.1.norm.", "1.layer.norm_feed_forward."),
    ("latent_attention_model.cross_attend_blocks.1.fn.net.0.", "1.layer.feed_forward.up."),
    ("latent_attention_model.cross_attend_blocks.1.fn.net.2.", "1.layer.feed_forward.down."),
)

# What the model needs of text_config. Not among them: sliding_window, which the released code never
# applies, and use_cache.
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "rope_theta", "attention_dropout"),
    *("bos_token_id", "eos_token_id"),
)
_MISTRAL_TYPES = ("bidir_mistral", "mistral")

# What else the configuration may say and this package does not do; the released files say this.
_FIXED = {"is_mask_instruction": True, "padding_side": "right", "mask_type": "b"}

# The code of the released model stays where it is: a folder that we write refers to it.
_AUTO_MAP = {
    "AutoConfig": "nvidia/NV-Embed-v2--configuration_nvembed.NVEmbedConfig",
    "AutoModel": "nvidia/NV-Embed-v2--modeling_nvembed.NVEmbedModel",
}
SLIDING_WINDOW = 4096


class LatentShape(NamedTuple):
    """Sizes of the latent attention layer; the defaults are those of the released code."""

    num_latents: int = 512
    num_heads: int = 8
    head_width: int = 4096


def official_name(own: str) -> str | None:
    """The official name of one of our tensors; ``None`` where the layout has no place for it."""
    for official, ours in NAMES:
        if own == ours or (ours.endswith(".") and own.startswith(ours)):
            return official + own[len(ours) :]
    return None


def read_config(config: Mapping[str, Any], *, where: str) -> tuple[MistralConfig, LatentShape]:
    """Backbone configuration and sizes of the latent layer from an official ``config.json``."""
    text, latent = (config.get(key) for key in ("text_config", "latent_attention_config"))
    for key, part in (("text_config", text), ("latent_attention_config", latent)):
        if not isinstance(part, dict):
            raise ModelError(
                f"{key} is missing",
                where=where,
                expected="text_config and latent_attention_config, as in nvidia/NV-Embed-v2",
                hint="Download the folder again, completely",
            )
    assert text is not None
    assert latent is not None
    if text.get("model_type") not in _MISTRAL_TYPES:
        raise ModelError(
            f"unknown model_type {text.get('model_type')!r} in text_config",
            where=where,
            expected=" or ".join(_MISTRAL_TYPES),
        )
    found = {key: config.get(key, wanted) for key, wanted in _FIXED.items()}
    found["output_normalize"] = latent.get("output_normalize", True)
    for key, wanted in {**_FIXED, "output_normalize": True}.items():
        if found[key] != wanted:
            raise ModelError(f"{key} is {found[key]!r}", where=where, expected=repr(wanted))
    decoder = MistralConfig(
        **{key: text[key] for key in _TEXT_KEYS if key in text},
        sliding_window=None,
        pad_token_id=None,
        use_cache=False,
    )
    width = decoder.hidden_size
    for key in ("hidden_dim", "latent_dim"):
        # Their default; given in the file only where a model is of another size.
        if latent.get(key, 4096) != width:
            raise ModelError(
                f"latent_attention_config.{key} is {latent.get(key, 4096)}",
                where=where,
                expected=f"the hidden size of text_config, {width}",
            )
    keys = {
        "num_latents": "num_latents_value",
        "num_heads": "num_cross_heads",
        "head_width": "cross_dim_head",
    }
    sizes = {ours: latent[theirs] for ours, theirs in keys.items() if theirs in latent}
    return decoder, LatentShape(**sizes)


def write_config(
    decoder: MistralConfig, latent: LatentShape, *, dtype: torch.dtype, tokenizer_path: str
) -> dict[str, Any]:
    """An official ``config.json``; the official code loads a tokenizer from ``tokenizer_path``."""
    dtype_name = str(dtype).removeprefix("torch.")
    values = decoder.to_dict()
    values["rope_theta"] = values["rope_parameters"]["rope_theta"]
    text = {key: values[key] for key in _TEXT_KEYS}
    return {
        "_name_or_path": tokenizer_path,
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "auto_map": _AUTO_MAP,
        "hidden_size": decoder.hidden_size,
        **_FIXED,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": latent.num_latents,
            "num_cross_heads": latent.num_heads,
            "output_normalize": True,
            "hidden_dim": decoder.hidden_size,
            "latent_dim": decoder.hidden_size,
            "cross_dim_head": latent.head_width,
        },
        "model_type": OFFICIAL_TYPE,
        "text_config": {
            "_name_or_path": tokenizer_path,
            "architectures": ["MistralModel"],
            "model_type": _MISTRAL_TYPES[0],
            **text,
            "pad_token_id": None,
            "sliding_window": SLIDING_WINDOW,
            "tie_word_embeddings": False,
            "torch_dtype": dtype_name,
            "use_cache": True,
        },
        "torch_dtype": dtype_name,
        "transformers_version": "4.42.4",
    }
