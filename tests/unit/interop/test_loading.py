"""Weights that do not fit are an error with their names, whatever kind of folder they lie in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertForSequenceClassification

from nvembed.core.errors import ModelError
from nvembed.interop.weights import shared_prefixes
from nvembed.mining.ranking import load_cross_encoder
from nvembed.model.backbone import Backbone, add_lora, save_adapter
from nvembed.model.embedder import NVEmbed
from nvembed.model.encoder import load_encoder
from nvembed.model.settings import LoraSettings

TEXTS = ["one", "two words", "rather a longer text, with commas"]

Weights = dict[str, Tensor]


def change_weights(file: Path, change: Callable[[Weights], Weights]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in change(weights).items()}, file, {"format": "pt"})


def matrix(weights: Weights) -> str:
    """A matrix that is not square, so that its transpose has another shape; no head."""
    return next(
        name
        for name, tensor in sorted(weights.items())
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] and "lm_head" not in name
    )


def dropped(weights: Weights) -> Weights:
    return {k: v for k, v in weights.items() if k != matrix(weights)}


def added(weights: Weights) -> Weights:
    return weights | {"something.else": torch.zeros(3)}


def transposed(weights: Weights) -> Weights:
    name = matrix(weights)
    return weights | {name: weights[name].T}


def renamed(weights: Weights) -> Weights:
    name = matrix(weights)
    return dropped(weights) | {f"{name}_old": weights[name]}


def not_a_number(weights: Weights) -> Weights:
    name = matrix(weights)
    weights[name][1, 1] = float("nan")
    return weights


def infinite(weights: Weights) -> Weights:
    name = matrix(weights)
    weights[name][-1, 0] = float("inf")
    return weights


# What is done to the weights, and what the error says besides the name of the tensor.
MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "dropped": (dropped, "1 tensor is missing: {name};"),
    "added": (added, "1 tensor is unexpected: {added};"),
    "transposed": (transposed, r"1 tensor is of another shape: {name} \(\["),
    "renamed": (renamed, "1 tensor is missing: {name}; 1 tensor is unexpected: {name}_old;"),
    "NaN": (not_a_number, "tensor {name} is not finite: 1 of [0-9]+ values are NaN or infinite"),
    "infinity": (infinite, "tensor {name} is not finite: 1 of [0-9]+ values are NaN or infinite"),
}


def base_decoder(folder: Path, decoder: Path) -> tuple[Path, Path]:
    shutil.copytree(decoder, folder)
    return folder, folder / "model.safetensors"


def saved(folder: Path, decoder: Path) -> NVEmbed:
    model = NVEmbed.from_pretrained(
        decoder, pooling="latent", num_latents=4, num_heads=2, device="cpu"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.pooling.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return model


def saved_folder(folder: Path, decoder: Path) -> tuple[Path, Path]:
    saved(folder, decoder)
    return folder, folder / "model.safetensors"


def pooling_head(folder: Path, decoder: Path) -> tuple[Path, Path]:
    saved(folder, decoder)
    return folder, folder / "1_LatentAttentionPooling" / "model.safetensors"


def adapter(folder: Path, decoder: Path) -> tuple[Path, Path]:
    """A decoder with a peft adapter in its folder, which transformers loads on its own."""
    shutil.copytree(decoder, folder)
    backbone = Backbone.from_pretrained(str(decoder))
    add_lora(backbone, LoraSettings(rank=4))
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(backbone, folder.parent / "adapter")
    for file in (folder.parent / "adapter").iterdir():
        shutil.copy(file, folder)
    return folder, folder / "adapter_model.safetensors"


def stock_model(folder: Path, decoder: Path) -> tuple[Path, Path]:
    transformer = Transformer(str(decoder))
    transformer.tokenizer.pad_token = "</s>"
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder, folder / "model.safetensors"


FOLDERS = {
    "base": base_decoder,
    "saved": saved_folder,
    "head": pooling_head,
    "adapter": adapter,
    "stock": stock_model,
}


@pytest.fixture(scope="module", params=list(FOLDERS))
def intact(request, tmp_path_factory, tiny_decoder_dir: Path) -> tuple[Path, Path]:
    """A model's folder and the weights in it that are to be changed."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return FOLDERS[request.param](folder, tiny_decoder_dir)


