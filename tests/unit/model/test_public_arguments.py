"""Every public argument of the Python API: what is wrong is a ConfigError that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvembed import NVEmbed, TrainConfig, load_config, train
from nvembed.core.errors import ConfigError, DataError, ModelError, UserError
from nvembed.encoding.export.folders import export_folder, export_model
from nvembed.model.encoder import load_encoder
from nvembed.model.settings import LongTexts

TEXTS = ["one", "two words"]

LOADING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens: -1 given"),
    ({"max_tokens": 0}, "max_tokens: 0 given"),
    ({"max_tokens": 2}, "max_tokens: 2 given; expected a number of at least 3"),
    ({"max_tokens": "512"}, 'max_tokens: "512" given, expected a valid integer'),
    ({"pooling": "latent", "num_latents": 0}, "num_latents: 0 given"),
    ({"pooling": "latent", "num_heads": 0}, "num_heads: 0 given"),
    ({"pooling": "self_attention", "num_heads": 7}, "7 heads do not divide the width 32"),
    ({"pooling": "cls"}, "pooling: \"cls\" given, expected 'mean', 'last', 'latent' or"),
    ({"attention": "bidir"}, "attention: \"bidir\" given, expected 'bidirectional' or 'causal'"),
    ({"device": "gpu"}, "device: 'gpu' cannot be used"),
    ({"device": "meta"}, "device: 'meta' cannot be used"),
    ({"device_map": 5}, "device_map: 5 given"),
    ({"device_map": {"": "gpu"}}, "device: 'gpu' cannot be used"),
    ({"dtype": "float31"}, 'dtype: "float31" given, expected .*float32'),
    ({"dtype": torch.int8}, "dtype: torch.int8 given; expected float32"),
    ({"revision": 5}, "revision: 5 given, expected a valid string"),
    ({"local_files_only": "yes"}, 'local_files_only: "yes" given'),
    ({"max_token": 5}, "'max_token', did you mean max_tokens"),
]


@pytest.mark.parametrize(("options", "message"), LOADING)
def test_loading(tiny_decoder_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        NVEmbed.from_pretrained(tiny_decoder_dir, **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 5, b"x", "", "x" * 5000, "a\nb", "a\0b"])
def test_names(name: Any) -> None:
    with pytest.raises(UserError) as caught:
        NVEmbed.from_pretrained(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_encoder(name)


@pytest.fixture(scope="module")
def model(tiny_decoder_dir: Path) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")


ENCODING: list[tuple[Callable[[NVEmbed], Any], str]] = [
    (lambda m: m.encode(TEXTS, long="windows"), 'long: "windows" given, expected an instance of L'),
    (lambda m: m.encode(TEXTS, batch_size=0), "batch_size: 0 given"),
    (lambda m: m.encode(TEXTS, precision="int4"), 'precision: "int4" given'),
    (lambda m: m.encode(TEXTS, truncate_dim=0), "truncate_dim: 0 given"),
    (lambda m: m.encode(TEXTS, truncate_dim=33), "truncate_dim: 33 dimensions asked for; exp"),
    (lambda m: m.encode(TEXTS, truncate_dim="8"), 'truncate_dim: "8" given'),
    (lambda m: m.encode(TEXTS, output_value="token_embeddings"), "output_value: "),
    (lambda m: m.encode(TEXTS, prompt=5), "prompt: 5 given"),
    (
        lambda m: m.encode(TEXTS, prompt_name="qeury"),
        "no prompt called 'qeury', did you mean query",
    ),
    (lambda m: m.encode(TEXTS, device="gpu"), "device: 'gpu' cannot be used"),
    (lambda m: m.encode(TEXTS, device=[]), "no process to work in"),
    (lambda m: m.encode(TEXTS, pool={}), "no process to work in"),
    (lambda m: m.encode(TEXTS, normalize_embeddings="no"), 'normalize_embeddings: "no" given'),
    (lambda m: m.encode(TEXTS, trunkate_dim=5), "trunkate_dim, did you mean truncate_dim"),
    (lambda m: m.encode_query(TEXTS, task=5), "task: 5 given"),
    (lambda m: m.encode_query(TEXTS, prompt_name=5), "prompt_name: 5 given"),
    (lambda m: m.encode_document(TEXTS, task=["x"]), "task: a list given"),
    (lambda m: m.encode_chunks("abc"), 'texts: "abc" given'),
    (lambda m: m.encode_chunks(TEXTS, long="late"), 'long: "late" given'),
    (lambda m: m.encode_chunks(TEXTS, long=LongTexts("cut")), "'cut' given; expected LongTexts"),
    (lambda m: LongTexts("half"), "way: \"half\" given, expected 'cut', 'windows' or 'late'"),
    (lambda m: LongTexts("windows", overlap=-1), "overlap: -1 given"),
    (lambda m: LongTexts("late", chunk_tokens=0), "chunk_tokens: 0 given"),
    (lambda m: setattr(m, "max_seq_length", -1), "max_tokens: -1 given"),
    (lambda m: setattr(m.backbone, "max_tokens", 10.5), "max_tokens: 10.5 given"),
    (lambda m: export_model(m, "x", "zip", name="m"), 'kind: "zip" given'),  # type: ignore[arg-type]
    (lambda m: export_model(5, "x", "onnx", name="m"), "model: 5 given"),  # type: ignore[arg-type]
    (lambda m: export_folder(5, "x", "onnx"), "name: 5 given"),  # type: ignore[arg-type]
    (lambda m: export_folder("m", "x", "onnx", max_shard_bytes=0), "max_shard_bytes: 0 given"),
    (lambda m: load_encoder("m", "float31"), 'dtype: "float31" given'),  # type: ignore[arg-type]
    (lambda m: train(5), "config: 5 given, expected an instance of TrainConfig"),  # type: ignore[arg-type]
    (lambda m: train({}, base_dir="."), "config: a mapping given, expected an instance of TrainC"),
    (lambda m: load_config(TrainConfig, 5), "path: 5 given"),  # type: ignore[arg-type]
    (lambda m: load_config(dict, "x"), "cls: "),  # type: ignore[type-var]
    (lambda m: load_config(TrainConfig, None, "a=b"), "overrides: "),
    (lambda m: load_config(TrainConfig, "a\0b"), "cannot read: embedded null"),
]


@pytest.mark.parametrize(("call", "message"), ENCODING)
def test_encoding_and_the_rest(
    model: NVEmbed, call: Callable[[NVEmbed], Any], message: str
) -> None:
    model.prompts = {"query": "", "document": ""}
    with pytest.raises(ConfigError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert model.max_seq_length == 512


@pytest.mark.parametrize("texts", [None, 5, [1], {"a": "b"}, (t for t in TEXTS), [b"x"], [["a"]]])
def test_what_is_no_text(model: NVEmbed, texts: Any) -> None:
    with pytest.raises(DataError, match="expected a string"):
        model.encode(texts)


def test_right_values_still_work(model: NVEmbed, tiny_decoder_dir: Path) -> None:
    whole = model.encode(TEXTS)
    short = model.encode(TEXTS, truncate_dim=np.int64(8))
    np.testing.assert_array_equal(short, whole[:, :8])
    np.testing.assert_array_equal(model.encode(np.array(TEXTS)), whole)
    np.testing.assert_array_equal(model.encode(TEXTS, "query"), whole)  # a position of its own
    for name in ("float32", torch.float32, "auto", None):
        loaded = NVEmbed.from_pretrained(tiny_decoder_dir, dtype=name, device=torch.device("cpu"))
        np.testing.assert_array_equal(loaded.encode(TEXTS), whole)
    assert NVEmbed.from_pretrained(tiny_decoder_dir, max_tokens=3).encode(TEXTS).shape == (2, 32)


def test_a_table_of_positions_is_a_limit(tiny_tokenizer, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = NVEmbed.from_pretrained(tmp_path, device="cpu")
    assert model.max_seq_length == 64
    assert np.isfinite(model.encode(["word " * 100])).all()
    model.max_seq_length = 65
    assert model.max_seq_length == 64
    model.max_seq_length = 63
    assert model.max_seq_length == 63


def test_a_tokenizer_of_another_model(tiny_tokenizer, tiny_decoder_dir: Path, tmp_path) -> None:
    import shutil

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    folder = shutil.copytree(tiny_decoder_dir, tmp_path / "model")
    backend.add_tokens([f"more{n}" for n in range(9)])
    # Added tokens may have no embedding while no text has them, unless one ends every text.
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)
    NVEmbed.from_pretrained(folder, device="cpu")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="more8", bos_token="<s>"
    ).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"token ids up to 267 and the model has 259 embeddings"):
        NVEmbed.from_pretrained(folder, device="cpu")
