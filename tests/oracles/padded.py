"""Slow restatements of the model: padded batches, loops over texts and heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import AutoModel

from nvembed.model.pooling import LatentAttention
from nvembed.model.tokens import TokenizedText


def padded_hidden(
    folder: str, texts: list[TokenizedText], *, causal: bool, side: str = "right"
) -> list[Tensor]:
    """States of each text from a padded batch through the family's own eager attention.

    The 4-D additive mask is built here, so neither our attention nor transformers' mask code is
    used.
    """
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.config.use_cache = False
    model.eval()
    width = max(len(text) for text in texts)
    ids_BL = torch.zeros(len(texts), width, dtype=torch.long)
    real_BL = torch.zeros(len(texts), width, dtype=torch.bool)
    position_BL = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        first = 0 if side == "right" else width - len(text)
        ids_BL[row, first : first + len(text)] = torch.tensor(text.ids)
        real_BL[row, first : first + len(text)] = True
        position_BL[row, first : first + len(text)] = torch.arange(len(text))
    seen_BLL = real_BL[:, None, :].expand(-1, width, -1).clone()
    if causal:
        seen_BLL &= torch.ones(width, width, dtype=torch.bool).tril()
    mask_B1LL = torch.zeros(len(texts), 1, width, width)
    mask_B1LL.masked_fill_(~seen_BLL[:, None], torch.finfo(torch.float32).min)
    layer_types = getattr(model.config, "layer_types", None)
    mask: object = mask_B1LL
    by_kind = ("gemma2", "gemma3_text", "qwen2", "qwen3", "modernbert")
    if layer_types and model.config.model_type in by_kind:
        # These take one mask per kind of layer; ours is full attention in all of them.
        mask = dict.fromkeys(set(layer_types) | {"full_attention", "sliding_attention"}, mask_B1LL)
    with torch.no_grad():
        hidden_BLD = model(
            input_ids=ids_BL, attention_mask=mask, position_ids=position_BL
        ).last_hidden_state
    return [hidden_BLD[row][real_BL[row]] for row in range(len(texts))]


def mean(hidden_LD: Tensor, pool_start: int) -> Tensor:
    """Mean of the pooled tokens of one text, by a loop."""
    total = torch.zeros(hidden_LD.shape[1])
    for position in range(pool_start, len(hidden_LD)):
        total = total + hidden_LD[position]
    return total / (len(hidden_LD) - pool_start)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm written out, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def geglu(x: Tensor, layer: torch.nn.Module) -> Tensor:
    """The MLP with the exact (erf) GELU written out."""
    inner = x @ layer.up.weight.T + layer.up.bias
    half = inner.shape[-1] // 2
    value, gate = inner[..., :half], inner[..., half:]
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    return (value * gelu) @ layer.down.weight.T + layer.down.bias


def latent_attention(layer: LatentAttention, hidden_LD: Tensor) -> Tensor:
    """Latent attention token by token and head by head, as in the released code."""
    latents = layer_norm(layer.latents_RD, layer.norm_latents.weight, layer.norm_latents.bias)
    inner = layer.num_heads * layer.head_width
    key = latents @ layer.to_key_value.weight[:inner].T
    value = latents @ layer.to_key_value.weight[inner:].T
    rows = []
    for x in hidden_LD:
        query = layer.to_query.weight @ layer_norm(
            x, layer.norm_query.weight, layer.norm_query.bias
        )
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * layer.head_width, (head + 1) * layer.head_width)
            score = key[:, part] @ query[part] / math.sqrt(layer.head_width)
            weight = torch.exp(score - score.max())
            heads.append((weight / weight.sum()) @ value[:, part])
        mixed = x + layer.to_out.weight @ torch.cat(heads)
        normed = layer_norm(mixed, layer.norm_feed_forward.weight, layer.norm_feed_forward.bias)
        rows.append(mixed + geglu(normed, layer.feed_forward))
    return torch.stack(rows)