def copied(intact: tuple[Path, Path], to: Path) -> tuple[Path, Path]:
    folder, file = intact
    shutil.copytree(folder, to)
    return to, to / file.relative_to(folder)


def vectors(folder: Path) -> np.ndarray:
    return NVEmbed.from_pretrained(folder, device="cpu").encode(TEXTS)


def bare(name: str) -> str:
    """The name of a tensor in the model, without what a library puts around it in a file."""
    for prefix in ("base_model.model.", "model."):
        name = name.removeprefix(prefix)
    return name.replace("lora_A.weight", "lora_A.*weight").replace(
        "lora_B.weight", "lora_B.*weight"
    )


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_named(
    intact: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    folder, file = copied(intact, tmp_path / "model")
    change, message = MISFITS[case]
    name = bare(matrix(load_file(file)))
    change_weights(file, change)
    # Names of tensors of an adapter get the adapter's name inside.
    wanted = message.format(name=f".*{name}.*", added=".*something.else.*")
    with pytest.raises(ModelError, match=wanted) as caught:
        NVEmbed.from_pretrained(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "encoder.net."])
def test_a_prefix_that_all_names_share_is_understood(
    intact: tuple[Path, Path], tmp_path: Path, prefix: str
) -> None:
    folder, file = copied(intact, tmp_path / "model")
    change_weights(file, lambda weights: {f"{prefix}{k}": v for k, v in weights.items()})
    assert np.array_equal(vectors(folder), vectors(intact[0]))


