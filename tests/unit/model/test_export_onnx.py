"""The ONNX graph against the model, at sizes it was not traced with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from families import make_family
from nvembed.cli.main import run
from nvembed.core.errors import ModelError
from nvembed.model import export_onnx
from nvembed.model.embedder import NVEmbed
from nvembed.model.export import export_folder
from nvembed.model.export_onnx import padded_inputs, write_onnx

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
    tmp_path: Path, tiny_tokenizer, family: str, pooling: str, attention: str
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
    assert (tmp_path / "graph" / "tokenizer.json").exists()


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
    with pytest.raises(ModelError, match="LastTokenPooling has no graph"):
        write_onnx(model, tmp_path, name="mine")
    model.save_pretrained(str(tmp_path / "model"))
    command = ["export", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format", "onnx"]
    assert run(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    half = build(tmp_path / "again", tiny_tokenizer, "mistral", "mean", "bidirectional")
    half.backbone.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match="float32; runtimes convert"):
        write_onnx(half, tmp_path, name="mine")
