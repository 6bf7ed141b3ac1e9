"""Build a model from a folder in the official NV-Embed layout by mapping names by hand."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from sentence_transformers.base.modules import Normalize
from torch import Tensor
from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

from nvembed.model.attention import FLAT_ATTENTION
from nvembed.model.backbone import Backbone, prove_direction
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import LatentAttentionPooling

LATENT_NAMES = {
    "latents": "latents_RD",
    "cross_attend_blocks.0.norm": "norm_query",
    "cross_attend_blocks.0.norm_context": "norm_latents",
    "cross_attend_blocks.0.fn.to_q": "to_query",
    "cross_attend_blocks.0.fn.to_kv": "to_key_value",
    "cross_attend_blocks.0.fn.to_out": "to_out",
    "cross_attend_blocks.1.norm": "norm_feed_forward",
    "cross_attend_blocks.1.fn.net.0": "feed_forward.up",
    "cross_attend_blocks.1.fn.net.2": "feed_forward.down",
}
BACKBONE = "embedding_model."
LATENT = "latent_attention_model."


def _latent_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if name in LATENT_NAMES:
        return LATENT_NAMES[name]
    return f"{LATENT_NAMES[stem]}.{leaf}"


def load_official(folder: Path, max_tokens: int = 512) -> NVEmbed:
    """Official-layout weights in our modules, with the official token rules."""
    config = json.loads((folder / "config.json").read_text())
    text_config = {
        key: value
        for key, value in config["text_config"].items()
        if key not in ("model_type", "architectures", "torch_dtype", "pad_token_id")
    }
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    decoder_config = MistralConfig(**text_config)
    decoder_config._attn_implementation = FLAT_ATTENTION
    decoder_config.use_cache = False
    decoder = MistralModel(decoder_config)
    decoder.load_state_dict(
        {k.removeprefix(BACKBONE): v for k, v in weights.items() if k.startswith(BACKBONE)}
    )
    backbone = Backbone(
        decoder,
        # The file as it is: transformers 5 would rebuild the pre-tokenizer of a LlamaTokenizer.
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        ),
        max_tokens=max_tokens,
        text_style="official",
    )
    prove_direction(backbone, name=str(folder))
    latent = config["latent_attention_config"]
    pooling = LatentAttentionPooling(
        config["hidden_size"],
        latent["num_latents_value"],
        latent["num_cross_heads"],
        latent["cross_dim_head"],
    )
    pooling.layer.load_state_dict(
        {
            _latent_name(k.removeprefix(LATENT)): v
            for k, v in weights.items()
            if k.startswith(LATENT)
        }
    )
    return NVEmbed(modules=[backbone.float(), pooling.float(), Normalize()], device="cpu")
