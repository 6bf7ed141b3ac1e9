"""Folders in the layout of nvidia/NV-Embed-v2 with random weights, written without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FULL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def official_tensors(
    size: dict[str, int], latents: int = 512, heads: int = 8, head_width: int = 4096
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in NVIDIA's release (arXiv 2405.17428)."""
    width, inner = size["hidden_size"], heads * head_width
    keys = size["num_key_value_heads"] * (width // size["num_attention_heads"])
    up = size["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embedding_model.embed_tokens.weight": (size["vocab_size"], width),
        "embedding_model.norm.weight": (width,),
    }
    for layer in range(size["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (up, width),
            "mlp.up_proj": (up, width),
            "mlp.down_proj": (width, up),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"embedding_model.layers.{layer}.{name}.weight"] = shape
    block = "latent_attention_model.cross_attend_blocks"
    for norm in (f"{block}.0.norm", f"{block}.0.norm_context", f"{block}.1.norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return shapes | {
        "latent_attention_model.latents": (latents, width),
        f"{block}.0.fn.to_q.weight": (inner, width),
        f"{block}.0.fn.to_kv.weight": (2 * inner, width),
        f"{block}.0.fn.to_out.weight": (width, inner),
        f"{block}.1.fn.net.0.weight": (8 * width, width),
        f"{block}.1.fn.net.0.bias": (8 * width,),
        f"{block}.1.fn.net.2.weight": (width, 4 * width),
        f"{block}.1.fn.net.2.bias": (width,),
    }


def official_config(size: dict[str, int], latent: dict[str, int]) -> dict[str, Any]:
    """A config.json as in NVIDIA's release (arXiv 2405.17428)."""
    return {
        "model_type": "nvembed",
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "hidden_size": size["hidden_size"],
        "add_eos": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
        "latent_attention_config": {"model_type": "latent_attention", **latent},
        "text_config": {
            **size,
            "model_type": "bidir_mistral",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4,  # the released code never applies it
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "torch_dtype": "float16",
    }


def write_official(folder: Path, tokenizer: Any, *, shards: int = 1) -> Path:
    """Write a small folder; ``tokenizer`` is the byte-level one of conftest."""
    folder.mkdir(parents=True, exist_ok=True)
    latent = {"num_latents_value": 8, "num_cross_heads": 2, "cross_dim_head": 16}
    latent |= {"hidden_dim": SMALL["hidden_size"], "latent_dim": SMALL["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(official_config(SMALL, latent)))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0)
        + 0.2 * torch.randn(shape, generator=generator)
        for name, shape in official_tensors(SMALL, latents=8, heads=2, head_width=16).items()
    }
    weights = {name: value.half() for name, value in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
        for shard in names:
            part = {name: weights[name] for name in weights if weight_map[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
