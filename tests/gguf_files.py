"""Tiny GGUF files, written from a model folder as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nvembed.interop.gguf import gguf_package

_PARTS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(architecture: str, name: str) -> str:
    """Name in a GGUF file of a tensor of a causal language model."""
    parts = {**_PARTS, **(_GEMMA if architecture.startswith("gemma") else {})}
    *_, part, ending = name.removeprefix("model.").rsplit(".", 1)
    if not part.startswith("layers."):
        return f"{parts[part]}.{ending}"
    _, number, inner = part.split(".", 2)
    return f"blk.{number}.{parts[inner]}.{ending}"


def rotated_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries or keys of Llama: dimensions that rotate together are put side by side."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path,
    path: Path,
    architecture: str,
    kind: str = "F32",
    pre: str = "gpt-2",
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Convert a folder with a causal language model and a byte-level tokenizer.

    Matrices are of ``kind`` where their rows are made of whole blocks, of F16 elsewhere.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, width = model.config, model.config.hidden_size
    writer = gguf_package().GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    writer.add_key_length(head_width)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    for key, value in (settings or {}).items():
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](key, value)
    _write_tokenizer(writer, folder, pre)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in name:
            values = rotated_apart(values, config.num_attention_heads)
        elif architecture == "llama" and "k_proj" in name:
            values = rotated_apart(values, config.num_key_value_heads)
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        _add(writer, gguf_name(architecture, name), values, kind)
    for name, values in (tensors or {}).items():
        _add(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    gguf = gguf_package()
    if values.ndim == 1:
        kind = "F32"
    elif kind.startswith("Q") and values.shape[-1] % 32:
        kind = "F16"
    wanted = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values, wanted), raw_dtype=wanted)


def _write_tokenizer(writer: Any, folder: Path, pre: str) -> None:
    # Of Qwen2 AutoTokenizer makes another one, with tokens of its own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for key in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{key}_token_id")) is not None:
            getattr(writer, f"add_{key}_token_id")(token)
