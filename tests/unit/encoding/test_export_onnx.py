"""The ONNX graph against the model, at sizes it was not traced with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from families import make_family
from nvembed.cli.main import run
from nvembed.core.errors import ModelError
from nvembed.encoding.export import onnx as export_onnx
from nvembed.encoding.export.folders import export_folder
from nvembed.encoding.export.onnx import write_onnx
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import OnnxEncoder, load_encoder, padded_inputs
from official_folders import write_official
from page_servers import blocks

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PROMPT = "Instruct: find it\nQuery: "
TEXTS = ["a", "short text", "a text that is longer than any sliding window here", "", "same len.."]


def build(folder: Path, tokenizer, family: str, pooling: str, attention: str) -> NVEmbed:
    make_family(family, folder, tokenizer)
    model = NVEmbed.from_pretrained(
        folder, pooling=pooling, num_latents=8, num_heads=2, attention=attention, device="cpu"
    )
    for parameter in model.pooling.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a fresh latent pooling is mean pooling
    return model


@pytest.mark.parametrize(
    ("family", "pooling", "attention"),
    [
        ("mistral", "latent", "bidirectional"),
        ("gemma2", "mean", "bidirectional"),  # soft-capped scores, windows
        ("qwen3", "mean", "causal"),
    ],
)
def test_the_graph_gives_the_vectors_of_the_model(
    tmp_path: Path,
    tiny_tokenizer,
    family: str,
    pooling: str,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(tmp_path / "decoder", tiny_tokenizer, family, pooling, attention)
    model.save_pretrained(str(tmp_path / "model"))
    export_folder(str(tmp_path / "model"), tmp_path / "graph", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph" / "model.onnx"))
    for prompt in ("", PROMPT):
        texts = model.backbone.tokenize_texts(TEXTS, prompt)
        expected = model.encode(TEXTS, prompt=prompt)
        (found,) = session.run(None, padded_inputs(texts))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # The vacuity guard: what is pooled matters.
    inputs = padded_inputs(texts)
    (everything,) = session.run(None, {**inputs, "pool_mask": inputs["attention_mask"]})
    assert np.abs(everything - expected).max() > 1e-3
    described = json.loads((tmp_path / "graph" / "nvembed_onnx.json").read_text())
    assert described["inputs"] == [i.name for i in session.get_inputs()]
    check_obvious_use(model, tmp_path / "graph")
    check_usage_of_the_card(model, tmp_path / "graph", monkeypatch)
    check_stock_modules(model, tmp_path / "graph")
    check_encoder(model, tmp_path / "graph")


def check_obvious_use(model: NVEmbed, folder: Path) -> None:
    """The tokenizer as transformers loads it, and every token pooled."""
    rows = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    inputs = {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (found,) = session.run(None, {**inputs, "pool_mask": inputs["attention_mask"]})
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)


def check_usage_of_the_card(model: NVEmbed, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    long = [*TEXTS, "many words " * 200]
    np.testing.assert_allclose(names["embed"](long), model.encode(long), atol=1e-5)
    found = names["embed"](long, "find it")
    np.testing.assert_allclose(found, model.encode(long, prompt=PROMPT), atol=1e-5)


def check_stock_modules(model: NVEmbed, folder: Path) -> None:
    """What SentenceTransformer(backend="onnx") does, which needs an older transformers."""
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["transformer", "1_Pooling", "2_Normalize"]
    inner = folder / "transformer"
    session = onnxruntime.InferenceSession(str(inner / "model.onnx"))
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask"}
    tokenizer = AutoTokenizer.from_pretrained(inner)
    settings = json.loads((inner / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # of transformers 4 too
    for prompt in ("", PROMPT):
        rows = tokenizer([prompt + t for t in TEXTS], padding=True, return_tensors="np")
        inputs = {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        (states,) = session.run(["last_hidden_state"], inputs)
        alone = len(tokenizer(prompt)["input_ids"]) - 1 if prompt else 0
        kept = inputs["attention_mask"].copy()
        kept[:, :alone] = 0
        means = (states * kept[..., None]).sum(1) / kept.sum(1)[:, None]
        found = means / np.linalg.norm(means, axis=1, keepdims=True)
        np.testing.assert_allclose(found, model.encode(TEXTS, prompt=prompt), atol=1e-5)


def check_encoder(model: NVEmbed, folder: Path) -> None:
    encoder = load_encoder(str(folder), "auto")
    assert isinstance(encoder, OnnxEncoder)
    assert encoder.dimension == model.dimension
    texts = [*TEXTS, *(f"text {'long ' * (n % 60)}" for n in range(300))]
    for side in ("encode_query", "encode_document"):
        for task in (None, "find it", "FiQA2018"):
            expected = getattr(model, side)(texts, task=task)
            found = getattr(encoder, side)(texts, task=task)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert encoder.encode_query([]).shape == (0, model.dimension)
    with pytest.raises(ModelError, match=r"an ONNX graph in bfloat16.*Leave --dtype out"):
        load_encoder(str(folder), "bfloat16")
    with pytest.raises(ModelError, match=r"an exported ONNX graph.*nvembed encode"):
        NVEmbed.from_pretrained(folder)
    (folder.parent / "texts.txt").write_text("one text\nanother\n")
    output = folder.parent / "v.npy"
    given = ["--input", str(folder.parent / "texts.txt"), "--output", str(output)]
    assert run(["encode", str(folder), *given]) == 0
    np.testing.assert_allclose(np.load(output), model.encode(["one text", "another"]), atol=1e-5)
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ModelError, match=r"holds a list.*Copy or download"):
        load_encoder(str(folder))


def test_encode_reads_an_official_graph_by_its_own_token_rules(
    tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = write_official(tmp_path / "official", tiny_tokenizer)
    model = NVEmbed.from_pretrained(official, dtype="float32", device="cpu")
    export_folder(str(official), tmp_path / "graph", "onnx")
    assert not (tmp_path / "graph" / "modules.json").exists()  # stock pooling counts otherwise
    encoder = load_encoder(str(tmp_path / "graph"))
    long = [*TEXTS, "words " * 400]
    for task in (None, "find it"):
        expected = model.encode_query(long, task=task)
        np.testing.assert_allclose(encoder.encode_query(long, task=task), expected, atol=1e-5)
    card = (tmp_path / "graph" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "graph")
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    found = names["embed"](TEXTS, "find it")
    np.testing.assert_allclose(found, model.encode(TEXTS, prompt=PROMPT), atol=1e-5)


def test_a_graph_in_8_bits_as_the_page_makes_it(
    tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / "decoder", tiny_tokenizer, "llama", "latent", "bidirectional")
    model.save_pretrained(str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    export_folder(str(tmp_path / "model"), "graph", "onnx")
    whole = load_encoder("graph").encode_query(TEXTS, task="find it")
    (snippet,) = blocks("python", "ONNX in 8 bits")
    exec(compile(snippet, "serving-elsewhere.md", "exec"), {})
    found = load_encoder("graph").encode_query(TEXTS, task="find it")
    cosines_N = (found * whole).sum(axis=1)
    assert (cosines_N.min() > 0.99, np.abs(found - whole).max() > 1e-4) == (True, True), cosines_N


def test_a_graph_that_differs_is_not_kept(
    tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / "decoder", tiny_tokenizer, "mistral", "mean", "bidirectional")
    model.save_pretrained(str(tmp_path / "model"))
    forward = export_onnx.PaddedEmbedder.forward

    def changed(self, input_ids, attention_mask, pool_mask):
        return forward(self, input_ids, attention_mask, attention_mask)  # pools the prompt

    monkeypatch.setattr(export_onnx.PaddedEmbedder, "forward", changed)
    with pytest.raises(ModelError, match="the ONNX graph gives other vectors"):
        export_folder(str(tmp_path / "model"), tmp_path / "graph", "onnx")
    assert not (tmp_path / "graph").exists()


def test_what_has_no_graph_is_one_line(tmp_path: Path, tiny_tokenizer, capsys) -> None:
    model = build(tmp_path / "decoder", tiny_tokenizer, "mistral", "last", "bidirectional")
    with pytest.raises(ModelError, match=r"LastTokenPooling has no graph.*compress --head-free"):
        write_onnx(model, tmp_path, name="mine")
    model.save_pretrained(str(tmp_path / "model"))
    command = ["export", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format", "onnx"]
    assert run(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    half = build(tmp_path / "again", tiny_tokenizer, "mistral", "mean", "bidirectional")
    half.backbone.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="float32; runtimes convert"):
        write_onnx(half, tmp_path, name="mine")
