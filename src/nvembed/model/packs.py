"""From texts to packs, and from packs to vectors: the forwards of training and encoding.

Next file: ``model/encoding.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import Tensor
from torch.nn.functional import normalize

from nvembed.kernels.layers import keep_freed_memory
from nvembed.model.backbone import Backbone
from nvembed.model.packing import Segments, flatten, plan_packs
from nvembed.model.pooling import Pooling
from nvembed.model.settings import LongTexts
from nvembed.model.tokens import Span, TokenizedText, text_contexts, text_windows

# Tokens per forward in encode. On a CPU a pack should stay in its caches; a GPU wants to be filled.
CPU_PACK_TOKENS = 1024
CUDA_PACK_TOKENS = 16384


class PackModel(SentenceTransformer):
    """A backbone, a pooling and a normalisation."""

    @property
    def backbone(self) -> Backbone:
        """The first module."""
        module = self[0]
        assert isinstance(module, Backbone)
        return module

    @property
    def pooling(self) -> Pooling:
        """The second module."""
        module = self[1]
        assert isinstance(module, Pooling)
        return module

    @property
    def dimension(self) -> int:
        """Width of the embeddings, after truncation where ``truncate_dim`` is set."""
        width = self.pooling.width
        return width if self.truncate_dim is None else min(width, self.truncate_dim)


@dataclass(frozen=True, slots=True)
class Plan:
    """Texts, tokenised and planned; a unit is a text, a window of one, or several chunks."""

    units: list[TokenizedText]
    unit_texts: list[int]  # the text of each unit, rising
    chunks: list[tuple[int, ...]] | None  # lengths in each unit; None where it has one vector
    spans: list[tuple[Span, ...]]  # of the chunks of each text; empty where it has one vector
    packs: list[list[int]]  # the units of each forward

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(map(len, self.units))

    def ends_text(self, unit: int) -> bool:
        """Whether no unit of the same text comes after it."""
        texts = self.unit_texts
        return unit + 1 == len(texts) or texts[unit + 1] != texts[unit]

    def order(self) -> list[int]:
        """The row of each vector, in the order in which packs give them."""
        units = [unit for pack in self.packs for unit in pack]
        return units if self.chunks is None else rows_of(units, list(map(len, self.chunks)))


def rows_of(places: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Rows of vectors, place by place, where each ``place`` has ``counts[place]`` of them."""
    starts = [0, *accumulate(counts)]
    return [row for place in places for row in range(starts[place], starts[place + 1])]


