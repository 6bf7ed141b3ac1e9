"""The contrastive loss (InfoNCE) over explicit index matrices.

Embeddings and the indices of a ``ContrastiveBatch`` enter, one number leaves. In-batch negatives,
mined negatives and all masks are entries of ``negative_BN``; there is no other kind of loss in this
package. Next file: ``training/trainer.py``.

Shapes: B queries, N unique documents, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed.core.errors import ConfigError


def info_nce(
    query_BD: Tensor,
    document_ND: Tensor,
    positive_B: Tensor,
    negative_BN: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Mean over queries of the cross entropy of the positive among positive and negatives.

        −log( exp(q·d⁺/τ) / (exp(q·d⁺/τ) + Σ_{n negative of q} exp(q·dₙ/τ)) )

    A query without negatives has the loss 0 and the gradient 0, and counts in the mean: its
    positive is certain among one candidate. Embeddings are expected to have length 1. Scores are
    computed in at least float32, also under autocast: at τ = 0.02 a bfloat16 score is off by up to
    0.2 in the exponent.

    Shapes: B queries, N documents, D width.

    Args:
        query_BD: embeddings of the queries.
        document_ND: embeddings of the documents.
        positive_B: column of each query's positive.
        negative_BN: bool, True where document n is a negative of query b; False elsewhere.
        temperature: τ, above 0.

    Returns:
        Scalar, float32 (float64 for float64 embeddings).

    Raises:
        ConfigError: ``temperature`` is not above 0.

    Source: NV-Embed s2.2 and s3.3. The paper gives no temperature; 0.01 to 0.05 is usual.
    """
    if not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}", expected="a number above 0")
    score_BN = _scores(query_BD, document_ND) / temperature
    candidate_BN = negative_BN.scatter(1, positive_B[:, None], True)
    # Every row keeps its positive, so no row is all -inf and the softmax never divides 0 by 0.
    score_BN = score_BN.masked_fill(~candidate_BN, float("-inf"))
    return torch.nn.functional.cross_entropy(score_BN, positive_B)


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


@torch.no_grad()
def contrastive_statistics(
    query_BD: Tensor, document_ND: Tensor, positive_B: Tensor, negative_BN: Tensor
) -> ContrastiveStatistics:
    """Measure a batch for the metrics; arguments as in ``info_nce``, nothing is differentiated."""
    score_BN = _scores(query_BD, document_ND)
    positive_score_B = score_BN.gather(1, positive_B[:, None])[:, 0]
    positive_similarity = float(positive_score_B.mean())
    has_negative_B = negative_BN.any(dim=1)
    if not has_negative_B.any():
        return ContrastiveStatistics(positive_similarity, None, None, None)
    hardest_B = score_BN.masked_fill(~negative_BN, float("-inf")).amax(dim=1)[has_negative_B]
    margin_B = positive_score_B[has_negative_B] - hardest_B
    return ContrastiveStatistics(
        positive_similarity=positive_similarity,
        hardest_negative_similarity=float(hardest_B.mean()),
        margin=float(margin_B.mean()),
        accuracy=float((margin_B > 0).float().mean()),
    )


def _scores(query_BD: Tensor, document_ND: Tensor) -> Tensor:
    """Dot products in at least float32, whatever autocast says."""
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    with torch.autocast(query_BD.device.type, enabled=False):
        return query_BD.to(dtype) @ document_ND.to(dtype).T
