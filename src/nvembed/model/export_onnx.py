"""A model as one ONNX graph over padded rows, proven equal before it is kept.

    input_ids       int64 (B, L)   padded on the right
    attention_mask  int64 (B, L)   1 where there is a token
    pool_mask       int64 (B, L)   1 where a token is pooled: 0 for a query's prompt
    → sentence_embedding  float32 (B, D), of length 1

The layers are those of transformers with another attention behind them (``padded_attention``), so
direction and windows are decided here as they are in our own; the latents are folded, so a latent
pooling is two small matrices and an MLP.

Letters: B texts, L tokens of the longest, H heads, K key/value heads, E head width, D width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.model.attention import block_attention
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import LatentAttentionPooling, MeanPooling
from nvembed.text.template import QUERY_PROMPT, query_prompt
from nvembed.text.tokens import TokenizedText

PADDED_ATTENTION = "nvembed_padded"
FILE = "model.onnx"
OUTPUT = "sentence_embedding"  # a plain "embedding" is the name of a node already
INPUTS = ("input_ids", "attention_mask", "pool_mask")

# A graph of more than 2 GB needs its weights in a file beside it.
_MAX_INLINE_BYTES = 1_500_000_000
_PROOF_TASK = "Find it"
_PROOF_TEXTS = ("how do I sort a list?", "x", "A longer passage, " * 6 + "cut or not.", "")
_TOLERANCE = 1e-5


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seen_BL: Tensor,
    causal: bool,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer of the graph.

    Shapes: query ``(B, H, L, E)``, key and value ``(B, K, L, E)``; returns ``(B, L, H, E)``.
    """
    out_BHLE = block_attention(
        query, key, value, causal=causal, scaling=scaling, softcap=softcap, seen_GL=seen_BL
    )
    return out_BHLE.transpose(1, 2), None


AttentionInterface.register(PADDED_ATTENTION, padded_attention)


class PaddedEmbedder(nn.Module):
    """The computation of the graph."""

    def __init__(self, model: NVEmbed) -> None:
        super().__init__()
        self.decoder: Any = model.backbone.model
        self.pooling = model.pooling
        self.causal = model.backbone.attention == "causal"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        """See the module docstring."""
        position_BL = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_BLD = self.decoder(
            input_ids=input_ids,
            position_ids=position_BL,
            attention_mask=None,
            seen_BL=attention_mask.bool(),
            causal=self.causal,
        ).last_hidden_state
        if isinstance(self.pooling, LatentAttentionPooling):
            batch, length, width = hidden_BLD.shape
            hidden_BLD = self.pooling.layer(hidden_BLD.reshape(batch * length, width)).reshape(
                batch, length, width
            )
        weight_BL1 = pool_mask.to(hidden_BLD.dtype)[:, :, None]
        mean_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
        return nn.functional.normalize(mean_BD, dim=-1)


def write_onnx(model: NVEmbed, folder: Path, *, name: str) -> None:
    """Write graph, tokenizer and what a caller has to know, then compare vectors.

    Args:
        model: in float32; it cannot be used for anything else afterwards.
        folder: exists.
        name: what the model is called in errors.

    Raises:
        ModelError: the pooling has no such graph, or the graph gives other vectors.
    """
    import onnxruntime  # noqa: F401 - one that is missing is told before the work begins
    import onnxscript  # noqa: F401

    if not isinstance(model.pooling, LatentAttentionPooling | MeanPooling):
        raise ModelError(
            f"{type(model.pooling).__name__} has no graph",
            where=name,
            expected="latent attention or mean pooling",
        )
    if model.backbone.dtype != torch.float32:
        raise ModelError(
            f"an ONNX graph in {model.backbone.dtype}",
            where=name,
            expected="float32; runtimes convert it further",
            hint="Leave --dtype out",
        )
    model.eval()
    cases = [(list(_PROOF_TEXTS), ""), (list(_PROOF_TEXTS), query_prompt(_PROOF_TASK))]
    expected = [model.encode(texts, prompt=prompt) for texts, prompt in cases]
    tokens = [model.backbone.tokenize_texts(texts, prompt) for texts, prompt in cases]
    _write_graph(model, folder / FILE, tokens[1][:2])
    model.backbone.save_tokenizer(str(folder))
    write_json(
        folder / "nvembed_onnx.json",
        {
            "inputs": list(INPUTS),
            "output": OUTPUT,
            "query_prompt": QUERY_PROMPT,
            "max_tokens": model.backbone.max_tokens,
            "text_style": model.backbone.text_style,
            "add_bos": model.backbone.add_bos,
            "add_eos": model.backbone.add_eos,
            "pool_mask": "1 from the first token that holds a character of the text",
        },
    )
    for texts, wanted in zip(tokens, expected, strict=True):
        _prove(folder / FILE, texts, wanted, name)


def padded_inputs(texts: Sequence[TokenizedText]) -> dict[str, NDArray[np.int64]]:
    """The graph's inputs for tokenised texts, padded with zeros on the right."""
    width = max(len(text) for text in texts)
    arrays = {name: np.zeros((len(texts), width), dtype=np.int64) for name in INPUTS}
    for row, text in enumerate(texts):
        arrays["input_ids"][row, : len(text)] = text.ids
        arrays["attention_mask"][row, : len(text)] = 1
        arrays["pool_mask"][row, text.pool_start : len(text)] = 1
    return arrays


def _write_graph(model: NVEmbed, path: Path, example: Sequence[TokenizedText]) -> None:
    decoder: Any = model.backbone.model
    decoder.set_attn_implementation(PADDED_ATTENTION)
    inputs = tuple(torch.from_numpy(array) for array in padded_inputs(example).values())
    size = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("tokens", min=1)}
    size_in_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with model.pooling.fixed_weights(), torch.no_grad(), _quiet():
        torch.onnx.export(
            PaddedEmbedder(model),
            inputs,
            path,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=dict.fromkeys(INPUTS, size),
            dynamo=True,
            external_data=size_in_bytes > _MAX_INLINE_BYTES,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of its own parts, which a user can do nothing about."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _prove(
    path: Path, texts: Sequence[TokenizedText], expected: NDArray[np.float32], name: str
) -> None:
    """Run the graph on a batch and on each text alone.

    Raises:
        ModelError: other vectors than the model's own.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    together = session.run(None, dict(padded_inputs(texts)))[0]
    alone = np.concatenate([session.run(None, dict(padded_inputs([text])))[0] for text in texts])
    difference = max(float(np.abs(found - expected).max()) for found in (together, alone))
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"the ONNX graph gives other vectors (by up to {difference:.1e})",
            where=name,
            expected=f"the model's own to {_TOLERANCE:g}",
            hint="Please report the model family",
        )
