"""mteb's clustering: k-means on ten samples of the texts, compared with the gold labels.

Letters: N texts, D width of the vectors, E experiments, S texts of a sample, B resamples, G gold
labels, K clusters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPERIMENTS = 10
SAMPLE_TEXTS = 16_384
SEED = 42
_BATCH_TEXTS = 512


def cluster(
    vectors_ND: NDArray[np.float32], num_clusters: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield of each experiment the texts drawn (with replacement) and the clusters they got.

    Sampling, k-means and seeds are mteb's.
    """
    from sklearn.cluster import MiniBatchKMeans

    draw = random.Random(SEED)
    for _ in range(EXPERIMENTS):
        texts_S = np.array(draw.choices(range(len(vectors_ND)), k=SAMPLE_TEXTS))
        model = MiniBatchKMeans(
            n_clusters=num_clusters,
            batch_size=_BATCH_TEXTS,
            init="k-means++",
            n_init=1,
            random_state=SEED,
        )
        yield texts_S, model.fit_predict(vectors_ND[texts_S]).astype(np.int64)


def cluster_scores(gold_S: NDArray[np.int64], clusters_S: NDArray[np.int64]) -> dict[str, float]:
    """Compute V-measure and adjusted mutual information of one experiment."""
    from sklearn.metrics.cluster import adjusted_mutual_info_score, v_measure_score

    return {
        "v_measure": float(v_measure_score(gold_S, clusters_S)),
        "ami": float(adjusted_mutual_info_score(gold_S, clusters_S)),
    }


def v_measures(counts_BGK: Floats) -> Floats:
    """Compute the V-measure of contingency tables: texts by gold label and cluster."""
    shares = counts_BGK / counts_BGK.sum(axis=(1, 2), keepdims=True)
    gold_B = _entropy(shares.sum(axis=2))
    clusters_B = _entropy(shares.sum(axis=1))
    mutual_B = gold_B + clusters_B - _entropy(shares.reshape(len(shares), -1))
    # The harmonic mean of mutual/gold and mutual/clusters; two single groups agree wholly.
    both_B = gold_B + clusters_B
    return np.where(both_B > 0, 2 * mutual_B / np.where(both_B > 0, both_B, 1.0), 1.0)


def _entropy(shares_BX: Floats) -> Floats:
    logs = np.log(np.where(shares_BX > 0, shares_BX, 1.0))
    found: Floats = -(shares_BX * logs).sum(axis=1)
    return found