def plan_texts(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: str,
    long: LongTexts,
    budget: int,
    cuts: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Tokenise texts that share a prompt, and plan packs of at most ``budget`` tokens.

    ``cuts`` as in ``text_contexts``, for late chunking.
    """
    tokenizer = backbone.text_tokenizer
    spans: list[tuple[Span, ...]] = []
    chunks: list[tuple[int, ...]] | None = None
    if long.way == "late":
        limit = long.max_tokens or backbone.max_positions or backbone.max_tokens
        contexts = text_contexts(
            tokenizer, texts, prompt, chunk_tokens=long.chunk_tokens, max_tokens=limit, cuts=cuts
        )
        units_of = [[context.text for context in mine] for mine in contexts]
        chunks = [context.chunks for mine in contexts for context in mine]
        spans = [tuple(span for c in mine for span in c.spans) for mine in contexts]
    elif long.way == "windows":
        units_of = text_windows(tokenizer, texts, prompt, long.overlap)
    else:
        units_of = [[text] for text in backbone.tokenize_texts(texts, prompt)]
    units = [unit for mine in units_of for unit in mine]
    unit_texts = [text for text, mine in enumerate(units_of) for _ in mine]
    packs = plan_packs(list(map(len, units)), budget)
    return Plan(units, unit_texts, chunks, spans, packs)


def embed_plan(
    model: PackModel, plan: Plan, done: Callable[[int, int], None] = lambda texts, tokens: None
) -> Tensor:
    """Run the packs of a plan of at least one text: ``(N, D)`` of length 1, per text or chunk.

    ``done`` is told after each pack how many texts it ended, and how many tokens it had.
    """
    found = []
    for pack in plan.packs:
        units = [plan.units[unit] for unit in pack]
        if plan.chunks is None:
            found.append(embed_filled(model, units))
        else:
            found.append(embed_chunks(model, units, [plan.chunks[unit] for unit in pack]))
        done(sum(map(plan.ends_text, pack)), sum(map(len, units)))
    rows_ND = _in_order(torch.cat(found), plan.order())
    if plan.chunks is None and len(plan.units) > plan.unit_texts[-1] + 1:
        return _mean_of_windows(rows_ND, plan)
    return rows_ND


@torch.inference_mode()
def embed_short(model: PackModel, texts: list[str]) -> Tensor:
    """Embed a few short texts as ``encode`` does: ``(N, D)`` of length 1."""
    plan = plan_texts(model.backbone, texts, "", LongTexts(), CPU_PACK_TOKENS)
    model.eval()
    with model.pooling.fixed_weights():
        return embed_plan(model, plan)


def pack_features(model: torch.nn.Module, texts: Sequence[TokenizedText]) -> dict[str, Tensor]:
    """The only forward of training and encoding.

    ``sentence_embedding`` ``(N, D)`` of length 1, a row per text, and ``token_embeddings``.
    """
    found: dict[str, Tensor] = model({"flat": flatten(texts)})
    return found


def embed_pack(model: torch.nn.Module, texts: Sequence[TokenizedText]) -> Tensor:
    """The embeddings ``(N, D)`` alone."""
    return pack_features(model, texts)["sentence_embedding"]


def pool_pack(model: PackModel, texts: Sequence[TokenizedText]) -> Tensor:
    """``embed_pack`` without the normalisation: ``(N, D)`` as the pooling gives them."""
    features: dict[str, Any] = {"flat": flatten(texts)}
    for module in model:
        if not isinstance(module, Normalize):
            features = module(features)
    return features["sentence_embedding"]


def embed_filled(
    model: PackModel, texts: Sequence[TokenizedText], *, normalized: bool = True
) -> Tensor:
    """``embed_pack`` for encoding: on a CPU the pack is filled up to one of few lengths.

    oneDNN makes a program for every new shape: half as long again, 800 MB for 500 lengths.
    """
    forward = embed_pack if normalized else pool_pack
    if model.device.type != "cpu":
        return forward(model, texts)
    keep_freed_memory()
    return forward(model, [*texts, *filler(sum(map(len, texts)))])[: len(texts)]


def filler(tokens: int) -> list[TokenizedText]:
    """A text that brings the tokens of a pack to one of few numbers, a few percent more."""
    step = 1 << min(7, max(3, tokens.bit_length() - 4))  # 8 to 128
    missing = -tokens % step
    return [TokenizedText((0,) * missing, 0)] if missing else []


def embed_chunks(
    model: PackModel, texts: Sequence[TokenizedText], chunks: Sequence[tuple[int, ...]]
) -> Tensor:
    """The forward of late chunking: attention over whole texts, pooling over their chunks.

    ``(C, D)`` of length 1, in the order of ``texts``; ``chunks`` are lengths in tokens.
    """
    flat = flatten(texts).to(model.backbone.device)
    hidden_TD = model.backbone.hidden(flat)
    lengths = [length for row in flat.order for length in chunks[row]]
    segments = Segments.of_lengths(lengths, device=hidden_TD.device)
    features: dict[str, Any] = {
        "sentence_embedding": model.pooling.pool(hidden_TD, flat.pool_mask_T, segments)
    }
    for module in list(model)[2:]:
        features = module(features)
    order = rows_of(flat.order, list(map(len, chunks)))
    return _in_order(features["sentence_embedding"], order)


def _in_order(rows_ND: Tensor, order: Sequence[int]) -> Tensor:
    """Put each row to its place."""
    place_N = torch.tensor(order, device=rows_ND.device)
    return torch.empty_like(rows_ND).index_copy_(0, place_N, rows_ND)


def _mean_of_windows(rows_UD: Tensor, plan: Plan) -> Tensor:
    """Per text the mean of its windows' vectors, weighted by pooled tokens, at length 1."""
    device = rows_UD.device
    text_U = torch.tensor(plan.unit_texts, device=device)
    weights = [float(len(unit) - unit.pool_start) for unit in plan.units]
    weight_U = torch.tensor(weights, device=device)
    sums_ND = rows_UD.new_zeros((plan.unit_texts[-1] + 1, rows_UD.shape[1]), dtype=torch.float32)
    sums_ND.index_add_(0, text_U, rows_UD.float() * weight_U[:, None])
    means_ND = normalize(sums_ND, dim=1).to(rows_UD.dtype)
    # A text of one window keeps its vector to the bit.
    single_U = torch.bincount(text_U)[text_U] == 1
    means_ND[text_U[single_U]] = rows_UD[single_U]
    return means_ND
