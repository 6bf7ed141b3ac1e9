"""A model as an ONNX graph over padded rows: written, proven equal before it is kept.

model.onnx gives vectors; transformer/model.onnx is the same graph up to its mean, for
``SentenceTransformer(folder, backend="onnx")``, where stock modules can pool as we do.
Letters: B texts, L tokens of the longest, H heads, K key/value heads, E head width, D width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from nvembed.core.errors import ModelError
from nvembed.core.files import write_json
from nvembed.data.instructions import QUERY_PROMPT
from nvembed.encoding.export import stock
from nvembed.interop.model_folder import ONNX_FILE
from nvembed.model.attention import block_attention
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import (
    GRAPH_FILE,
    GRAPH_INPUTS,
    GRAPH_OUTPUT,
    TOKENIZER_SETTINGS,
    padded_inputs,
    run_graph,
)
from nvembed.model.pooling import LatentAttentionPooling, MeanPooling
from nvembed.model.tokens import TokenizedText

_ATTENTION = "nvembed_padded"
_STATES = "last_hidden_state"
# Of what sentence-transformers loads; the weights lie there under the name that it asks for.
_INNER = "transformer"
_WEIGHTS = "model.onnx_data"

# A graph of more than 2 GB needs its weights in a file beside it.
_MAX_INLINE_BYTES = 1_500_000_000
_PROOF_TEXTS = ["how do I sort a list?", "x", "A longer passage, " * 6 + "cut or not.", ""]


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seen_BL: Tensor,
    causal: bool,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend in a layer of transformers: ``(B, H, L, E)``, ``(B, K, L, E)`` to ``(B, L, H, E)``.

    Of the ``others`` that transformers gives, a layer's ``scaling`` and ``softcap`` count.
    """
    out_BHLE = block_attention(
        query,
        key,
        value,
        causal=causal,
        scaling=others.get("scaling"),
        softcap=others.get("softcap"),
        seen_GL=seen_BL,
    )
    return out_BHLE.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, padded_attention)


