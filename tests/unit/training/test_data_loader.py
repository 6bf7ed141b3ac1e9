from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from nvembed.data.batch import Mixture
from nvembed.data.examples import make_source
from nvembed.data.records import PairRecord
from nvembed.model.tokens import TextTokenizer
from nvembed.training.config import StageConfig
from nvembed.training.stages import DataLoader, tokenized


def loader(tiny_tokenizer: Any, **options: Any) -> DataLoader:
    sources = [
        make_source(
            [PairRecord(f"{name}-q{n}", (f"{name}-p{n}", f"{name}-o{n}")) for n in range(12)],
            "retrieval",
            name=name,
            instruction=None,
        )
        for name in ("one", "two")
    ]
    stage = StageConfig(name="s", steps=20, batch_size=4, in_batch_negatives=True, **options)
    tokenizer = TextTokenizer(tiny_tokenizer)
    return DataLoader(Mixture(sources, [1.0, 1.0]), stage, seed=0, tokenizer=tokenizer)


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
def test_sources_of_a_step(tiny_tokenizer: Any, batches: str) -> None:
    of = loader(tiny_tokenizer, batches=batches)
    sources = []
    for step in range(20):
        batch = of.batch(step)
        sources += [{batch.texts[row][1].split("-")[0] for row in batch.query_B}]
    if batches == "homogeneous":
        assert all(len(names) == 1 for names in sources)
        counts = Counter(next(iter(names)) for names in sources)
        assert abs(counts["one"] - 10) <= 2
    else:
        assert sum(len(names) == 2 for names in sources) >= 18


def test_queries_of_a_step_count_once_each(tiny_tokenizer: Any) -> None:
    one, two = loader(tiny_tokenizer), loader(tiny_tokenizer, num_positives=2)
    for step in range(20):
        single, double = one.batch(step), two.batch(step)
        queries = [single.texts[row] for row in single.query_B]
        assert [double.texts[row] for row in double.query_B] == [q for q in queries for _ in "12"]
        assert double.weight_B.sum() == single.weight_B.sum() == 4
        assert len(double.texts) == 3 * len(set(queries))  # each with two positives
        np.testing.assert_array_equal(double.weight_B, np.full(8, 0.5, dtype=np.float32))


def test_prepared_ahead_is_the_same_and_ends_early_in_order(tiny_tokenizer: Any) -> None:
    of = loader(tiny_tokenizer)
    with of.steps(3, prefetch=False) as fed:
        expected = list(fed)
    assert len(expected) == 17
    with of.steps(3, prefetch=True) as fed:
        for (batch, tokens), (other, others) in zip(fed, expected, strict=True):
            assert batch.texts == other.texts
            np.testing.assert_array_equal(batch.negative_BN, other.negative_BN)
            assert tokens == others
    with of.steps(0, prefetch=True) as fed:  # left while the next step is in preparation
        next(iter(fed))


def test_tokens_are_those_of_each_text_alone(tiny_tokenizer: Any) -> None:
    tokenizer = TextTokenizer(tiny_tokenizer)
    texts = [("find: ", "a"), ("", "b c"), ("find: ", "中文 🙂"), ("sort: ", "a"), ("", "")]
    alone = [tokenizer([text], prompt)[0] for prompt, text in texts]
    assert tokenized(tokenizer, texts) == alone
    assert len({each.ids for each in alone}) == len(alone)
