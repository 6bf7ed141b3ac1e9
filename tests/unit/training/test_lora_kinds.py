"""``lora.dora`` and ``lora.rslora``: peft's adapters, by the formulas of the papers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_jsonl
from nvembed.encoding.export.folders import export_folder
from nvembed.kernels.trained import fused_lora
from nvembed.model.backbone import add_lora, merge_lora, save_adapter
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.model.settings import LoraSettings
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.trainer import train
from tiny_run import DATASET, PAIRS, STAGE

MEAN = {"kind": "mean"}
TEXTS = ["some text", "another", "a text that is longer than the other ones"]
KINDS: list[dict[str, Any]] = [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["dora", "rslora", "both"])


def adapted(decoder: Path, kind: dict[str, Any], *, dropout: float = 0.0) -> NVEmbed:
    """A model whose adapters do something: fresh ones are zero on one side."""
    torch.manual_seed(1)
    model = NVEmbed.from_pretrained(decoder, device="cpu", pooling="mean")
    add_lora(model.backbone, LoraSettings(rank=4, alpha=8, dropout=dropout, **kind))
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def adapters(model: NVEmbed) -> list[Any]:
    return [m for m in model.backbone.model.modules() if isinstance(m, LoraLinear)]


def vectors(model: NVEmbed) -> np.ndarray:
    return model.encode(TEXTS)


def whole_weight(layer: Any) -> torch.Tensor:
    """W + s B A, and of DoRA its rows at their learnt lengths."""
    a, b = (getattr(layer, f"lora_{side}")["default"].weight for side in "AB")
    weight = layer.get_base_layer().weight + layer.scaling["default"] * b @ a
    if not layer.lora_magnitude_vector:
        return weight
    length = layer.lora_magnitude_vector["default"].weight
    return length[:, None] * weight / weight.norm(dim=1, keepdim=True).detach()


@each_kind
def test_values_and_gradients_by_the_formula(tiny_decoder_dir: Path, kind: dict[str, Any]) -> None:
    layer = adapters(adapted(tiny_decoder_dir, kind))[0]
    assert layer.scaling["default"] == (8 / 2 if "rslora" in kind else 8 / 4)
    learnt = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert len(learnt) == (3 if "dora" in kind else 2)
    x, target = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    found, wanted = layer(x), x @ whole_weight(layer).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    gradients, expected = (
        torch.autograd.grad((out * target).sum(), list(learnt.values())) for out in (found, wanted)
    )
    for gradient, other in zip(gradients, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)


@each_kind
def test_vectors_are_those_after_merging_and_after_loading(
    tmp_path: Path, tiny_decoder_dir: Path, kind: dict[str, Any]
) -> None:
    model = adapted(tiny_decoder_dir, kind)
    # The kernel adds s · B A and knows no lengths.
    assert all(("forward" in vars(m)) == ("dora" not in kind) for m in adapters(model))
    plain = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu", pooling="mean")
    wanted = vectors(model)
    assert np.abs(wanted - vectors(plain)).max() > 1e-2

    save_adapter(model.backbone, tmp_path / "adapter")
    merge_lora(model.backbone)
    np.testing.assert_allclose(vectors(model), wanted, atol=1e-5)
    # By peft on its own, and beside the base in a folder that our loader is given.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(plain.backbone.model, tmp_path / "adapter")
    plain.backbone.model = loaded.merge_and_unload()
    np.testing.assert_allclose(vectors(plain), wanted, atol=1e-5)
    folder = shutil.copytree(tiny_decoder_dir, tmp_path / "both")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, folder)
    both = NVEmbed.from_pretrained(folder, device="cpu", pooling="mean")
    np.testing.assert_allclose(vectors(both), wanted, atol=1e-5)


def test_dropout_and_autocast_reach_the_lengths(tiny_decoder_dir: Path) -> None:
    model = adapted(tiny_decoder_dir, {"dora": True}, dropout=0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        embed_pack(model, model.backbone.tokenize_texts(TEXTS, "")).square().sum().backward()
    lengths = {n: p for n, p in trained_parameters(model).items() if "magnitude" in n}
    assert len(lengths) == len(adapters(model)) == 14
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lengths.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_trains_the_lengths_and_saves_them(
    tmp_path: Path, tiny_decoder_dir: Path, precision: str
) -> None:
    lora = {"rank": 2, "alpha": 4, "dora": True, "rslora": True, "save_adapter": True}
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    stage = {**STAGE, "name": "one", "steps": 3, "in_batch_negatives": True, "learning_rate": 1e-2}
    config = TrainConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"backbone": str(tiny_decoder_dir), "max_tokens": 64, "pooling": MEAN},
            "lora": {**lora, "dropout": 0.1},
            "datasets": [DATASET | {"stages": [1]}],
            "stages": [stage],
            "precision": precision,
        }
    )
    folder = train(config, base_dir=tmp_path)
    export_folder(str(folder), tmp_path / "out", "nvembed")
    assert "DoRA of rank 2" in (tmp_path / "out" / "README.md").read_text()
    tuned = NVEmbed.from_pretrained(tmp_path / "out", device="cpu")
    base = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu").backbone.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    layers = [m for m in found.modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        started = layer.get_base_layer().weight.norm(dim=1)
        length = layer.lora_magnitude_vector["default"].weight
        assert 1e-4 < (length - started).abs().max() < 0.1
    assert found.peft_config["default"].use_rslora
    for name, value in found.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[f"0.model.{name}"], atol=1e-6, rtol=0)


def test_the_names_of_peft_are_understood_as_a_slip(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    for ours in ("dora", "rslora"):
        with pytest.raises(ConfigError, match=f"did you mean {ours}"):
            load_config(LoraSettings, None, [f"use_{ours}=true"])


def test_the_kernel_still_computes_plain_adapters(tiny_decoder_dir: Path) -> None:
    model = adapted(tiny_decoder_dir, {"rslora": True})
    assert {m.forward.func for m in adapters(model)} == {fused_lora}
