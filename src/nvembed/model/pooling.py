"""Poolings: from token states to one vector per text. Each is a sentence-transformers ``Module``.

They work on our flat batch and equally behind the padded ``Transformer`` of sentence-transformers.
The latent attention layer (paper s3.2; exact form of the released code) is position-wise:

    Xn = LayerNorm(X)    Zn = LayerNorm(latents)
    q = Wq Xn            k, v = split(Wkv Zn)
    Y = X + Wo · concat over heads of softmax(q kᵀ / √E) v
    H = Y + FF(LayerNorm(Y)),   FF(y) = W2 (a · gelu(b)) + c2,   [a, b] = W1 y + c1

Per head ``q kᵀ = Xn (k Wq)ᵀ`` and ``P v Woᵀ = P (v Woᵀ)``: the *folded* form needs two matrices of
``(heads · latents, width)`` instead of the wide projections. Next file: ``model/packs.py``.

Letters: T tokens of the pack, P of them pooled, N texts, D width, B × L a padded batch; of latent
attention R latents, H heads, E head width, S = H · R folded rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from nvembed.core.errors import ModelError
from nvembed.interop.model_folder import COPY_AGAIN, ModelSource
from nvembed.interop.saved import read_values
from nvembed.interop.weights import fill, stored_tensors
from nvembed.kernels.functions import product
from nvembed.model.attention import flat_attention
from nvembed.model.packing import Segments
from nvembed.model.settings import PoolingKind


def pooled_mean(hidden_PD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
    """Average of the pooled tokens of every segment, ``(N, D)`` float32; zeros without any."""
    lengths_N = segments.cu_seqlens.diff()
    rows_N = torch.arange(len(segments.lengths), device=hidden_PD.device)
    segment_P = rows_N.repeat_interleave(lengths_N, output_size=pool_mask_T.shape[0])[pool_mask_T]
    sums_ND = hidden_PD.new_zeros(
        (len(segments.lengths), hidden_PD.shape[1]), dtype=torch.float32
    ).index_add(0, segment_P, hidden_PD.float())
    counts_N = torch.bincount(segment_P, minlength=len(segments.lengths))
    return sums_ND / counts_N.clamp(min=1)[:, None]


class Folded(NamedTuple):
    """Latent cross attention with the projections folded into the latents."""

    score_SD: Tensor  # rows k_h Wq_h / √E, stacked over heads
    value_SD: Tensor  # rows v_h Wo_hᵀ, stacked over heads


class GegluFeedForward(nn.Module):
    """``Linear → a · gelu(b) → Linear`` with a hidden width of ``mult · D`` (NV-Embed: 4)."""

    def __init__(self, width: int, mult: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * mult * width)
        self.down = nn.Linear(mult * width, width)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Apply to ``(T, D)``."""
        value, gate = self.up(hidden_TD).chunk(2, dim=-1)
        return self.down(value * nn.functional.gelu(gate))


