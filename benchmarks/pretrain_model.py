"""The decoder that is pretrained: Mistral's equations in plain torch, fast on CPU and GPU.

The weights are float32 and used in the dtype that is fastest on the machine; the logits of the
vocabulary exist for a part of the tokens at a time only. `export_folder` writes what transformers
loads as `MistralForCausalLM`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nvembed.core.files import atomic_folder


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder; the defaults are those of `assets/decoder-6m`."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of tied-embedding logits, one chunk of tokens at a time.

    The gradients are computed with the loss, so the logits of a chunk are never kept.
    """

    @staticmethod
    def forward(ctx: Any, states_TD: Tensor, table_VD: Tensor, targets_T: Tensor) -> Tensor:
        """Return the mean loss in nats over the T tokens."""
        count = targets_T.numel()
        half_VD = table_VD.to(states_TD.dtype)
        needs_gradient = any(ctx.needs_input_grad[:2])
        state_gradients: list[Tensor] = []
        table_gradient_VD = torch.zeros_like(table_VD) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=states_TD.device)
        for states, targets in zip(states_TD.split(512), targets_T.split(512), strict=True):
            probabilities = (states @ half_VD.T).float().softmax(dim=-1)
            picked = probabilities.gather(1, targets[:, None])
            total -= picked.clamp_min(1e-30).log().sum()
            if table_gradient_VD is not None:
                probabilities.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0))
                half = probabilities.to(states.dtype)
                state_gradients.append(half @ half_VD)
                table_gradient_VD += half.T @ states
        if table_gradient_VD is not None:
            ctx.save_for_backward(torch.cat(state_gradients), table_gradient_VD)
            ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the gradients of the forward pass."""
        state_gradient_TD, table_gradient_VD = ctx.saved_tensors
        scale = gradients[0] / ctx.count
        return state_gradient_TD * scale, table_gradient_VD * scale, None


class RootMeanSquareNorm(nn.Module):
    """RMSNorm with float32 statistics."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(states.dtype)


class Linear(nn.Linear):
    """A bias-free linear map whose float32 weight is used in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight.to(states.dtype))


def rotate(states_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Apply rotary positions in transformers' half-split layout."""
    first, second = states_BHTD.chunk(2, dim=-1)
    return torch.cat(
        (first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD), dim=-1
    )  # fmt: skip


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, queries)
        self.k_proj = Linear(shape.hidden_size, keys)
        self.v_proj = Linear(shape.hidden_size, keys)
        self.o_proj = Linear(queries, shape.hidden_size)

    def forward(self, states_BTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        batch, length, _ = states_BTD.shape
        split = (batch, length, -1, self.shape.head_dim)
        query = rotate(self.q_proj(states_BTD).view(split).transpose(1, 2), cos_TD, sin_TD)
        key = rotate(self.k_proj(states_BTD).view(split).transpose(1, 2), cos_TD, sin_TD)
        value = self.v_proj(states_BTD).view(split).transpose(1, 2)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            is_causal=True,
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm = RootMeanSquareNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RootMeanSquareNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, states: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), cos_TD, sin_TD)
        return states + self.mlp(self.post_attention_layernorm(states))


class PretrainDecoder(nn.Module):
    """Mistral with tied embeddings; parameter names are those of transformers' `model.` part."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RootMeanSquareNorm(shape.hidden_size, shape.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * shape.num_hidden_layers) ** 0.5)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the normed last states, (B, T, D)."""
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** (-torch.arange(half, device=ids_BT.device) / half)
        angles = torch.arange(ids_BT.shape[1], device=ids_BT.device)[:, None] * rates
        cos_TD, sin_TD = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        states = F.embedding(ids_BT, self.embed_tokens.weight).to(self.dtype)
        for layer in self.layers:
            states = layer(states, cos_TD, sin_TD)
        return self.norm(states)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean next-token loss in nats."""
        states_TD = self(ids_BT).reshape(-1, self.shape.hidden_size)
        loss: Tensor = ChunkedCrossEntropy.apply(
            states_TD, self.embed_tokens.weight, targets_BT.reshape(-1)
        )
        return loss


def mistral_config(shape: DecoderShape) -> dict[str, Any]:
    """Return the `config.json` of a decoder."""
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "mistral",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pad_token_id": 2,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def export_folder(model: PretrainDecoder, tokenizer_file: Path, target: Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, all or nothing.

    Other files that already lie in `target`, such as its README, are kept.
    """
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    tokenizer_config = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": model.shape.max_position_embeddings,
        "pad_token": "</s>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }
    generation_config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with atomic_folder(target) as folder:
        if target.exists():
            shutil.copytree(target, folder, dirs_exist_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        for name, value in (
            ("config.json", mistral_config(model.shape)),
            ("tokenizer_config.json", tokenizer_config),
            ("generation_config.json", generation_config),
        ):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
