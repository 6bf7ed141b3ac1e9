"""Tiny random models of many families, made in memory and saved to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 4}
# name -> (configuration class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {**GROUPED, **WINDOW}),
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": (
        "Qwen2Config",
        {**GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**GROUPED, **WINDOW, "head_dim": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 2}),
    "smollm3": ("SmolLM3Config", {**GROUPED, "pad_token_id": 2}),
    "bert": ("BertConfig", {}),
    "modernbert": ("ModernBertConfig", {"local_attention": 4, "pad_token_id": 2}),
}
DECODERS = [name for name in FAMILIES if name not in ("bert", "modernbert")]


def make_family(name: str, folder: Path, tokenizer: Any) -> Path:
    """Save a random model of a family with the tokenizer."""
    class_name, changes = FAMILIES[name]
    config = getattr(transformers, class_name)(
        **{**COMMON, **changes},
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        **({} if "pad_token_id" in changes else {"pad_token_id": None}),
    )
    auto = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
