"""One training step up to the gradient: examples → batch → packs → embeddings → loss.

Letters: U unique texts, B queries, N documents, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvembed.data.batch import ContrastiveBatch, effective_negatives
from nvembed.losses.contrastive import ContrastiveStatistics, contrastive_statistics, info_nce
from nvembed.model.backbone import Backbone
from nvembed.model.embedder import embed_pack
from nvembed.text.packing import plan_packs
from nvembed.text.tokens import TokenizedText


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss with its graph, and what the metrics want to know."""

    loss: Tensor
    statistics: ContrastiveStatistics
    effective_negatives: float
    num_tokens: int
    num_texts: int


def contrastive_step(
    model: nn.Module,
    backbone: Backbone,
    batch: ContrastiveBatch,
    *,
    temperature: float,
    pack_tokens: int,
) -> StepResult:
    """Embed every text of the batch once and contrast.

    Args:
        model: the embedding model, as prepared by accelerate.
        backbone: its first module, for tokens.
        batch: unique texts and index matrices.
        temperature: of the softmax.
        pack_tokens: tokens per forward.
    """
    texts = tokenize_batch(backbone, batch)
    packs = plan_packs([len(text) for text in texts], pack_tokens)
    embedded = [embed_pack(model, [texts[row] for row in pack]) for pack in packs]
    order = torch.tensor([row for pack in packs for row in pack], device=embedded[0].device)
    stacked_UD = torch.cat(embedded)
    embedding_UD = torch.empty_like(stacked_UD).index_copy(0, order, stacked_UD)

    def on_device(values: object) -> Tensor:
        return torch.as_tensor(values, device=embedding_UD.device)

    query_BD = embedding_UD[on_device(batch.query_B)]
    document_ND = embedding_UD[on_device(batch.document_N)]
    positive_B = on_device(batch.positive_B)
    negative_BN = on_device(batch.negative_BN)
    return StepResult(
        loss=info_nce(query_BD, document_ND, positive_B, negative_BN, temperature=temperature),
        statistics=contrastive_statistics(query_BD, document_ND, positive_B, negative_BN),
        effective_negatives=effective_negatives(batch),
        num_tokens=sum(len(text) for text in texts),
        num_texts=len(texts),
    )


def tokenize_batch(backbone: Backbone, batch: ContrastiveBatch) -> Sequence[TokenizedText]:
    """Tokens of the batch's texts in their order; one tokenizer call per prompt."""
    rows_by_prompt: dict[str, list[int]] = {}
    for row, (prompt, _) in enumerate(batch.texts):
        rows_by_prompt.setdefault(prompt, []).append(row)
    tokens: dict[int, TokenizedText] = {}
    for prompt, rows in rows_by_prompt.items():
        encoded = backbone.tokenize_texts([batch.texts[row][1] for row in rows], prompt)
        tokens.update(zip(rows, encoded, strict=True))
    return [tokens[row] for row in range(len(batch.texts))]