class PaddedEmbedder(nn.Module):
    """The computation of the graph."""

    def __init__(self, model: NVEmbed, *, states: bool = False) -> None:
        super().__init__()
        self.decoder: Any = model.backbone.model
        self.pooling = model.pooling
        self.causal = model.backbone.attention == "causal"
        self.states = states

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute unit vectors float32 ``(B, D)`` of int64 ``(B, L)``, padded on the right."""
        position_BL = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_BLD = self.decoder(
            input_ids=input_ids,
            position_ids=position_BL,
            attention_mask=None,
            seen_BL=attention_mask.bool(),
            causal=self.causal,
        ).last_hidden_state
        if isinstance(self.pooling, LatentAttentionPooling):
            shape = hidden_BLD.shape
            hidden_BLD = self.pooling.layer(hidden_BLD.flatten(0, 1)).reshape(shape)
        weight_BL1 = pool_mask.to(hidden_BLD.dtype)[:, :, None]
        mean_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
        vectors_BD = nn.functional.normalize(mean_BD, dim=-1)
        return (vectors_BD, hidden_BLD) if self.states else vectors_BD


# For who feeds the graph without us.
_POOLED = {
    "nvembed": "1 from the first token that holds a character of the text",
    "official": "1 from the first token that holds a character of the text",
    "whole": "1 for every token",
}


# --- Writing --------------------------------------------------------------------------------------


def write_onnx(model: NVEmbed, folder: Path, *, name: str) -> bool:
    """Write and prove the graph; returns whether sentence-transformers can run it too.

    The model, in float32, cannot be used for anything else afterwards.
    """
    import onnxruntime  # noqa: F401 - one that is missing is told before the work begins
    import onnxscript  # noqa: F401

    backbone = model.backbone
    if not isinstance(model.pooling, LatentAttentionPooling | MeanPooling):
        message = f"{type(model.pooling).__name__} has no graph"
        wanted, hint = "latent attention or mean pooling", f"First {stock.HEAD_FREE}"
        raise ModelError(message, where=name, expected=wanted, hint=hint)
    if backbone.dtype != torch.float32:
        raise ModelError(
            f"an ONNX graph in {backbone.dtype}",
            where=name,
            expected="float32; runtimes convert it further",
            hint="Leave --dtype out",
        )
    model.eval()
    expected = [model.encode(_PROOF_TEXTS, prompt=prompt) for prompt in stock.PROOF_PROMPTS]
    tokens = [backbone.tokenize_texts(_PROOF_TEXTS, prompt) for prompt in stock.PROOF_PROMPTS]
    for_stock = _write_tokenizer(model, folder, name)
    _write_graph(model, folder / GRAPH_FILE, tokens[1][:2], shared=for_stock)
    if for_stock:
        _share_weights(folder)
    settings = {
        "inputs": list(GRAPH_INPUTS),
        "output": GRAPH_OUTPUT,
        "query_prompt": QUERY_PROMPT,
        **{name: getattr(backbone, name) for name in TOKENIZER_SETTINGS},
        "pool_mask": _POOLED[model.backbone.text_style],
        "prompts": model.prompts,
    }
    write_json(folder / ONNX_FILE, settings)
    _prove(folder / GRAPH_FILE, tokens, expected, name, tolerance=stock.rounding(model))
    return for_stock


def _write_tokenizer(model: NVEmbed, folder: Path, name: str) -> bool:
    """Write the tokenizer, and where stock modules can pool as we do (the result), their files."""
    backbone = model.backbone
    closed = stock.closed_tokenizer(backbone.text_tokenizer)
    stock.write_tokenizer(closed, backbone, folder)
    if backbone.text_style == "official":
        return False
    try:
        whole = backbone.text_style == "whole"
        counting = closed if whole else stock.counting_tokenizer(backbone, name)
    except ModelError:
        return False
    inner = folder / _INNER
    inner.mkdir()
    stock.write_tokenizer(counting, backbone, inner)
    backbone.model.config.save_pretrained(inner)
    stock.open_attention(inner / "config.json", backbone)
    stock.write_modules(model, folder, transformer=_INNER)
    return True


def _write_graph(
    model: NVEmbed, path: Path, example: Sequence[TokenizedText], *, shared: bool
) -> None:
    decoder: Any = model.backbone.model
    decoder.set_attn_implementation(_ATTENTION)
    inputs = tuple(torch.from_numpy(array) for array in padded_inputs(example).values())
    size = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("tokens", min=1)}
    size_in_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with model.pooling.fixed_weights(fold_now=True), torch.no_grad(), _quiet():
        torch.onnx.export(
            PaddedEmbedder(model, states=shared),
            inputs,
            path,
            input_names=list(GRAPH_INPUTS),
            output_names=[GRAPH_OUTPUT, _STATES] if shared else [GRAPH_OUTPUT],
            dynamic_shapes=dict.fromkeys(GRAPH_INPUTS, size),
            dynamo=True,
            external_data=shared or size_in_bytes > _MAX_INLINE_BYTES,
            verbose=False,
        )


def _share_weights(folder: Path) -> None:
    """Make the graph with two outputs two graphs that read the same file of weights."""
    import onnx
    from onnx.external_data_helper import uses_external_data
    from onnx.utils import Extractor

    path = folder / GRAPH_FILE
    graph = onnx.load(str(path), load_external_data=False)
    for node in graph.graph.node:  # three inputs of one shape, and any may be asked for it
        if node.op_type == "Shape" and node.input[0] == GRAPH_INPUTS[2]:
            node.input[0] = GRAPH_INPUTS[1]
    wanted = (
        (GRAPH_INPUTS, GRAPH_OUTPUT, path, f"{_INNER}/{_WEIGHTS}"),
        (GRAPH_INPUTS[:2], _STATES, folder / _INNER / GRAPH_FILE, _WEIGHTS),
    )
    for inputs, output, place, location in wanted:
        part = Extractor(graph).extract_model(list(inputs), [output])
        for tensor in filter(uses_external_data, part.graph.initializer):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        onnx.save(part, str(place))
    (folder / f"{GRAPH_FILE}.data").replace(folder / _INNER / _WEIGHTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says of its own parts, which a user can do nothing about."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def _prove(
    path: Path,
    cases: Sequence[Sequence[TokenizedText]],
    expected: Sequence[NDArray[np.float32]],
    name: str,
    *,
    tolerance: float,
) -> None:
    """Run the graph on a batch and on each text alone; refuse other vectors than the model's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for texts, wanted in zip(cases, expected, strict=True):
        difference = stock.largest_difference(wanted, partial(run_graph, session), texts)
        if not difference <= tolerance:
            raise ModelError(
                f"the ONNX graph gives other vectors (by up to {difference:.1e})",
                where=name,
                expected=f"the model's own to {tolerance:g}",
                hint="Please report the model family",
            )
