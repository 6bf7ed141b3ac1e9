from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nvembed.core.errors import ModelError
from nvembed.core.files import write_jsonl
from nvembed.encoding.files import encode_file
from nvembed.model.encoder import SentenceTransformerEncoder, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerFast

TASK = "Find it"
TEXTS = ["sort a list", "open a file, then read it", "x"]


@pytest.fixture
def plain_model(tiny_tokenizer: PreTrainedTokenizerFast) -> SentenceTransformer:
    """A sentence-transformers model without any module of ours: a table of token vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.random.default_rng(0).standard_normal((len(tiny_tokenizer), 12))
    table = StaticEmbedding(
        tiny_tokenizer.backend_tokenizer, embedding_weights=weights.astype(np.float32)
    )
    return SentenceTransformer(modules=[table], device="cpu")


def test_a_bare_decoder_and_a_saved_model_are_ours(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    from nvembed import NVEmbed

    bare = load_encoder(str(tiny_decoder_dir))
    assert isinstance(bare, NVEmbed)
    bare.save_pretrained(str(tmp_path / "model"))
    saved = load_encoder(str(tmp_path / "model"))
    assert isinstance(saved, NVEmbed)
    # The file path gives what the model gives, on both sides.
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    for task in (None, TASK):
        output = tmp_path / "out.npy"
        done = encode_file(str(tmp_path / "model"), tmp_path / "in.jsonl", output, task=task)
        direct = (
            bare.encode_document(TEXTS) if task is None else bare.encode_query(TEXTS, task=task)
        )
        assert done.dimension == 32
        # float32 forward of two layers, packs of the same texts
        np.testing.assert_allclose(np.load(output), direct, atol=1e-6)
    assert not np.allclose(bare.encode_document(TEXTS), bare.encode_query(TEXTS, task=TASK))


def test_weights_in_sixteen_bit_give_nearly_the_same_vectors(
    tiny_decoder_dir: Path, plain_model: SentenceTransformer, tmp_path: Path
) -> None:
    import torch

    from nvembed import NVEmbed

    model = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", num_latents=8, num_heads=2)
    for parameter in model.pooling.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    half = load_encoder(folder, "bfloat16")
    assert isinstance(half, NVEmbed)
    assert half.backbone.dtype == torch.bfloat16
    full = load_encoder(folder, "float32").encode_query(TEXTS, task=TASK)
    vectors = half.encode_query(TEXTS, task=TASK)
    assert vectors.dtype == np.float32
    cosines = (vectors * full).sum(axis=1)
    assert 0.999 < cosines.min() < 1 - 1e-7
    load_encoder(folder, "auto")


def test_any_other_model_is_wrapped_and_normalised(
    plain_model: SentenceTransformer, tmp_path: Path
) -> None:
    plain_model.save_pretrained(str(tmp_path / "plain"))
    encoder = load_encoder(str(tmp_path / "plain"))
    assert isinstance(encoder, SentenceTransformerEncoder)
    assert encoder.dimension == 12
    raw = plain_model.encode(TEXTS)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    vectors = encoder.encode_document(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    # It was not trained with instructions and has no prompts.
    np.testing.assert_allclose(encoder.encode_query(TEXTS, task=TASK), expected, atol=1e-6)
    assert encoder.encode_query([]).shape == (0, 12)


def test_rows_that_16_bit_left_too_short_get_length_one(plain_model: SentenceTransformer) -> None:
    expected = SentenceTransformerEncoder(plain_model).encode_document(TEXTS)
    original = plain_model.encode_document
    plain_model.encode_document = lambda *a, **o: 0.998 * original(*a, **o)  # type: ignore[method-assign]
    rows = SentenceTransformerEncoder(plain_model).encode_document(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_own_prompts_of_a_model_hold(plain_model: SentenceTransformer) -> None:
    plain_model.prompts = {"query": "query: ", "passage": "passage: "}
    encoder = SentenceTransformerEncoder(plain_model)

    def bare(prompt: str) -> np.ndarray:
        texts = [prompt + text for text in TEXTS]
        return plain_model.encode(texts, prompt="", normalize_embeddings=True)

    query, document = encoder.encode_query(TEXTS, task=TASK), encoder.encode_document(TEXTS)
    np.testing.assert_allclose(query, bare("query: "), atol=1e-6)
    np.testing.assert_allclose(document, bare("passage: "), atol=1e-6)
    # A model whose prompts are instructions gets the one asked for, on the side asked for.
    plain_model.prompts = {"web": "Instruct: Given a web search query\nQuery: "}
    encoder = SentenceTransformerEncoder(plain_model)
    prompt = "Instruct: Find it\nQuery: "
    np.testing.assert_allclose(encoder.encode_query(TEXTS, task=TASK), bare(prompt), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_document(TEXTS, task=TASK), bare(prompt), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_document(TEXTS), bare(""), atol=1e-6)


def test_nothing_to_load_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        load_encoder(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no model in this folder; expected modules\.json or"):
        load_encoder(str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ModelError, match="no such model folder"):
        load_encoder(str(tmp_path / "file"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "modules.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"modules\.json:1: not valid JSON"):
        load_encoder(str(broken))
    missing = [{"idx": 0, "name": "0", "path": "", "type": "nvembed.model.backbone.Backbone"}]
    (broken / "modules.json").write_text(json.dumps(missing), encoding="utf-8")
    with pytest.raises(ModelError):
        load_encoder(str(broken))


def test_a_hub_id_without_network_is_one_clear_line() -> None:
    with pytest.raises(ModelError, match="no-such-owner/no-such-model"):
        load_encoder("no-such-owner/no-such-model")
