"""The contrastive loss (InfoNCE) over explicit index matrices.

Embeddings and the indices of a ``ContrastiveBatch`` enter, one number leaves. In-batch negatives,
mined negatives and all masks are entries of ``negative_BN``; there is no other contrastive loss in
this package. ``training/objective.py`` evaluates it piece by piece. Next file:
``training/trainer.py``.

Shapes: B queries, N unique documents, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed.core.errors import ConfigError


def info_nce(
    score_BN: Tensor,
    positive_B: Tensor,
    negative_BN: Tensor,
    *,
    temperature: float | Tensor,
    hardness: float | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Mean over queries of the cross entropy of the positive among positive and negatives.

        −log( exp(q·d⁺/τ) / (exp(q·d⁺/τ) + Σ_{n negative of q} exp(q·dₙ/τ)) )

    A query without negatives has the loss 0 and the gradient 0, and counts in the mean: its
    positive is certain among one candidate.

    Shapes: B queries, N documents.

    Args:
        score_BN: q·d of all queries and documents, from ``scores``.
        positive_B: column of each query's positive.
        negative_BN: bool, True where document n is a negative of query b; False elsewhere.
        temperature: τ, above 0; a scalar tensor where it is learned.
        hardness: α, multiplies a negative's share in the sum by ``exp(α · score)``, the score taken
            as a constant: harder negatives count more (LLaVE, arXiv 2503.04812 s3). ``None`` is
            off.
        weight_B: the result is the sum of the losses times these weights; ``None`` is the mean.

    Returns:
        Scalar, in the type of the scores.

    Raises:
        ConfigError: ``temperature`` is not above 0.

    Source: NV-Embed s2.2 and s3.3. The paper gives no temperature; 0.01 to 0.05 is usual.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}", expected="a number above 0")
    logit_BN = score_BN / temperature
    if hardness is not None:
        logit_BN = logit_BN + (hardness * score_BN.detach()).masked_fill(~negative_BN, 0.0)
    candidate_BN = negative_BN.scatter(1, positive_B[:, None], True)
    # Every row keeps its positive, so no row is all -inf and the softmax never divides 0 by 0.
    logit_BN = logit_BN.masked_fill(~candidate_BN, float("-inf"))
    if weight_B is None:
        return torch.nn.functional.cross_entropy(logit_BN, positive_B)
    loss_B = torch.nn.functional.cross_entropy(logit_BN, positive_B, reduction="none")
    return (loss_B * weight_B).sum()


def scores(query_BD: Tensor, document_ND: Tensor) -> Tensor:
    """Dot products ``(B, N)`` of embeddings of length 1, in at least float32, also under autocast.

    At τ = 0.02 a bfloat16 score is off by up to 0.2 in the exponent.
    """
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    with torch.autocast(query_BD.device.type, enabled=False):
        return query_BD.to(dtype) @ document_ND.to(dtype).T


@dataclass(frozen=True, slots=True)
class ContrastiveStatistics:
    """How well a batch is told apart, without temperature.

    All but ``positive_similarity`` are means over the queries that have negatives; None without
    any.

    Args:
        positive_similarity: mean cosine of queries and their positives.
        hardest_negative_similarity: mean over queries of their highest cosine to a negative.
        margin: mean of positive minus hardest negative.
        accuracy: share of queries whose positive is strictly above all their negatives.
    """

    positive_similarity: float
    hardest_negative_similarity: float | None
    margin: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class ScoreSums:
    """What the statistics of a batch are made of; sums of parts add up.

    Args:
        queries: rows seen.
        contrasted: those that have negatives.
        positive: sum of the positives' scores.
        hardest: sum of the highest negative scores.
        margin: sum of positive minus hardest negative.
        hits: rows whose positive is strictly above all negatives.
    """

    queries: int = 0
    contrasted: int = 0
    positive: float = 0.0
    hardest: float = 0.0
    margin: float = 0.0
    hits: int = 0

    @classmethod
    @torch.no_grad()
    def of_scores(cls, score_BN: Tensor, positive_B: Tensor, negative_BN: Tensor) -> ScoreSums:
        """Sum over the rows of a score matrix."""
        positive_score_B = score_BN.gather(1, positive_B[:, None])[:, 0]
        contrasted_B = negative_BN.any(dim=1)
        hardest_B = score_BN.masked_fill(~negative_BN, float("-inf")).amax(dim=1)[contrasted_B]
        margin_B = positive_score_B[contrasted_B] - hardest_B
        return cls(
            queries=len(score_BN),
            contrasted=int(contrasted_B.sum()),
            positive=float(positive_score_B.sum()),
            hardest=float(hardest_B.sum()),
            margin=float(margin_B.sum()),
            hits=int((margin_B > 0).sum()),
        )

    def __add__(self, other: ScoreSums) -> ScoreSums:
        return ScoreSums(
            self.queries + other.queries,
            self.contrasted + other.contrasted,
            self.positive + other.positive,
            self.hardest + other.hardest,
            self.margin + other.margin,
            self.hits + other.hits,
        )

    def means(self) -> ContrastiveStatistics:
        """The statistics; at least one row must have been seen."""
        positive = self.positive / self.queries
        if not self.contrasted:
            return ContrastiveStatistics(positive, None, None, None)
        count = self.contrasted
        return ContrastiveStatistics(
            positive, self.hardest / count, self.margin / count, self.hits / count
        )
