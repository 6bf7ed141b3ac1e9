"""Truncated and quantised vectors of ``NVEmbed.encode*``, by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from nvembed.model.embedder import NVEmbed
from nvembed.model.encoding import quantize

TEXTS = [f"text number {i} of {i * i}" for i in range(120)]
TASK = "find it"


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_truncation_is_slicing(model: NVEmbed, method: str) -> None:
    encode = getattr(model, method)
    full = encode(TEXTS, task=TASK)
    np.testing.assert_array_equal(encode(TEXTS, task=TASK, truncate_dim=12), full[:, :12])
    cut = encode(TEXTS, task=TASK, truncate_dim=12, normalize_embeddings=True)
    lengths = np.linalg.norm(full[:, :12], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, full[:, :12] / lengths, rtol=1e-5, atol=1e-7)
    assert encode([], task=TASK, truncate_dim=12, convert_to_tensor=True).shape[0] == 0
    with model.truncate_embeddings(12):
        assert model.dimension == 12
        np.testing.assert_array_equal(encode(TEXTS, task=TASK), full[:, :12])
    assert model.dimension == 32


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_quantised_values(model: NVEmbed, method: str) -> None:
    encode = getattr(model, method)
    full = encode(TEXTS, task=TASK)
    least, greatest = full.min(0), full.max(0)
    steps = (greatest - least) / 255
    expected = np.clip(np.floor((full - least) / steps), 0, 255)
    unsigned = encode(TEXTS, task=TASK, precision="uint8")
    signed = encode(TEXTS, task=TASK, precision="int8")
    assert (unsigned.dtype, signed.dtype) == (np.uint8, np.int8)
    # One text in 120 × 32 may sit on the edge of a step.
    assert np.abs(unsigned - expected).max() <= 1
    assert (unsigned == expected).mean() > 0.999
    np.testing.assert_array_equal(signed, unsigned.astype(int) - 128)
    assert np.abs(unsigned * steps + least - full).max() <= steps.max() * 1.01

    bits = encode(TEXTS, task=TASK, precision="binary")
    assert bits.shape == (len(TEXTS), 4)
    signs = np.unpackbits((bits.astype(int) + 128).astype(np.uint8), axis=1).astype(bool)
    np.testing.assert_array_equal(signs, full > 0)
    short = encode(TEXTS, task=TASK, precision="ubinary", truncate_dim=16)
    np.testing.assert_array_equal(np.unpackbits(short, axis=1).astype(bool), full[:, :16] > 0)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("width", [32, 20, 1])
def test_the_bits_of_sentence_transformers(model: NVEmbed, monkeypatch, precision, width) -> None:
    full = model.encode(TEXTS, truncate_dim=width)
    full[:, -1] = 0.5  # a dimension without a range
    wanted = quantize_embeddings(full, precision)
    found = quantize(torch.from_numpy(full), precision)
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.numpy().dtype == wanted.dtype

    def unused(*_: object, **__: object) -> None:
        raise AssertionError("quantised on the host")

    plain = quantize_embeddings(model.encode(TEXTS, truncate_dim=width), precision)
    monkeypatch.setattr(
        "sentence_transformers.sentence_transformer.model.quantize_embeddings", unused
    )
    for encode in (model.encode, model.encode_document):
        array = encode(TEXTS, truncate_dim=width, precision=precision)
        np.testing.assert_array_equal(array, plain)
        assert array.dtype == plain.dtype
    tensor = model.encode(TEXTS, truncate_dim=width, precision=precision, convert_to_tensor=True)
    rows = model.encode(TEXTS, truncate_dim=width, precision=precision, convert_to_numpy=False)
    assert torch.equal(tensor, torch.from_numpy(plain))
    assert torch.equal(torch.stack(rows), tensor)


def test_ranges_of_calibration(model: NVEmbed) -> None:
    documents = model.encode_document(TEXTS)
    queries = model.encode_query(TEXTS[:3], task=TASK)
    ranges = np.stack([documents.min(0), documents.max(0)])
    done = quantize_embeddings(queries, "int8", ranges=ranges)
    same = quantize_embeddings(queries, "int8", calibration_embeddings=documents)
    np.testing.assert_array_equal(done, same)
    steps = (ranges[1] - ranges[0]) / 255
    expected = np.clip(np.floor((queries - ranges[0]) / steps), 0, 255) - 128
    np.testing.assert_array_equal(done, expected.astype(np.int8))


def test_tensors_and_one_text(model: NVEmbed) -> None:
    full = model.encode_query(TEXTS[0], task=TASK)
    one = model.encode_query(TEXTS[0], task=TASK, truncate_dim=8, convert_to_tensor=True)
    assert isinstance(one, torch.Tensor)
    np.testing.assert_allclose(one.numpy(), full[:8], atol=1e-6)
    bits = model.encode_query(TEXTS[0], task=TASK, precision="ubinary")
    np.testing.assert_array_equal(np.unpackbits(bits).astype(bool), full > 0)
