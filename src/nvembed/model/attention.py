"""Attention over the segments of a flat batch, behind transformers' ``AttentionInterface``.

transformers builds no mask and hands queries, keys and values of the whole pack to
``flat_attention``, which lets a token see its own segment only. Sliding windows are ignored: an
embedding needs the whole text. Probes run a model and find its direction and pooled tokens.
Letters: T tokens, H heads, K key/value heads, E head width, G segments of one block, L length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from nvembed.core.errors import ModelError
from nvembed.kernels import attention as kernels
from nvembed.kernels import functions
from nvembed.model.packing import Segments
from nvembed.model.settings import AttentionDirection

FLAT_ATTENTION = "nvembed_flat"

OTHER_BACKBONE = (
    "Choose another backbone (Mistral, Llama, Qwen, Gemma, Phi, BERT and ModernBERT work)"
)

# Arguments that change what attention computes and that this backend does not implement.
_UNSUPPORTED = ("s_aux", "position_bias", "sinks")

# On a CPU, up to this length two batched products with a softmax between are faster than SDPA's
# fused kernel, whose products are slow in bfloat16: 4,096 tokens in texts of 256, forward and
# backward, 13 against 37 ms; of 512, 22 against 55. In float32 it is the other way round: 57
# against 33 and 134 against 64; at 128, 24 against 25 (docs/log.md). Float32 in both directions has
# a kernel of its own: 6 to 14.
SHORT_TOKENS = {torch.bfloat16: 1024, torch.float16: 1024}
SHORT_TOKENS_FLOAT32 = 128


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    causal: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer, with ``scaling``, ``dropout``, ``softcap``.

    Shapes: query ``(1, H, T, E)``, key and value ``(1, K, T, E)``; returns ``(1, T, H, E)``. A
    ModelError where a backbone asks for what would silently be left out.
    """
    scaling: float | None = options.get("scaling")
    dropout, softcap = options.get("dropout") or 0.0, options.get("softcap")
    kernels.checked_scaling(scaling, query.shape[-1])
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if asked:
        raise ModelError(
            f"{type(module).__name__} needs {', '.join(asked)} in attention",
            expected="a backbone whose attention is a plain softmax over keys",
            hint=OTHER_BACKBONE,
        )
    inputs = (query[0], key[0], value[0])
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # The angles of a residual in float32 make queries and keys float32; values are in 16 bits.
        dtype = torch.get_autocast_dtype("cuda")
        inputs = (inputs[0].to(dtype), inputs[1].to(dtype), inputs[2].to(dtype))
    plain = not (softcap or dropout)
    starts = segments.cu_seqlens
    if plain and query.is_cuda and _varlen_takes(inputs[0]):
        out_THE = _varlen(*inputs, segments, causal, scaling)
    elif plain and not causal and kernels.supports_float32(*inputs):
        out_THE = kernels.float32_attention(*inputs, starts, scaling)
    elif plain and _trains_short(module, inputs, segments):
        scale = kernels.checked_scaling(scaling, query.shape[-1])
        out_THE = ShortAttention.apply(segments, causal, scale, *inputs)
    elif plain and kernels.supports_bfloat16(*inputs):
        out_THE = kernels.bfloat16_attention(*inputs, starts, causal=causal, scaling=scaling)
    else:
        out_THE = _grouped(*inputs, segments, causal, scaling, dropout, softcap)
    return out_THE[None], None


AttentionInterface.register(FLAT_ATTENTION, flat_attention)


def short_tokens(dtype: torch.dtype) -> int:
    """Longest text whose scores a CPU holds in bidirectional attention; our kernel holds none."""
    no_scores = dtype is torch.float32 and kernels.float32_available()
    return 0 if no_scores else _longest_by_products(dtype)


def _longest_by_products(dtype: torch.dtype) -> int:
    return SHORT_TOKENS.get(dtype, SHORT_TOKENS_FLOAT32)


def _varlen_takes(query_HTE: Tensor) -> bool:
    """Whether the type and the head width are those of torch's flash attention."""
    width = query_HTE.shape[-1]
    return query_HTE.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0


@cache
def _says_gqa(attend: Callable[..., Any]) -> bool:
    """Whether fewer key heads must be announced: torch 2.11 took them without a word."""
    return "enable_gqa" in inspect.signature(attend).parameters


