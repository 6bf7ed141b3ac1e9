"""``--quantize``: wherever a command loads a model, and in all that its vectors are known by."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nvembed.cli import models, train, vectors
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import write_jsonl
from nvembed.encoding.doctor import examine
from nvembed.index.build import _check_settings
from nvembed.model import quantization
from nvembed.model.embedder import NVEmbed
from nvembed.model.quantization import quantize_backbone

COMMANDS = [
    *(vectors.encode, vectors.index, vectors.search),
    *(models.serve, models.evaluate, models.doctor, train.mine),
]


class Signs:
    """In place of torchao: of a weight its sign is left."""

    Int8WeightOnlyConfig = object

    @staticmethod
    def quantize_(holder: nn.Sequential, config: Any) -> None:
        for layer in holder:
            layer.weight = nn.Parameter(torch.sign(layer.weight.detach()) / 8, requires_grad=False)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_commands_that_load_a_model_have_it(command: Any) -> None:
    options = inspect.signature(command).parameters
    assert "quantize" in options
    assert options["quantize"].default is None


def test_vectors_are_those_of_the_quantised_model(
    tmp_path: Path, wide_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_library", lambda kind: Signs)
    monkeypatch.chdir(tmp_path)
    texts = ["a cat sleeps on the mat", "the moon"]
    write_jsonl(Path("texts.jsonl"), [{"text": text} for text in texts])
    command = ["encode", str(wide_decoder_dir), "--input", "texts.jsonl", "--output", "v.npy"]
    assert run([*command, "--dtype", "float32", "--quantize", "int8"]) == 0
    model = NVEmbed.from_pretrained(wide_decoder_dir)
    whole = model.encode_document(texts)
    quantize_backbone(model, "int8")
    np.testing.assert_allclose(np.load("v.npy"), model.encode_document(texts), atol=1e-6)
    assert np.abs(np.load("v.npy") - whole).max() > 0.01
    assert json.loads(Path("v.npy.run.json").read_text())["computing"]["dtype"] == "float32-int8"


def test_the_doctor_examines_what_will_be_computed(
    wide_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | None] = []

    def load(name: str, dtype: str | None) -> None:
        given.append(dtype)
        raise ModelError("not loaded")

    monkeypatch.setattr(examine, "load_encoder", load)
    assert run(["doctor", str(wide_decoder_dir)]) == 2
    assert run(["doctor", str(wide_decoder_dir), "--quantize", "nf4"]) == 2
    assert given[0] is None
    assert given[1] in ("float32-nf4", "bfloat16-nf4")


def test_two_kinds_of_eight_bits_are_refused(
    tmp_path: Path, wide_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", str(wide_decoder_dir), "--input", str(tmp_path), "--output", "v.npy"]
    assert run([*command, "--dtype", "int8", "--quantize", "nf4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dtype int8 holds weights in 8 bits already" in line
    assert "--quantize" in line


@pytest.mark.parametrize(
    ("given", "kept", "fits"),
    [
        ("auto-nf4", "bfloat16-nf4", True),
        ("auto", "bfloat16-nf4", True),
        ("bfloat16-nf4", "bfloat16-nf4", True),
        ("auto-nf4", "bfloat16", False),
        ("auto-int8", "int8", False),
        ("float32", "bfloat16-nf4", False),
        ("auto-nf4", None, True),
    ],
)
def test_a_database_keeps_how_its_weights_were_held(given: Any, kept: Any, fits: bool) -> None:
    record = SimpleNamespace(dimension=4, task=None, dtype=kept, long=None)
    database: Any = SimpleNamespace(record=record, path=Path("db"))
    options: Any = SimpleNamespace(long=None, passages="auto")
    if fits:
        _check_settings(database, options, None, None, given)
        return
    with pytest.raises(ConfigError, match=f"dtype is '{given}', the database has '{kept}'"):
        _check_settings(database, options, None, None, given)
