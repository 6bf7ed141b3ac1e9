"""The cache of vectors by text against the encoder itself: equal, and each text asked for once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from noting import Counting
from nvembed.core.errors import DataError, ModelError
from nvembed.evaluation import encoders as module
from nvembed.evaluation.encoders import CachedEncoder


def test_texts_are_told_apart_by_model_side_instruction_and_themselves(tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedEncoder(inner, tmp_path, "one")
    texts = ["a cat", "a dog"]
    plain = HashEncoder(64).encode_query(texts, task="find")
    for _ in range(2):
        assert np.array_equal(cached.encode_query(texts, task="find"), plain)
    assert len(inner.asked) == 2
    cached.encode_query(texts)  # another instruction
    cached.encode_document(texts, task="find")  # another side
    CachedEncoder(inner, tmp_path, "two").encode_query(texts, task="find")  # another model
    assert len(inner.asked) == 8
    cached.encode_query(["a dog ", "a cat", "a dog"], task="find")  # another text
    assert inner.asked[8:] == [("query", "a dog ", "find")]
    assert cached.encode_query([]).shape == (0, 64)


@pytest.mark.parametrize("seed", range(5))
def test_any_batches_give_the_encoders_vectors_and_ask_once(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_TEXTS", 7)
    draw, inner, plain = random.Random(seed), Counting(), HashEncoder(64)
    pool = [f"text {number} é" for number in range(60)]
    encoders = [CachedEncoder(inner, tmp_path, "m") for _ in range(3)]  # as other processes have
    for _ in range(40):
        texts = draw.choices(pool, k=draw.randint(0, 30))
        task = draw.choice([None, "find"])
        found = draw.choice(encoders).encode_document(texts, task=task)
        assert np.array_equal(found, plain.encode_document(texts, task=task))
    assert len(inner.asked) == len(set(inner.asked))
    before = len(inner.asked)
    again = CachedEncoder(inner, tmp_path, "m")
    known = [text for side, text, task in inner.asked if task is None]
    draw.shuffle(known)
    assert np.array_equal(again.encode_document(known), plain.encode_document(known))
    assert len(inner.asked) == before
    assert not list(tmp_path.rglob(".*"))


def test_one_changed_document_costs_one_text(tmp_path: Path) -> None:
    inner = Counting()
    texts = [f"document {number}" for number in range(3000)]
    CachedEncoder(inner, tmp_path, "m").encode_document(texts)
    assert len(inner.asked) == 3000
    texts[1234] += " changed"
    CachedEncoder(inner, tmp_path, "m").encode_document(texts[::-1])
    assert [text for _, text, _ in inner.asked[3000:]] == ["document 1234 changed"]


def test_what_is_damaged_or_wrong_is_told(tmp_path: Path) -> None:
    inner = Counting()
    CachedEncoder(inner, tmp_path, "one").encode_query(["a", "b"])
    with pytest.raises(DataError, match=r"holds vectors of shape \(2, 64\).*is 32.*disagree"):
        CachedEncoder(HashEncoder(32), tmp_path, "one").encode_query(["a"])
    (vectors,), (keys,) = tmp_path.rglob("vectors-*.npy"), tmp_path.rglob("keys-*.npy")
    vectors.write_bytes(vectors.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"vectors-\w+\.npy: cannot be read .*embedded again"):
        CachedEncoder(inner, tmp_path, "one").encode_query(["a"])
    keys.unlink()  # as if killed between the two files: both are made again
    again = CachedEncoder(inner, tmp_path, "one").encode_query(["a", "b"])
    assert np.array_equal(again, HashEncoder(64).encode_query(["a", "b"]))


def test_vectors_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Broken(HashEncoder):
        def encode_query(self, texts: object, *, task: str | None = None) -> np.ndarray:
            return np.full((1, 64), np.nan, dtype=np.float32)

    with pytest.raises(ModelError, match="NaN"):
        CachedEncoder(Broken(64), tmp_path, "m").encode_query(["a"])
    assert not list(tmp_path.rglob("*.npy"))
    assert not list(tmp_path.rglob(".*"))
