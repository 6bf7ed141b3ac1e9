"""Which of the nearest documents may be negatives: pure functions over scores.

In: scores of the candidates, and of the positive; out: a boolean matrix, True where a candidate
stays. The miner (``miner.py``) joins them with ``&``.

Letters: B queries, N candidates per query, nearest first where a function says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ConfigError


def percent_of_positive(
    score_positive_B: NDArray[np.float32],
    scores_BN: NDArray[np.float32],
    *,
    ratio: float = 0.95,
) -> NDArray[np.bool_]:
    """Keep the candidates that look clearly worse than the labelled positive.

    A candidate stays when its score is below ``ratio`` times the positive's, so that a positive
    nobody labelled is not taught as a negative. Only meaningful for positive scores above 0: below,
    the threshold would rise above the positive itself, so those rows keep nothing.

    Args:
        score_positive_B: cosine of each query to its positive.
        scores_BN: cosine of each query to each candidate.
        ratio: part of the positive's score, in (0, 1].

    Returns:
        keep_BN.

    Raises:
        ConfigError: ``ratio`` outside (0, 1].

    Source: TopK-PercPos of NV-Retriever (arXiv 2407.15831), 0.95 is that paper's choice and
        NV-Embed-v2's.
    """
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(f"ratio is {ratio:g}", expected="above 0 and at most 1")
    ceiling_B = np.where(score_positive_B > 0.0, ratio * score_positive_B, -np.inf)
    keep_BN: NDArray[np.bool_] = scores_BN < ceiling_B[:, None]
    return keep_BN


def margin_below_positive(
    score_positive_B: NDArray[np.float32],
    scores_BN: NDArray[np.float32],
    *,
    margin: float = 0.05,
) -> NDArray[np.bool_]:
    """Keep the candidates whose score is below the positive's minus ``margin``.

    Raises:
        ConfigError: ``margin`` below 0.

    Source: TopK-MarginPos of NV-Retriever.
    """
    if margin < 0.0:
        raise ConfigError(f"margin is {margin:g}", expected="0 or more")
    keep_BN: NDArray[np.bool_] = scores_BN < (score_positive_B - margin)[:, None]
    return keep_BN


def below_score(scores_BN: NDArray[np.float32], *, cap: float = 0.7) -> NDArray[np.bool_]:
    """Keep the candidates whose score is below ``cap``, whatever the positive's is.

    Source: TopK-Abs of NV-Retriever.
    """
    keep_BN: NDArray[np.bool_] = scores_BN < cap
    return keep_BN


def after_first(eligible_BN: NDArray[np.bool_], *, skip: int) -> NDArray[np.bool_]:
    """Keep the eligible candidates of each query but the first ``skip``.

    Candidates stand nearest first; those that are not eligible are passed over without being
    counted.

    Raises:
        ConfigError: ``skip`` below 0.

    Source: Top-K shifted by N of NV-Retriever (best N: 10).
    """
    if skip < 0:
        raise ConfigError(f"skip is {skip}", expected="0 or more")
    keep_BN: NDArray[np.bool_] = eligible_BN & (np.cumsum(eligible_BN, axis=1) > skip)
    return keep_BN