def test_an_understood_prefix_is_not_saved_again(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder, file = saved_folder(tmp_path / "model", tiny_decoder_dir)
    names = set(load_file(file))
    change_weights(file, lambda weights: {f"module.{k}": v for k, v in weights.items()})
    NVEmbed.from_pretrained(folder, device="cpu").save_pretrained(str(tmp_path / "again"))
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names


def test_an_adapter_beside_its_base_is_loaded(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "model", tiny_decoder_dir)
    assert np.abs(vectors(folder) - vectors(tiny_decoder_dir)).max() > 1e-3
    # The report of the base counts too, though transformers returns the adapter's alone.
    change_weights(folder / "model.safetensors", dropped)
    with pytest.raises(ModelError, match="1 tensor is missing"):
        NVEmbed.from_pretrained(folder, device="cpu")


def test_a_prefix_before_some_names_only_is_a_misfit(
    intact: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = copied(intact, tmp_path / "model")
    first = matrix(load_file(file))
    change_weights(
        file, lambda ws: {(k if k == first else f"module.{k}"): v for k, v in ws.items()}
    )
    with pytest.raises(ModelError, match=r"weights do not fit: [0-9]+ tensors are missing"):
        NVEmbed.from_pretrained(folder, device="cpu")


def test_random_numbers_are_not_drawn(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder, file = base_decoder(tmp_path / "model", tiny_decoder_dir)
    change_weights(file, lambda weights: {f"module.{k}": v for k, v in weights.items()})
    torch.manual_seed(5)
    NVEmbed.from_pretrained(folder, device="cpu")
    assert torch.equal(torch.rand(3), torch.manual_seed(5) and torch.rand(3))


@pytest.mark.parametrize("change", [dropped, transposed, not_a_number])
def test_every_way_to_a_model_says_so(
    tiny_decoder_dir: Path, tmp_path: Path, change: Callable, capsys
) -> None:
    """Commands, a stock model behind sentence-transformers, and the model of a training run."""
    from nvembed.cli.main import run

    folder, file = saved_folder(tmp_path / "model", tiny_decoder_dir)
    change_weights(file, change)
    (tmp_path / "x.txt").write_text("one\n")
    out = ["--output", str(tmp_path / "x.npy")]
    commands = (
        ["doctor", str(folder)],
        ["encode", str(folder), "--input", str(tmp_path / "x.txt"), *out],
        ["export", str(folder), "--to", str(tmp_path / "to"), "--format", "nvembed"],
    )
    for command in commands:
        assert run(command) == 2, command
        line = capsys.readouterr().err
        assert "tensor" in line
        assert line.count("\n") == 1
    assert not (tmp_path / "x.npy").exists()
    foreign, file = stock_model(tmp_path / "stock", tiny_decoder_dir)
    change_weights(file, change)
    with pytest.raises(ModelError, match="tensor"):
        load_encoder(str(foreign))


def test_shards(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_decoder_dir)
    folder = shutil.copytree(tiny_decoder_dir, tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert np.array_equal(vectors(folder), vectors(tiny_decoder_dir))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in shards:
        change_weights(shard, lambda weights: {f"module.{k}": v for k, v in weights.items()})
    index["weight_map"] = {f"module.{k}": v for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(vectors(folder), vectors(tiny_decoder_dir))
    change_weights(shards[1], not_a_number)
    with pytest.raises(ModelError, match="is not finite"):
        NVEmbed.from_pretrained(folder, device="cpu")
    shards[0].unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-.*is missing"):
        NVEmbed.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def bert(tiny_tokenizer) -> BertConfig:
    return BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
    )


def test_heads_may_be_left_over_and_a_pooler_missing(
    bert: BertConfig, tiny_tokenizer, tmp_path: Path
) -> None:
    masked = BertForMaskedLM(bert)  # heads of its own, and no pooler
    masked.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = NVEmbed.from_pretrained(tmp_path, device="cpu")
    wanted = masked.bert.encoder.layer[0].output.dense.weight
    found = model.backbone.model.encoder.layer[0].output.dense.weight
    assert torch.equal(found, wanted)
    change_weights(tmp_path / "model.safetensors", added)
    with pytest.raises(ModelError, match=r"1 tensor is unexpected: something\.else"):
        NVEmbed.from_pretrained(tmp_path, device="cpu")


def test_a_tied_head_may_be_missing_or_left_over(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    folder, file = base_decoder(tmp_path / "model", tiny_decoder_dir)
    assert "lm_head.weight" in load_file(file)
    change_weights(file, lambda ws: {k: v for k, v in ws.items() if k != "lm_head.weight"})
    assert np.array_equal(vectors(folder), vectors(tiny_decoder_dir))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert np.array_equal(vectors(folder), vectors(tiny_decoder_dir))


def test_a_cross_encoder_without_its_head_is_refused(
    bert: BertConfig, tiny_tokenizer, tmp_path: Path
) -> None:
    BertForSequenceClassification(bert).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    scorer = load_cross_encoder(str(tmp_path))
    expected = CrossEncoder(str(tmp_path)).predict([("a", "b")])
    assert np.allclose(scorer([("a", "b")]), expected)
    whole = load_file(tmp_path / "model.safetensors")
    for part in ("classifier.weight", "bert.pooler.dense.weight"):
        save_file(
            {k: v for k, v in whole.items() if k != part},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(ModelError, match=f"1 tensor is missing: {part}"):
            load_cross_encoder(str(tmp_path))


def test_prefixes() -> None:
    assert shared_prefixes(["a.b.c.x", "a.b.d.y"]) == ["a.", "a.b."]
    assert shared_prefixes(["a.b.x", "c.b.y"]) == []
    assert shared_prefixes(["m.x", "m.y", "lm_head.weight"]) == ["m."]
    assert shared_prefixes(["only"]) == []
    assert shared_prefixes([]) == []


def test_no_bar_of_weights_is_shown_and_the_switch_stays(
    tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)  # as it is outside of tests
    NVEmbed.from_pretrained(tiny_decoder_dir)
    assert logging.is_progress_bar_enabled()
    assert "Loading" not in "".join(capfd.readouterr())
    AutoModel.from_pretrained(tiny_decoder_dir)
    assert "Loading" in "".join(capfd.readouterr())
