from __future__ import annotations

import numpy as np
import pytest

from hash_encoder import HashEncoder


def test_vectors_are_unit_and_repeatable() -> None:
    texts = ["the cat sat", "The CAT, sat!", "a dog", "", "?!"]
    vectors = HashEncoder(64).encode_query(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors, HashEncoder(64).encode_document(texts))
    # Pinned: the same on every machine and in every process.
    assert np.flatnonzero(vectors[2]).tolist() == [33, 62]


def test_shared_words_are_closer() -> None:
    a, b, c = HashEncoder(256).encode_query(["red cat sat", "red cat ran", "two dogs bark"])
    assert a @ b == pytest.approx(2 / 3, abs=1e-6)
    assert abs(a @ c) < 0.4


def test_words_that_cancel_out_still_give_a_unit_vector() -> None:
    # With one coordinate every word is +1 or -1 there, so some pair of words sums to zero.
    encoder = HashEncoder(1)
    words = [f"w{i}" for i in range(20)]
    signs = encoder.encode_query(words)[:, 0]
    plus, minus = words[int(np.argmax(signs))], words[int(np.argmin(signs))]
    assert encoder.encode_query([f"{plus} {minus}"]).tolist() == [[1.0]]


def test_the_instruction_moves_the_vector_a_little() -> None:
    encoder = HashEncoder(256)
    bare = encoder.encode_query(["red cat sat"])[0]
    told = encoder.encode_query(["red cat sat"], task="find animals")[0]
    assert 0.95 < bare @ told < 1 - 1e-6
    assert np.linalg.norm(told) == pytest.approx(1, abs=1e-6)
    deaf = HashEncoder(256, instruction_weight=0)
    assert np.array_equal(bare, deaf.encode_query(["red cat sat"], task="find animals")[0])
    assert encoder.encode_query([], task="x").shape == (0, 256)
