"""A model saved as adapters and head gives the vectors of the model that it was saved from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from nvembed.core.errors import ConfigError, ModelError
from nvembed.core.files import write_jsonl
from nvembed.interop.merging import Mix, merge_folders
from nvembed.interop.model_folder import (
    ADAPTER,
    BACKBONE_CONFIG,
    contents_fingerprint,
    model_fingerprint,
)
from nvembed.model.backbone import add_lora
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import LoraSettings
from nvembed.training.config import TrainConfig
from nvembed.training.model import build_model
from nvembed.training.trainer import train
from tiny_run import DATASET, PAIRS, STAGE

TEXTS = ["some text", "another", "a text that is longer than the other ones"]
KINDS = [{}, {"dora": True}, {"rslora": True}]


def adapted(base: str | Path, *, seed: int = 1, **lora: bool) -> NVEmbed:
    """A model whose adapters and head do something: fresh ones are zero on one side."""
    torch.manual_seed(seed)
    model = NVEmbed.from_pretrained(base, device="cpu", pooling="latent", num_latents=4)
    add_lora(model.backbone, LoraSettings(rank=4, alpha=8, **lora))
    return disturbed(model)


def disturbed(model: NVEmbed) -> NVEmbed:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "to_out" in name or "feed_forward.down" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(model: NVEmbed, folder: Path) -> Path:
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def vectors(model: NVEmbed | SentenceTransformer | Path) -> np.ndarray:
    if isinstance(model, Path):
        model = NVEmbed.from_pretrained(model, device="cpu")
    return model.encode(TEXTS)


def rewritten(folder: Path, **settings: object) -> None:
    path = folder / BACKBONE_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "rslora"])
def test_adapters_and_head_are_the_model(tiny_decoder_dir: Path, tmp_path: Path, kind) -> None:
    model = adapted(tiny_decoder_dir, **kind)
    folder = saved(model, tmp_path / "adapter")
    wanted = vectors(model)
    plain = NVEmbed.from_pretrained(tiny_decoder_dir, device="cpu")
    assert np.abs(wanted - vectors(plain)).max() > 0.01  # or a loader that does nothing would pass
    np.testing.assert_allclose(vectors(folder), wanted, atol=1e-5)
    # Nothing of the base is in it.
    assert not (folder / "model.safetensors").exists()
    assert all("lora" in name for name in load_file(folder / ADAPTER))
    stock = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(vectors(stock), wanted, atol=1e-5)
    # What is loaded is a whole model, and is saved as one.
    again = saved(NVEmbed.from_pretrained(folder, device="cpu"), tmp_path / "whole")
    assert "bases" not in json.loads((again / BACKBONE_CONFIG).read_text())
    np.testing.assert_allclose(vectors(again), wanted, atol=1e-5)


def test_the_sum_is_rounded_once(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder = saved(adapted(tiny_decoder_dir), tmp_path / "adapter")
    whole = NVEmbed.from_pretrained(folder, device="cpu")
    for dtype in (None, "auto"):
        assert NVEmbed.from_pretrained(folder, device="cpu", dtype=dtype).dtype == torch.float32
    half = NVEmbed.from_pretrained(folder, device="cpu", dtype="bfloat16")
    for name, value in half.backbone.model.state_dict().items():
        assert torch.equal(value, whole.backbone.model.state_dict()[name].bfloat16()), name


def test_the_first_base_at_hand_is_taken(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder = saved(adapted(tiny_decoder_dir), tmp_path / "adapter")
    wanted = vectors(folder)
    here = str(tiny_decoder_dir.resolve())
    assert json.loads((folder / BACKBONE_CONFIG).read_text())["bases"] == [here]
    rewritten(folder, bases=["package:no-such-package", "/no/such/folder", here])
    np.testing.assert_array_equal(vectors(folder), wanted)
    rewritten(folder, bases=["package:no-such-package", "/no/such/folder"])
    with pytest.raises(ModelError) as caught:
        NVEmbed.from_pretrained(folder, device="cpu")
    line = str(caught.value)
    assert "package:no-such-package: no package 'no-such-package' is installed" in line
    assert "/no/such/folder: no such model folder" in line
    assert "pip install --no-deps no-such-package" in line
    for damage in ("text", [1], [""]):
        rewritten(folder, bases=damage)
        with pytest.raises(ModelError, match="bases"):
            NVEmbed.from_pretrained(folder, device="cpu")


def test_adapters_on_adapters(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    first = saved(adapted(tiny_decoder_dir), tmp_path / "first")
    model = NVEmbed.from_pretrained(first, device="cpu")
    add_lora(model.backbone, LoraSettings(rank=2))
    second = saved(disturbed(model), tmp_path / "second")
    assert np.abs(vectors(model) - vectors(first)).max() > 0.01
    np.testing.assert_allclose(vectors(second), vectors(model), atol=1e-5)


def test_what_does_not_fit_is_refused(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder = saved(adapted(tiny_decoder_dir), tmp_path / "adapter")
    weights = load_file(folder / ADAPTER)
    name = sorted(weights)[0]
    for change, said in (
        ({name: None}, "1 tensor is missing"),
        ({"more.lora_A.weight": weights[name].clone()}, "1 tensor is unexpected"),
        ({name: weights[name][:-1].contiguous()}, "instead of"),
        ({name: weights[name] * float("nan")}, "not finite"),
    ):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(changed, folder / ADAPTER, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            NVEmbed.from_pretrained(folder, device="cpu")
    (folder / ADAPTER).unlink()
    with pytest.raises(ModelError, match=f"{ADAPTER} is missing"):
        NVEmbed.from_pretrained(folder, device="cpu")


def test_the_base_counts_in_what_the_model_is(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_decoder_dir, tmp_path / "base")
    folder = saved(adapted(base), tmp_path / "adapter")

    def named() -> tuple[str, str]:
        return model_fingerprint(str(folder)), contents_fingerprint(str(folder))

    before = named()
    assert named() == before
    file = base / "model.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file, {"format": "pt"})
    assert all(now != then for now, then in zip(named(), before, strict=True))
    shutil.rmtree(base)
    assert len({*named(), *before}) == 4  # known without its base, too


def test_a_run_leaves_adapters_that_are_its_model(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config = TrainConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {
                "backbone": str(tiny_decoder_dir),
                "max_tokens": 64,
                "pooling": {"kind": "latent", "num_latents": 4},
            },
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "save_adapter": True},
            "datasets": [DATASET | {"stages": [1]}],
            "stages": [{**STAGE, "name": "one", "steps": 3, "in_batch_negatives": True}],
            "precision": "float32",
        }
    )
    whole = NVEmbed.from_pretrained(train(config, base_dir=tmp_path), device="cpu")
    alone = NVEmbed.from_pretrained(tmp_path / "run" / "adapter", device="cpu")
    np.testing.assert_allclose(vectors(alone), vectors(whole), atol=1e-5)
    assert alone.prompts == whole.prompts
    assert alone.max_seq_length == whole.max_seq_length == 64


def further(start: Path, tmp_path: Path, **lora: object) -> dict[str, object]:
    """A recipe that goes on from an adapter's folder."""
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "save_adapter": True, "from_backbone": True}
    return {
        "output": str(tmp_path / "run"),
        "model": {"backbone": str(start), "max_tokens": 64},
        "lora": settings | lora,
        "datasets": [DATASET | {"stages": [1]}],
        "stages": [{**STAGE, "name": "one", "steps": 3, "in_batch_negatives": True}],
        "precision": "float32",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_training_goes_on_with_the_adapters_of_its_backbone(
    kind: dict[str, bool], attention: str, tiny_decoder_dir: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_decoder_dir, **kind)
    model.backbone.attention = attention
    start = saved(model, tmp_path / "start")
    config = TrainConfig.model_validate(further(start, tmp_path, **kind))
    opened = build_model(config, tmp_path)
    np.testing.assert_allclose(vectors(opened.eval()), vectors(start), atol=1e-5)
    trained = {name for name, each in opened.named_parameters() if each.requires_grad}
    assert not [name for name in trained if name.startswith("0.") and "lora_" not in name]
    assert {tensor.shape for tensor in load_file(start / ADAPTER).values()} == {
        each.shape for name, each in opened.named_parameters() if "lora_" in name
    }

    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    whole = NVEmbed.from_pretrained(train(config, base_dir=tmp_path), device="cpu")
    alone = tmp_path / "run" / "adapter"
    np.testing.assert_allclose(vectors(alone), vectors(whole), atol=1e-5)
    assert np.abs(vectors(alone) - vectors(start)).max() > 1e-3
    before, after = load_file(start / ADAPTER), load_file(alone / ADAPTER)
    assert before.keys() == after.keys()
    bases = [json.loads((each / BACKBONE_CONFIG).read_text())["bases"] for each in (start, alone)]
    assert bases[0] == bases[1] == [str(tiny_decoder_dir.resolve())]


def test_adapters_of_another_kind_are_not_gone_on_with(
    tiny_decoder_dir: Path, tmp_path: Path
) -> None:
    start = saved(adapted(tiny_decoder_dir), tmp_path / "start")
    for lora, said in (
        ({"rank": 2}, r"lora: other adapters than those of .*start; expected rank: 4$"),
        ({"alpha": 4, "dora": True}, "expected alpha: 8, dora: False$"),
    ):
        config = TrainConfig.model_validate(further(start, tmp_path, **lora))
        with pytest.raises(ConfigError, match=said):
            build_model(config, tmp_path)
    whole = TrainConfig.model_validate(further(tiny_decoder_dir, tmp_path))
    with pytest.raises(ConfigError, match="is not saved as adapters"):
        build_model(whole, tmp_path)
    with pytest.raises(ValueError, match="saved adapters have their own targets"):
        TrainConfig.model_validate(further(start, tmp_path, targets=["q_proj"]))
    quantised = further(start, tmp_path)
    quantised["model"] = {"backbone": str(start), "quantization": "int8"}
    with pytest.raises(ValueError, match="is not quantised"):
        TrainConfig.model_validate(quantised)


def test_merged_folders_of_adapters_load(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    one = saved(adapted(tiny_decoder_dir, seed=1), tmp_path / "one")
    two = saved(adapted(tiny_decoder_dir, seed=2), tmp_path / "two")
    (tmp_path / "mixed").mkdir()
    merge_folders([one, two], tmp_path / "mixed", Mix((0.25, 0.75)))
    mixed, first, second = (
        NVEmbed.from_pretrained(folder, device="cpu").state_dict()
        for folder in (tmp_path / "mixed", one, two)
    )
    for name, value in mixed.items():
        wanted = 0.25 * first[name] + 0.75 * second[name]
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=0)
