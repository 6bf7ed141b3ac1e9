from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from nvembed.core.errors import ModelError
from nvembed.model import encoding, packs
from nvembed.model.embedder import NVEmbed
from nvembed.model.pooling import LatentAttentionPooling
from oracles.golden import load_official

TEXTS = ["one", "two words", "rather a longer text, with commas", "one", "short", ""]
TASK = "find it"


@pytest.fixture(scope="module", params=["mean", "last", "latent", "self_attention"])
def model(request, tiny_decoder_dir: Path) -> NVEmbed:
    made = NVEmbed.from_pretrained(tiny_decoder_dir, pooling=request.param, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in made.pooling.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def test_vectors_do_not_depend_on_their_neighbours(model: NVEmbed, monkeypatch) -> None:
    together = model.encode_query(TEXTS, task=TASK)
    alone = np.stack([model.encode_query(text, task=TASK) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    monkeypatch.setattr(encoding, "CPU_PACK_TOKENS", 40)
    np.testing.assert_allclose(model.encode_query(TEXTS, task=TASK), together, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    assert together.dtype == np.float32


def test_equal_texts_are_embedded_once(model: NVEmbed, monkeypatch) -> None:
    wanted = model.encode(["one", "two", "three"])
    seen: list[int] = []
    embed = packs.embed_filled
    monkeypatch.setattr(
        packs, "embed_filled", lambda m, texts: (seen.append(len(texts)), embed(m, texts))[1]
    )
    found = model.encode(["two", "one", "two", "three", "one"])
    assert sum(seen) == 3
    assert np.allclose(found, wanted[[1, 0, 1, 2, 0]], atol=1e-6)


def test_task_and_prompt_agree_and_matter(model: NVEmbed) -> None:
    by_task = model.encode_query(TEXTS, task=TASK)
    by_prompt = model.encode(TEXTS, prompt="Instruct: find it\nQuery: ")
    np.testing.assert_array_equal(by_task, by_prompt)
    bare = model.encode_document(TEXTS)
    assert np.abs(by_task - bare).max() > 1e-3
    np.testing.assert_array_equal(model.encode_document(TEXTS, task=TASK), by_task)
    np.testing.assert_array_equal(bare, model.encode(TEXTS))


def test_saved_loads_bit_identically_here_and_in_sentence_transformers(
    model: NVEmbed, tmp_path: Path
) -> None:
    model.prompts = {"query": "Instruct: x\nQuery: ", "document": ""}
    model.save_pretrained(str(tmp_path))
    assert not list(tmp_path.rglob("*.bin"))
    expected = model.encode_query(TEXTS)
    loaded = NVEmbed.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(loaded.encode_query(TEXTS), expected)
    plain = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(plain.encode_query(TEXTS), expected, atol=1e-6)
    assert plain.max_seq_length == loaded.max_seq_length == 512


def test_outputs_of_sentence_transformers_work(model: NVEmbed) -> None:
    full = model.encode(TEXTS)
    cut = model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(
        cut, full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True), atol=1e-5
    )
    assert model.encode(TEXTS, precision="binary").shape == (len(TEXTS), 4)
    assert model.encode([]).shape[0] == 0
    assert model.similarity(full[:1], full[3:4]).item() == pytest.approx(1.0, abs=1e-5)
    assert model.encode("one").shape == (model.dimension,)


def test_latent_attention_on_an_existing_sentence_transformers_model(
    tiny_decoder_dir: Path,
) -> None:
    transformer = Transformer(str(tiny_decoder_dir))
    transformer.tokenizer.pad_token = "</s>"
    plain = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    latent = LatentAttentionPooling(32, num_latents=4, num_heads=2)
    tuned = SentenceTransformer(modules=[transformer, latent], device="cpu")
    np.testing.assert_allclose(tuned.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    latent.layer.to_out.weight.data.normal_()
    assert np.abs(tuned.encode(TEXTS) - plain.encode(TEXTS)).max() > 1e-2


def test_options_of_a_saved_model_are_refused(model: NVEmbed, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="fixed in a saved model"):
        NVEmbed.from_pretrained(tmp_path, pooling="mean")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["type"] = "somewhere.else.Module"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"module class somewhere\.else\.Module"):
        NVEmbed.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        NVEmbed.from_pretrained(tmp_path / "missing" / "model")


def test_golden_embeddings_of_the_official_implementation(shared) -> None:
    folder = shared("golden/nv-embed-tiny")
    groups = json.loads((folder / "expected.json").read_text())["groups"]
    assert len(groups) >= 5
    for group in groups:
        official = load_official(folder, group["max_length"])
        texts, prompt = group["texts"], group["instruction"]
        expected = np.array(group["embeddings"])
        together = official.encode(texts, prompt=prompt)
        np.testing.assert_allclose(together, expected, atol=1e-5, err_msg=group["name"])
        alone = np.stack([official.encode(text, prompt=prompt) for text in texts[::-1]])[::-1]
        np.testing.assert_allclose(alone, expected, atol=1e-5, err_msg=group["name"])
