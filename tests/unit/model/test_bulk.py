from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import ModelError
from nvembed.model import bulk as encoding
from nvembed.model.bulk import encode_texts


def test_windows_join_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"word{i} text" for i in range(11)]
    whole = HashEncoder().encode_query(texts, task="Find it")
    monkeypatch.setattr(encoding, "WINDOW_TEXTS", 3)
    vectors = encode_texts(HashEncoder(), texts, side="query", task="Find it")
    assert np.array_equal(vectors, whole)
    assert not np.array_equal(encode_texts(HashEncoder(), texts, side="document"), whole)


def test_no_texts() -> None:
    assert encode_texts(HashEncoder(8), [], side="document").shape == (0, 8)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4,)])
def test_wrong_shapes_are_model_errors(shape: tuple[int, ...]) -> None:
    class WrongEncoder(HashEncoder):
        def encode_document(
            self, texts: Sequence[str], *, task: str | None = None
        ) -> NDArray[np.float32]:
            return np.ones(shape, dtype=np.float32)

    with pytest.raises(ModelError, match=r"expected \(2, 4\)"):
        encode_texts(WrongEncoder(4), ["a", "b"], side="document")