def _varlen(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    segments: Segments,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # absent from CPU-only builds of torch

    starts = segments.cu_seqlens.to(query_HTE.device)  # elsewhere where layers lie on several GPUs
    longest = max(segments.lengths)
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query_HTE, key_HTE, value_HTE))
    grouped = len(key_HTE) != len(query_HTE)
    options: dict[str, Any] = {"enable_gqa": grouped} if _says_gqa(varlen_attn) else {}
    out = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def _grouped(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    segments: Segments,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    outputs = []
    for q, k, v in _blocks((query_HTE, key_HTE, value_HTE), segments):
        if softcap or (q.device.type == "cpu" and q.shape[2] <= _longest_by_products(q.dtype)):
            out_GHLE = block_attention(
                q, k, v, causal=causal, scaling=scaling, dropout=dropout, softcap=softcap
            )
        else:
            out_GHLE = nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=dropout,
                is_causal=causal,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out_GHLE.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def block_attention(
    query_GHLE: Tensor,
    key_GKLE: Tensor,
    value_GKLE: Tensor,
    *,
    causal: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    seen_GL: Tensor | None = None,
) -> Tensor:
    """Plain attention of one block of texts of equal length; keys are never repeated.

    ``softcap`` is Gemma 2's ``cap * tanh(score / cap)``; ``seen_GL`` is False for padding of an
    exported graph.
    """
    length, width = query_GHLE.shape[2:]
    num_key_heads = key_GKLE.shape[1]
    scale = scaling if scaling is not None else width**-0.5
    query_GKRE = query_GHLE.unflatten(1, (num_key_heads, -1)).flatten(2, 3)
    score_GKRL = (query_GKRE * scale) @ key_GKLE.transpose(-1, -2)
    if softcap:
        score_GKRL = softcap * torch.tanh(score_GKRL / softcap)
    if seen_GL is not None:
        score_GKRL = score_GKRL.masked_fill(~seen_GL[:, None, None], float("-inf"))
    if causal:
        score_GKRL = score_GKRL.masked_fill(_later(score_GKRL), float("-inf"))
    # Under autocast softmax gives float32; the product with the values takes their type again.
    weight_GKRL = score_GKRL.softmax(-1).to(value_GKLE.dtype)
    if dropout:
        weight_GKRL = nn.functional.dropout(weight_GKRL, dropout)
    return (weight_GKRL @ value_GKLE).unflatten(2, (-1, length)).flatten(1, 2)


def _later(score_GKRL: Tensor) -> Tensor:
    """Where a key comes after its query, ``(R, L)``."""
    num_rows, length = score_GKRL.shape[-2:]
    later_LL = torch.ones(length, length, dtype=torch.bool, device=score_GKRL.device).triu(1)
    return later_LL.repeat(num_rows // length, 1)


def _trains_short(module: nn.Module, inputs: Sequence[Tensor], segments: Segments) -> bool:
    # In training without gradient too: a pack that is computed again has to have the same bits.
    needed = torch.is_grad_enabled() and any(x_HTE.requires_grad for x_HTE in inputs)
    fits = functions.takes_softmax(*inputs, longest=max(segments.lengths))
    return fits and (needed or module.training)


class ShortAttention(torch.autograd.Function):
    """Attention of short texts in bfloat16 by products, a softmax of compiled code between them.

    Queries, keys and values are kept, and no scores: they are computed again on the way back.
    """

    @staticmethod
    def forward(ctx: Any, segments: Segments, causal: bool, scale: float, *qkv: Tensor) -> Tensor:
        """``(H, T, E)`` and twice ``(K, T, E)`` to ``(T, H, E)``."""
        ctx.save_for_backward(*qkv)
        ctx.settings = segments, causal, scale
        found = []
        with torch.autocast("cpu", enabled=False):
            for query_GKRE, key_GKLE, value_GKLE in _grouped_blocks(qkv, segments):
                weight_GKRL = _weights(query_GKRE, key_GKLE, causal, scale)
                out_GKRE = weight_GKRL @ value_GKLE
                found.append(_tokens(out_GKRE, key_GKLE.shape[2]).transpose(0, 1))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of queries, keys and values."""
        segments, causal, scale = ctx.settings
        tensors = (*ctx.saved_tensors, gradients[0].transpose(0, 1))
        found = []
        with torch.autocast("cpu", enabled=False):
            for block in _grouped_blocks(tensors, segments):
                query_GKRE, key_GKLE, value_GKLE, d_out_GKRE = block
                weight_GKRL = _weights(query_GKRE, key_GKLE, causal, scale)
                d_value_GKLE = weight_GKRL.transpose(-1, -2) @ d_out_GKRE
                d_weight_GKRL = (d_out_GKRE @ value_GKLE.transpose(-1, -2)).contiguous()
                d_score_GKRL = functions.softmax_backward_(weight_GKRL, d_weight_GKRL, scale)
                d_query_GKRE = d_score_GKRL @ key_GKLE
                d_key_GKLE = d_score_GKRL.transpose(-1, -2) @ query_GKRE
                back = (d_query_GKRE, d_key_GKLE, d_value_GKLE)
                found.append([_tokens(x_GKRE, key_GKLE.shape[2]) for x_GKRE in back])
        return None, None, None, *(torch.cat(each, dim=1) for each in zip(*found, strict=True))


def _blocks(tensors: Sequence[Tensor], segments: Segments) -> Iterator[list[Tensor]]:
    """Cut ``(H, T, E)`` into blocks ``(G, H, L, E)`` of texts of one length."""
    runs = segments.runs()
    # One split and not a slice per run: the gradient of a split is one concatenation, that of a
    # slice fills the whole pack with zeros, once for every run.
    sizes = [count * length for _, count, length in runs]
    parts = [x_HTE.split(sizes, dim=1) for x_HTE in tensors]
    for number, (_, count, length) in enumerate(runs):
        yield [part[number].unflatten(1, (count, length)).transpose(0, 1) for part in parts]


def _grouped_blocks(tensors: Sequence[Tensor], segments: Segments) -> Iterator[list[Tensor]]:
    """The same with the heads of one key head as further rows, ``(G, K, R, E)``."""
    num_key_heads = tensors[1].shape[0]
    for block in _blocks(tensors, segments):
        yield [x_GHLE.unflatten(1, (num_key_heads, -1)).flatten(2, 3) for x_GHLE in block]


def _tokens(x_GKRE: Tensor, length: int) -> Tensor:
    """The ``(H, T, E)`` of a block again."""
    return x_GKRE.unflatten(2, (-1, length)).flatten(1, 2).transpose(0, 1).flatten(1, 2)


def _weights(query_GKRE: Tensor, key_GKLE: Tensor, causal: bool, scale: float) -> Tensor:
    score_GKRL = (query_GKRE @ key_GKLE.transpose(-1, -2)).contiguous()
    if causal:
        score_GKRL.masked_fill_(_later(score_GKRL), float("-inf"))
    return functions.softmax_(score_GKRL, scale)


# --- The probe ------------------------------------------------------------------------------------


class DirectionFinding(NamedTuple):
    """What ``probe_direction`` saw."""

    direction: AttentionDirection  # bidirectional if the last token moves the first state
    neighbours_seen: bool  # texts that are encoded together change each other


@torch.no_grad()
def probe_direction(
    states: Callable[[Sequence[Sequence[int]]], Tensor], vocabulary: int
) -> DirectionFinding:
    """Change the last token of a sequence and see whether the first state moves.

    ``states`` is the model: rows of token ids, the longer first, to states ``(T, D)``.
    """
    ids = [(7 * i + 11) % vocabulary for i in range(8)]
    changed = [*ids[:-1], (ids[-1] + vocabulary // 2) % vocabulary]
    first_TD, moved_TD, packed_TD = (states(rows) for rows in ([ids], [changed], [ids, ids[1:]]))
    scale = float(first_TD.float().std()) or 1.0
    seen = float((first_TD[0] - moved_TD[0]).float().abs().max()) / scale > 1e-6
    # Kernels round differently for other shapes; in 16 bit by up to some per cent of the spread.
    tolerance = 1e-3 if first_TD.dtype == torch.float32 else 0.1
    difference = float((first_TD - packed_TD[: len(ids)]).float().abs().max()) / scale
    return DirectionFinding("bidirectional" if seen else "causal", difference > tolerance)


def probe_pooled(modules: Sequence[nn.Module], features: dict[str, Any]) -> Tensor | None:
    """Find which token states enter the embedding of one text, bool ``(L,)`` without padding.

    They are those with a gradient. ``features`` are what the model's ``preprocess`` gave; ``None``
    if the model has no token states.
    """
    with torch.no_grad():
        features = modules[0](features)
    states = features.get("token_embeddings")
    if states is None:
        return None
    # Not an inference tensor and no view of one, so that a gradient can be taken.
    states = states.detach().clone().requires_grad_(True)
    features = {**features, "token_embeddings": states}
    with torch.enable_grad():
        for module in modules[1:]:
            features = module(features)
            if "sentence_embedding" in features:
                break
        embedding_D = features["sentence_embedding"].flatten().float()
        # Uneven weights: a plain sum could cancel, and does behind a layer norm.
        weight_D = torch.linspace(0.5, 1.5, embedding_D.numel(), device=embedding_D.device).sin()
        (gradient,) = torch.autograd.grad((embedding_D * weight_D).sum(), states)
    pooled = gradient.abs().amax(-1) > 0
    if "attention_mask" in features and pooled.dim() == 2:
        pooled = pooled[features["attention_mask"].bool()]
    return pooled.flatten().cpu()
