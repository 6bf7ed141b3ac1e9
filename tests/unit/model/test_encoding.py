"""The encode engine: windows, threads and long texts, against plain loops."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed.core.errors import DataError, ModelError
from nvembed.model import encoding, packs
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LongTexts
from nvembed.model.tokens import TokenizedText

TEXTS = [f"text number {i} " + "and more " * (i % 7) for i in range(40)]
LONG = "The quick brown fox jumps over the lazy dog, twice. " * 8  # 416 tokens
TASK = "find it"


@pytest.fixture(scope="module", params=["mean", "last", "latent", "self_attention"])
def model(request, tiny_decoder_dir: Path) -> NVEmbed:
    made = NVEmbed.from_pretrained(
        tiny_decoder_dir, pooling=request.param, max_tokens=64, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.pooling.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_tokenising_ahead_changes_no_bit(model: NVEmbed, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "CPU_PACK_TOKENS", 50)
    threads: set[str] = set()
    tokenize = model.backbone.tokenize_texts

    def noted(texts, prompt=""):
        threads.add(threading.current_thread().name)
        return tokenize(texts, prompt)

    texts = [f"{text} {n}" for n in range(3) for text in TEXTS]
    monkeypatch.setattr(model.backbone, "tokenize_texts", noted)
    found = model.encode(texts)
    assert all(name.startswith("nvembed-prefetch") for name in threads)
    monkeypatch.setattr(encoding, "prefetch", iter)
    np.testing.assert_array_equal(model.encode(texts), found)
    assert "MainThread" in threads
    monkeypatch.setattr(encoding, "CPU_PACK_TOKENS", 10_000)
    np.testing.assert_allclose(model.encode(texts), found, atol=1e-5)


@pytest.mark.parametrize("side", ["query", "document"])
def test_prepared_work_is_encoding(model: NVEmbed, side, monkeypatch) -> None:
    monkeypatch.setattr(model, "prompts", {"query": "q: ", "passage": "p: "})
    encode = model.encode_query if side == "query" else model.encode_document
    texts = [*TEXTS, TEXTS[3]]
    for task in (None, TASK):
        work = model.prepare(texts, side=side, task=task)
        np.testing.assert_array_equal(work.launch()(), encode(texts, task=task))
    lengths = [len(row) for row in model.backbone.tokenize_texts(TEXTS, "p: ")]
    assert model.prepare(texts, side="document").tokens == sum(lengths)
    short = model.prepare(texts, side=side, truncate_dim=8).launch()()
    np.testing.assert_allclose(short, unit(encode(texts)[:, :8]), atol=1e-6)


def test_windows_of_a_text_are_averaged_by_their_tokens(model: NVEmbed) -> None:
    long = LongTexts("windows", overlap=10)
    texts = ["short", LONG, LONG[:100], "", LONG]
    found = model.encode_query(texts, task=TASK, long=long)
    head = model.backbone.tokenize_texts([""], f"Instruct: {TASK}\nQuery: ")[0].ids[:-1]
    room = 64 - len(head) - 1
    for row, text in ((1, LONG), (2, LONG[:100])):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        vectors, weights, start = [], [], 0
        while True:
            part = ids[start : start + room]
            window = TokenizedText((*head, *part, 2), len(head))
            with torch.inference_mode():
                vectors.append(packs.embed_pack(model, [window])[0].numpy())
            weights.append(len(part) + 1)
            if start + room >= len(ids):
                break
            start += room - 10
        mean = (np.stack(vectors) * np.array(weights)[:, None]).sum(0)
        np.testing.assert_allclose(found[row], unit(mean), atol=1e-5)
    np.testing.assert_array_equal(found[4], found[1])
    cut = model.encode_query(texts, task=TASK)
    np.testing.assert_allclose(found[[0, 3]], cut[[0, 3]], atol=1e-5)
    assert np.abs(found[1] - cut[1]).max() > 1e-3
    work = model.prepare(texts, side="query", task=TASK, long=long)
    np.testing.assert_allclose(work.launch()(), found, atol=1e-5)


def test_late_chunks_are_pooled_states_of_the_whole_text(model: NVEmbed) -> None:
    text = LONG[:230]
    (one, two) = model.encode_chunks([text, "short"], long=LongTexts("late", chunk_tokens=60))
    ids = (1, *model.tokenizer(text, add_special_tokens=False)["input_ids"], 2)
    assert len(ids) == 232  # far beyond max_tokens, within the 256 positions
    bounds = [0, 1 + 57, 1 + 115, 1 + 172, 232]
    assert one.spans == ((0, 57), (57, 115), (115, 172), (172, 230))
    with torch.inference_mode():
        hidden_TD = model.backbone.states([ids])
        chunks = [hidden_TD[a:b] for a, b in pairwise(bounds)]
        kind = type(model.pooling).__name__
        if kind == "MeanPooling":
            wanted = [chunk.mean(0) for chunk in chunks]
        elif kind == "LastTokenPooling":
            wanted = [chunk[-1] for chunk in chunks]
        elif kind == "LatentAttentionPooling":
            wanted = [model.pooling.layer(chunk).mean(0) for chunk in chunks]
        else:
            return
    np.testing.assert_allclose(one.vectors, unit(torch.stack(wanted).numpy()), atol=1e-5)
    np.testing.assert_allclose(two.vectors[0], model.encode_document("short"), atol=1e-5)
    # The chunk alone does not know what stands around it.
    alone = model.encode_document(text[57:115])
    assert np.abs(one.vectors[1] - alone).max() > 1e-3


def test_one_chunk_is_the_text_and_long_texts_get_several_contexts(model: NVEmbed) -> None:
    texts = [LONG, *TEXTS[:5], TEXTS[7], LONG, LONG[:200]]
    long = LongTexts("late", chunk_tokens=1000)
    found = model.encode_chunks(texts, long=long)
    assert [len(chunks.vectors) for chunks in found] == [2, *[1] * 6, 2, 1]
    same = np.concatenate([chunks.vectors for chunks in found[1:7]])
    np.testing.assert_allclose(same, model.encode_document(texts[1:7]), atol=1e-5)
    np.testing.assert_array_equal(found[0].vectors, found[7].vectors)
    work = model.prepare(texts, side="document", long=long)
    assert work.spans == [chunks.spans for chunks in found]
    rows = np.concatenate([chunks.vectors for chunks in found])
    np.testing.assert_allclose(work.launch()(), rows, atol=1e-5)
    small = model.encode_chunks([LONG], long=LongTexts("late", chunk_tokens=50, max_tokens=52))
    cut = model.backbone.max_tokens
    model.max_seq_length = 400
    pieces = [LONG[start:end] for start, end in small[0].spans]
    np.testing.assert_allclose(small[0].vectors, model.encode_document(pieces), atol=1e-5)
    model.max_seq_length = cut


def test_wrong_uses_are_told(model: NVEmbed) -> None:
    with pytest.raises(ModelError, match="Call encode_chunks"):
        model.encode_document(["a"], long=LongTexts("late"))
    with pytest.raises(DataError, match="text 2: got int"):
        model.encode(["a", "a", 3])
    assert model.encode_chunks([]) == []


@pytest.mark.slow
def test_several_devices(wide_decoder_dir: Path) -> None:
    model = NVEmbed.from_pretrained(wide_decoder_dir, device="cpu")
    assert any("forward" in vars(module) for module in model.modules())
    found = model.encode_query(TEXTS, task=TASK, device=["cpu", "cpu"], chunk_size=7)
    np.testing.assert_allclose(found, model.encode_query(TEXTS, task=TASK), atol=1e-5)
