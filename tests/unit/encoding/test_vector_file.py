"""Vectors found by their texts: memory does not grow with the texts."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.core.errors import DataError
from nvembed.core.files import write_jsonl
from nvembed.encoding.files import encode_file
from nvembed.encoding.vector_file import VectorFile


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_vectors_are_those_of_the_first_equal_text(tmp_path: Path, ending: str) -> None:
    texts = [f"the text of number {number % 30}" for number in range(40)]
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    write_jsonl(tmp_path / "texts.jsonl", rows)
    output = tmp_path / f"vectors.{ending}"
    encode_file(HashEncoder(32), tmp_path / "texts.jsonl", output, task=None)
    found = VectorFile(output, tmp_path / "texts.jsonl")
    asked = [texts[7], texts[31], texts[2], texts[7]]
    expected = HashEncoder(32).encode_document(asked)
    np.testing.assert_allclose(found.encode_document(asked), expected, atol=1e-6)
    assert found.dimension == 32
    if ending == "parquet":
        write_jsonl(tmp_path / "texts.jsonl", [*rows[:5], rows[6], rows[5], *rows[7:]])
        with pytest.raises(DataError, match="a vector of 'd5' where 'd6' is the id of the text"):
            VectorFile(output, tmp_path / "texts.jsonl")


def test_no_text_is_held(tmp_path: Path) -> None:
    rows = ({"text": f"{number} " + "a word and another " * 600} for number in range(400))
    write_jsonl(tmp_path / "texts.jsonl", rows)  # 4.6 MB
    np.save(tmp_path / "vectors.npy", np.eye(400, 8, dtype=np.float32) + 1)
    tracemalloc.start()
    try:
        found = VectorFile(tmp_path / "vectors.npy", tmp_path / "texts.jsonl")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.encode_document(["399 " + "a word and another " * 600]).shape == (1, 8)
    assert peak < 1_000_000
