"""The latent attention layer of NV-Embed (paper s3.2; exact form of the released code).

The hidden states are the queries, a trained array of latents gives keys and values, and a GEGLU MLP
follows; both sub-layers have a pre-norm and a residual. The layer is position-wise: a token's
result depends on no other token, so it runs on flat tokens and only on those that are pooled.

    Xn = LayerNorm(X)    Zn = LayerNorm(latents)
    q = Wq Xn            k, v = split(Wkv Zn)
    Y = X + Wo · concat over heads of softmax(q kᵀ / √E) v
    H = Y + FF(LayerNorm(Y)),   FF(y) = W2 (a · gelu(b)) + c2,   [a, b] = W1 y + c1

Keys and values depend on weights alone, so per head ``q kᵀ = Xn (k Wq)ᵀ`` and ``P v Woᵀ = P (v
Woᵀ)``: the *folded* form needs two matrices of ``(heads · latents, width)`` instead of the two wide
projections. It is exact up to rounding and gradients flow through the folding, so it serves
training too.

Letters: T tokens, D width, R latents, H heads, E head width, S = H · R folded rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvembed.kernels.linear import product


class Folded(NamedTuple):
    """Latent cross attention with the projections folded into the latents.

    Attributes:
        score_SD: rows ``k_h Wq_h / √E``, stacked over heads.
        value_SD: rows ``v_h Wo_hᵀ``, stacked over heads.
    """

    score_SD: Tensor
    value_SD: Tensor


class GegluFeedForward(nn.Module):
    """``Linear → a · gelu(b) → Linear`` with a hidden width of ``mult · D`` (NV-Embed: 4)."""

    def __init__(self, width: int, mult: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * mult * width)
        self.down = nn.Linear(mult * width, width)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Apply to ``(T, D)``."""
        value, gate = self.up(hidden_TD).chunk(2, dim=-1)
        out: Tensor = self.down(value * nn.functional.gelu(gate))
        return out


class LatentAttention(nn.Module):
    """Latent cross attention and MLP over token states.

    Args:
        width: D, the hidden size of the backbone.
        num_latents: R (paper: 512).
        num_heads: H (paper: 8).
        head_width: E; ``None`` means D, as in the released weights.

    Both output projections start at zero, so an untrained layer returns its input and the model
    starts as plain mean pooling. (The released code keeps PyTorch's default; with little data that
    start has to be unlearned first, see docs/log.md.)
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
        out: Tensor = mixed_TD + self.feed_forward(self.norm_feed_forward(mixed_TD))
        return out

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
        out: Tensor = self.to_out(out_HTE.transpose(0, 1).flatten(1))
        return out

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