class LatentAttention(nn.Module):
    """Latent cross attention and MLP over token states; see ``LatentAttentionPooling``.

    Both output projections start at zero, so the model starts as plain mean pooling.
    """

    def __init__(
        self, width: int, num_latents: int = 512, num_heads: int = 8, head_width: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = head_width or width
        inner = num_heads * self.head_width
        self.latents_RD = nn.Parameter(torch.randn(num_latents, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key_value = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = GegluFeedForward(width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.feed_forward.down.weight)
        nn.init.zeros_(self.feed_forward.down.bias)
        self._kept: Folded | None = None
        # Tokens read in a block of fixed weights; None outside of one.
        self._tokens_read: int | None = None

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Transform token states ``(T, D)``; chooses the cheaper of the two equal forms."""
        num_tokens = hidden_TD.shape[0]
        if self._tokens_read is not None and self._kept is None:
            self._tokens_read += num_tokens
            if self.folding_pays(self._tokens_read):
                self._kept = self.fold()
        if self.folding_pays(num_tokens):
            attended_TD = self.attend_folded(hidden_TD)
        else:
            attended_TD = self.attend_plain(hidden_TD)
        mixed_TD = hidden_TD + attended_TD
        return mixed_TD + self.feed_forward(self.norm_feed_forward(mixed_TD))

    def folding_pays(self, num_tokens: int) -> bool:
        """Whether the folded form needs fewer multiplications for this many tokens."""
        if self._kept is not None:
            return True
        num_latents, width = self.latents_RD.shape
        inner = self.num_heads * self.head_width
        plain = num_tokens * 2 * inner * (width + num_latents)
        folded = num_tokens * 2 * self.num_heads * num_latents * width
        return folded + 2 * num_latents * inner * width < plain

    def attend_plain(self, hidden_TD: Tensor) -> Tensor:
        """Cross attention as in the released code; returns ``(T, D)`` without the residual."""
        query_HTE = self._heads(self.to_query(self.norm_query(hidden_TD)))
        key_HRE, value_HRE = self._keys_values()
        out_HTE = nn.functional.scaled_dot_product_attention(query_HTE, key_HRE, value_HRE)
        return self.to_out(out_HTE.transpose(0, 1).flatten(1))

    def attend_folded(self, hidden_TD: Tensor) -> Tensor:
        """The same from folded weights; returns ``(T, D)`` without the residual."""
        folded = self.fold()
        score_TS = product(self.norm_query(hidden_TD), folded.score_SD)
        weight_THR = score_TS.unflatten(1, (self.num_heads, -1)).softmax(-1)
        return product(weight_THR.flatten(1), folded.value_SD.T)

    @contextmanager
    def fixed_weights(self, *, fold_now: bool = False) -> Iterator[None]:
        """Fold at most once in the block, in which no weight may change.

        Folding costs as much as hundreds of tokens, so it waits until the block has read so many
        that it would have paid for them; ``fold_now`` does not wait.
        """
        self._kept = self.fold() if fold_now else None
        self._tokens_read = 0
        try:
            yield
        finally:
            self._kept = self._tokens_read = None

    def fold(self) -> Folded:
        """Fold the projections into the latents; differentiable."""
        if self._kept is not None:
            return self._kept
        key_HRE, value_HRE = self._keys_values()
        query_HED = self.to_query.weight.unflatten(0, (self.num_heads, self.head_width))
        out_HED = self.to_out.weight.T.unflatten(0, (self.num_heads, self.head_width))
        score_HRD = (key_HRE * self.head_width**-0.5) @ query_HED
        return Folded(score_HRD.flatten(0, 1), (value_HRE @ out_HED).flatten(0, 1))

    def _keys_values(self) -> tuple[Tensor, Tensor]:
        key_RI, value_RI = self.to_key_value(self.norm_latents(self.latents_RD)).chunk(2, dim=-1)
        return self._heads(key_RI), self._heads(value_RI)

    def _heads(self, x_TI: Tensor) -> Tensor:
        return x_TI.unflatten(1, (self.num_heads, self.head_width)).transpose(0, 1)


class Pooling(Module):
    """What all poolings share: reading the features, restoring the order of the texts, saving."""

    config_keys = ["width"]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def pool(self, hidden_TD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
        """Pool ``(T, D)`` token states to ``(N, D)`` float32."""

    def fixed_weights(self, *, fold_now: bool = False) -> AbstractContextManager[None]:
        """A block in which no weight changes, so that work on weights alone is done once."""
        return nullcontext()

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` ``(N, D)``, rows in the order of the texts."""
        if "flat" in features:
            flat = features["flat"]
            pooled_ND = self.pool(features["token_embeddings"], flat.pool_mask_T, flat.segments)
            order_N = torch.tensor(flat.order, device=pooled_ND.device)
            features["sentence_embedding"] = torch.empty_like(pooled_ND).index_copy(
                0, order_N, pooled_ND
            )
        else:
            hidden_TD, pool_mask_T, segments = _flatten_padded(features)
            features["sentence_embedding"] = self.pool(hidden_TD, pool_mask_T, segments)
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the embeddings."""
        return self.width

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json`` and, where there are any, the weights."""
        self.save_config(output_path)
        if any(True for _ in self.parameters()):
            self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(  # type: ignore[override]  # options of other modules are ignored
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        **options: Any,
    ) -> Self:
        """Load from a folder of a saved model, as sentence-transformers calls it."""
        source = ModelSource.of_module(model_name_or_path, subfolder, options)
        file = source.require(cls.config_file_name, hint=COPY_AGAIN)
        settings = read_values(cls, source.read_json(cls.config_file_name) or {}, where=str(file))
        # Without memory: a damaged configuration may ask for any amount.
        with torch.device("meta"):
            pooling = cls(**settings)
        if any(True for _ in pooling.parameters()):
            fill(pooling, stored_tensors(source), where=str(file.parent))
        return pooling


class MeanPooling(Pooling):
    """Average of the pooled tokens."""

    def pool(self, hidden_TD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
        """See the base class."""
        return pooled_mean(hidden_TD[pool_mask_T], pool_mask_T, segments)


class LastTokenPooling(Pooling):
    """State of the last token, which is the EOS unless an official checkpoint lost it."""

    def pool(self, hidden_TD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
        """See the base class."""
        return hidden_TD[segments.cu_seqlens[1:].long() - 1].float()


class LatentAttentionPooling(Pooling):
    """Latent attention on the pooled tokens, then their average (paper s3.2).

    The paper has 512 latents and 8 heads, the released weights heads as wide as the backbone
    (``head_width=None``).
    """

    config_keys = ["width", "num_latents", "num_heads", "head_width"]

    def __init__(
        self, width: int, num_latents: int = 512, num_heads: int = 8, head_width: int | None = None
    ) -> None:
        super().__init__(width)
        self.num_latents = num_latents
        self.num_heads = num_heads
        self.head_width = head_width
        self.layer = LatentAttention(width, num_latents, num_heads, head_width)

    def fixed_weights(self, *, fold_now: bool = False) -> AbstractContextManager[None]:
        """Fold the latents once."""
        return self.layer.fixed_weights(fold_now=fold_now)

    def pool(self, hidden_TD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
        """See the base class."""
        hidden_PD = hidden_TD[pool_mask_T].to(self.layer.latents_RD.dtype)
        return pooled_mean(self.layer(hidden_PD), pool_mask_T, segments)


class SelfAttentionPooling(Pooling):
    """One bidirectional self-attention layer with MLP over each text, then the average.

    It differs from latent attention in keys and values only.
    """

    config_keys = ["width", "num_heads"]

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__(width)
        if width % num_heads:
            raise ModelError(
                f"{num_heads} heads do not divide the width {width}",
                where="model.pooling.num_heads",
                expected=f"a divisor of {width}",
            )
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.to_query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = GegluFeedForward(width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.feed_forward.down.weight)
        nn.init.zeros_(self.feed_forward.down.bias)

    def pool(self, hidden_TD: Tensor, pool_mask_T: Tensor, segments: Segments) -> Tensor:
        """See the base class."""
        hidden_TD = hidden_TD.to(self.to_out.weight.dtype)
        projected_TI = self.to_query_key_value(self.norm_attention(hidden_TD))
        query, key, value = (
            x_TD.unflatten(1, (self.num_heads, -1)).transpose(0, 1)[None]
            for x_TD in projected_TI.chunk(3, dim=-1)
        )
        attended, _ = flat_attention(self, query, key, value, None, segments=segments, causal=False)
        mixed_PD = (hidden_TD + self.to_out(attended[0].flatten(1)))[pool_mask_T]
        mixed_PD = mixed_PD + self.feed_forward(self.norm_feed_forward(mixed_PD))
        return pooled_mean(mixed_PD, pool_mask_T, segments)


# Marks of a space in front of a piece: byte-level, SentencePiece, and the space itself.
_SPACE_MARKS = ("\u0120", "\u2581", " ")


def _flatten_padded(features: dict[str, Any]) -> tuple[Tensor, Tensor, Segments]:
    """Padded states of a stock ``Transformer`` (any padding side) as a flat batch."""
    hidden_BLD: Tensor = features["token_embeddings"]
    mask_BL = features["attention_mask"].bool()
    pool_BL = mask_BL.clone()
    if features.get("prompt_length") is not None:
        # Counted from the first real token, so that left padding is right too.
        pool_BL &= mask_BL.cumsum(1) > _prompt_lengths(features, mask_BL)[:, None]
    lengths = mask_BL.sum(1).tolist()
    segments = Segments.of_lengths(lengths, device=hidden_BLD.device)
    return hidden_BLD[mask_BL], pool_BL[mask_BL], segments


def _prompt_lengths(features: dict[str, Any], mask_BL: Tensor) -> Tensor:
    """Tokens ``(B,)`` at the start of each text that belong to its prompt alone.

    The last token of the prompt may have become a part of the first word; a ModelError where the
    batch does not say of which texts that is so.
    """
    count = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
    lengths_B = torch.full((len(mask_BL),), count, device=mask_BL.device)
    last_B = mask_BL.long().argmax(1) + count - 1
    encodings = getattr(features, "encodings", None)
    ids_BL: Any = features.get("input_ids")
    if count < 1 or (encodings is None and ids_BL is None):
        return lengths_B
    if encodings is not None:
        for row, (encoding, last) in enumerate(zip(encodings, last_B.tolist(), strict=True)):
            piece = encoding.tokens[last] if last < len(encoding.tokens) else ""
            joined = piece.startswith(_SPACE_MARKS) and piece.strip("".join(_SPACE_MARKS)) != ""
            lengths_B[row] -= int(joined)
        return lengths_B
    rows_B = torch.arange(len(mask_BL), device=mask_BL.device)
    ends_B = ids_BL[rows_B, last_B.clamp(max=mask_BL.shape[1] - 1)][mask_BL.sum(1) >= count]
    if len(ends_B.unique()) > 1:
        raise ModelError(
            "the last space of the prompt has become a part of the texts",
            where="prompt_length",
            expected="as many tokens of prompt in every text",
            hint="Load the model by NVEmbed.from_pretrained(folder, pooling=...), whose first "
            "module counts them text by text",
        )
    return lengths_B


POOLINGS: dict[PoolingKind, type[Pooling]] = {
    "mean": MeanPooling,
    "last": LastTokenPooling,
    "latent": LatentAttentionPooling,
    "self_attention": SelfAttentionPooling,
}


def build_pooling(kind: PoolingKind, width: int, **sizes: int) -> Pooling:
    """Make a fresh pooling for a hidden size, with those of the sizes that it has."""
    cls = POOLINGS[kind]
    return cls(width, **{name: size for name, size in sizes.items() if name in cls.config_keys})
