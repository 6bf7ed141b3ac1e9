"""A stock sentence-transformers model as something to start from: the vectors are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from nvembed.core.errors import ModelError
from nvembed.model.embedder import NVEmbed

WORDS = ["the", "fox", "owl", "sees", "a", "tree", "lake", "moon", "rain", "find", ":", "##s"]
TEXTS = ["the fox sees a tree", "Moon", "a lake : the owls sees rain " * 4, ""]
PROMPTS = {"query": "find : ", "document": ""}


def write_stock(folder: Path, *, family: str = "Bert", mode: str = "mean", limit: int = 16) -> Path:
    """A random encoder of two layers, [CLS] and [SEP] put on by its tokenizer."""
    special = ["<pad>", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), special, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=0,
    )
    base = folder.with_name(f"{folder.name}-base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=limit)
    modules = [transformer, Pooling(32, pooling_mode=mode), Normalize()]
    SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_vectors_are_those_of_the_stock_model(tmp_path: Path, family: str) -> None:
    """Also of RoBERTa, whose positions are counted from behind its padding row."""
    folder = write_stock(tmp_path / "stock", family=family)
    stock = SentenceTransformer(str(folder), device="cpu")
    ours = NVEmbed.from_pretrained(folder, device="cpu")
    expected = stock.encode(TEXTS, convert_to_tensor=True)
    found = ours.encode(TEXTS, convert_to_tensor=True)
    assert ours.max_seq_length == 16
    assert ours.prompts == stock.prompts
    assert (found - expected).abs().max() < 1e-5
    assert (found[0] - found[1]).abs().max() > 0.05  # the vectors differ at all

    # An untrained latent head starts from the same vectors, and is there.
    latent = NVEmbed.from_pretrained(folder, pooling="latent", num_latents=4, device="cpu")
    assert (latent.encode(TEXTS, convert_to_tensor=True) - expected).abs().max() < 1e-5
    assert sum(p.numel() for p in latent.pooling.parameters()) > 0


def test_the_limit_is_never_exceeded(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock")
    assert NVEmbed.from_pretrained(folder, max_tokens=512, device="cpu").max_seq_length == 16
    assert NVEmbed.from_pretrained(folder, max_tokens=9, device="cpu").max_seq_length == 9


def test_layout_of_old_folders(tmp_path: Path) -> None:
    """Class names of sentence-transformers 2, a flag per pooling mode, no Normalize."""
    folder = write_stock(tmp_path / "stock")
    expected = NVEmbed.from_pretrained(folder, device="cpu").encode(TEXTS)
    modules: list[dict[str, Any]] = json.loads((folder / "modules.json").read_text())[:2]
    for module, name in zip(modules, ("Transformer", "Pooling"), strict=True):
        module["type"] = f"sentence_transformers.models.{name}"
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = folder / modules[1]["path"] / "config.json"
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    again = NVEmbed.from_pretrained(folder, device="cpu").encode(TEXTS)
    assert abs(again - expected).max() < 1e-6


@pytest.mark.parametrize(("key", "value"), [("type", None), ("path", -1), ("path", None)])
def test_a_damaged_list_of_modules_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_stock(tmp_path / "stock")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0][key] = value
    (folder / "modules.json").write_text(json.dumps(modules))
    message = f"modules.json, entry 0: {key}: .* expected a valid string"
    with pytest.raises(ModelError, match=message):
        NVEmbed.from_pretrained(folder, device="cpu")


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock", mode="cls")
    with pytest.raises(ModelError, match=r"its pooling is 'cls'.*pooling=") as error:
        NVEmbed.from_pretrained(folder, device="cpu")
    assert "\n" not in str(error.value)
    assert NVEmbed.from_pretrained(folder, pooling="latent", device="cpu").pooling.width == 32
    wide = SentenceTransformer(str(folder), device="cpu")
    wide.append(Dense(32, 8))
    wide.save(str(tmp_path / "dense"))
    with pytest.raises(ModelError, match="its modules are Transformer, Pooling, Normalize, Dense"):
        NVEmbed.from_pretrained(tmp_path / "dense", pooling="mean", device="cpu")
