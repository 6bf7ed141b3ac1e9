"""Merged tensors by their closed forms, merged folders, and merged adapters as merged weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.core.errors import ModelError
from nvembed.interop.merging import Mix, merge_folders, nearest_of_rank, slerp, weighted_sum
from nvembed.interop.model_folder import ADAPTER
from nvembed.interop.weights import write_shards
from nvembed.model.backbone import add_lora, merge_lora, save_adapter
from nvembed.model.settings import LoraSettings

TEXTS = ["a cat", "another text on the moon", "x"]


def changed(folder: Path, to: Path, seed: int, size: float = 0.02) -> Path:
    """A copy whose weights have moved at random, in their type."""
    shutil.copytree(folder, to)
    generator = torch.Generator().manual_seed(seed)
    for file in to.rglob("*.safetensors"):
        tensors = {
            name: (value + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def siblings(tmp_path_factory, tiny_decoder_dir: Path) -> list[Path]:
    """Three models of one base with a latent head."""
    folder = tmp_path_factory.mktemp("siblings")
    base = NVEmbed.from_pretrained(
        tiny_decoder_dir, pooling="latent", num_latents=4, num_heads=2, max_tokens=64
    )
    base.prompts["query"] = "find: "
    base.save_pretrained(str(folder / "base"), create_model_card=False)
    return [changed(folder / "base", folder / f"m{seed}", seed) for seed in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.relative_to(folder)}/{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def merged(folders: list[Path], to: Path, mix: Mix) -> Path:
    to.mkdir()
    merge_folders(folders, to, mix)
    return to


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.25, 0.25, 0.5), (2.0, -0.5, -0.5)])
def test_a_merged_folder_is_the_average_of_its_weights(siblings, tmp_path, shares) -> None:
    to = merged(siblings, tmp_path / "to", Mix(shares))
    parts, found = [weights(folder) for folder in siblings], weights(to)
    assert found.keys() == parts[0].keys()
    assert any(name.startswith("1_") for name in found)  # the head is there
    for name, value in found.items():
        a, b, c = (part[name] for part in parts)
        assert torch.equal(value, a * shares[0] + b * shares[1] + c * shares[2])
    model = NVEmbed.from_pretrained(to)
    averaged = NVEmbed.from_pretrained(siblings[0])
    others = [NVEmbed.from_pretrained(folder).state_dict() for folder in siblings]
    state = {n: sum(s * o[n] for s, o in zip(shares, others, strict=True)) for n in others[0]}
    averaged.load_state_dict(state)
    np.testing.assert_allclose(model.encode(TEXTS), averaged.encode(TEXTS), atol=2e-6)
    assert model.prompts["query"] == "find: "


def test_a_merge_of_one_or_of_equals_is_the_identity(siblings, tmp_path) -> None:
    alone = merged(siblings[:1], tmp_path / "one", Mix((1.0,)))
    twice = merged([siblings[0]] * 2, tmp_path / "two", Mix((0.5, 0.5)))
    start = merged(siblings[:2], tmp_path / "start", Mix((1.0, 0.0), "slerp"))
    end = merged(siblings[:2], tmp_path / "end", Mix((0.0, 1.0), "slerp"))
    for folder, expected in ((alone, 0), (twice, 0), (start, 0), (end, 1)):
        found, known = weights(folder), weights(siblings[expected])
        assert all(torch.equal(found[name], known[name]) for name in known)
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        known_files = {p.relative_to(siblings[0]) for p in siblings[0].rglob("*") if p.is_file()}
        assert files == known_files


def test_slerp_by_its_closed_form() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    half = slerp(a, b, 0.5)
    torch.testing.assert_close(half, torch.tensor([3.0, 3.0]) / math.sqrt(2))
    third = slerp(a, b, 1 / 3)
    torch.testing.assert_close(third, 3 * torch.tensor([math.cos(math.pi / 6), 0.5]))
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    # Of equal lengths the length stays, where the line would shorten it.
    x = torch.randn(40, 5)
    y = torch.randn(40, 5)
    y *= x.norm() / y.norm()
    torch.testing.assert_close(slerp(x, y, 0.3).norm(), x.norm())
    assert weighted_sum([x, y], [0.7, 0.3]).norm() < 0.9 * x.norm()
    # Parallel, opposite and zero: the line.
    for other in (2 * x, -x, torch.zeros_like(x)):
        torch.testing.assert_close(slerp(x, other, 0.25), 0.75 * x + 0.25 * other)


def test_weights_of_16_bits_are_mixed_in_32_and_keep_their_type(siblings, tmp_path) -> None:
    halves = []
    for number, folder in enumerate(siblings[:2]):
        halves.append(tmp_path / f"half{number}")
        shutil.copytree(folder, halves[-1])
        for file in halves[-1].rglob("*.safetensors"):
            tensors = {name: value.bfloat16() for name, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
    found = weights(merged(halves, tmp_path / "to", Mix((0.25, 0.75))))
    a, b = map(weights, halves)
    for name, value in found.items():
        assert torch.equal(value, (0.25 * a[name].float() + 0.75 * b[name].float()).bfloat16())


def test_heads_that_began_elsewhere_are_told(siblings, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(siblings[1], other)
    head = other / "1_LatentAttentionPooling" / "model.safetensors"
    generator = torch.Generator().manual_seed(9)
    others = {n: torch.randn(t.shape, generator=generator) for n, t in load_file(head).items()}
    save_file(others, head)
    assert run(["merge", str(siblings[0]), str(other), "--to", str(tmp_path / "to")]) == 0
    assert "began at other random weights" in capsys.readouterr().err
    assert run(["merge", *map(str, siblings[:2]), "--to", str(tmp_path / "same")]) == 0
    assert "random" not in capsys.readouterr().err


# --- Adapters -------------------------------------------------------------------------------------


def adapted(decoder: Path, folder: Path, rank: int, seed: int, *, rslora: bool = False) -> Path:
    """An adapter that does something, and beside it the model with the adapter in its weights."""
    model = NVEmbed.from_pretrained(decoder, max_tokens=64)
    add_lora(model.backbone, LoraSettings(rank=rank, alpha=3 * rank, dropout=0.0))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    save_adapter(model.backbone, folder / "adapter")
    merge_lora(model.backbone)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft's own
def test_merged_adapters_are_the_merged_models(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    one = adapted(tiny_decoder_dir, tmp_path / "one", 4, 0)
    two = adapted(tiny_decoder_dir, tmp_path / "two", 2, 1)
    mix = Mix((0.25, 0.75))
    adapter = merged([one / "adapter", two / "adapter"], tmp_path / "adapter", mix)
    whole = merged([one / "model", two / "model"], tmp_path / "whole", mix)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 6
    model: Any = NVEmbed.from_pretrained(tiny_decoder_dir, max_tokens=64)
    plain = model.encode(TEXTS)
    model.backbone.model = PeftModel.from_pretrained(model.backbone.model, str(adapter))
    merge_lora(model.backbone)
    expected = NVEmbed.from_pretrained(whole).encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=2e-6)
    assert np.abs(plain - expected).max() > 0.01


def test_a_rank_cuts_to_the_nearest_product_and_says_what_it_leaves_out(
    tiny_decoder_dir: Path, tmp_path: Path, capsys
) -> None:
    folders = [
        adapted(tiny_decoder_dir, tmp_path / str(rank), rank, rank) / "adapter" for rank in (4, 2)
    ]
    whole = load_file(merged(folders, tmp_path / "whole", Mix((0.25, 0.75))) / ADAPTER)
    cut = tmp_path / "cut"
    given = [*map(str, folders), "--to", str(cut), "--weights", "0.25,0.75", "--rank", "3"]
    assert run(["merge", *given]) == 0
    settings = json.loads((cut / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 3)
    shares = []
    for name, rows in (found := load_file(cut / ADAPTER)).items():
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        assert (len(rows), found[other].shape[1]) == (3, 3)
        product = whole[other] @ whole[name]
        left, values, right = torch.linalg.svd(product, full_matrices=False)
        expected = left[:, :3] * values[:3] @ right[:3]
        torch.testing.assert_close(found[other] @ rows, expected, atol=1e-5, rtol=1e-4)
        shares.append(float(values[3:].square().sum() / values.square().sum()))
    assert min(shares) > 0.001
    said = f"rank 3 leaves out {sum(shares) / len(shares):.2%} of what the adapters add, by squares"
    assert f"{said} ({max(shares):.2%} at most)" in capsys.readouterr().err


def test_a_rank_that_is_large_enough_changes_nothing(tiny_decoder_dir: Path, tmp_path) -> None:
    one = adapted(tiny_decoder_dir, tmp_path / "one", 2, 0) / "adapter"
    plain = merged([one, one], tmp_path / "plain", Mix((0.5, 0.5)))
    roomy = merged([one, one], tmp_path / "roomy", Mix((0.5, 0.5), rank=4))
    assert (plain / ADAPTER).read_bytes() == (roomy / ADAPTER).read_bytes()


def test_a_rank_beyond_that_of_a_product_is_filled_up() -> None:
    torch.manual_seed(0)
    b_OR, a_RI = torch.randn(3, 10), torch.randn(10, 7)  # rank 3 at most
    near_OK, near_KI, left_out = nearest_of_rank(b_OR, a_RI, 5)
    assert (near_OK.shape, near_KI.shape, left_out) == ((3, 5), (5, 7), 0.0)
    torch.testing.assert_close(near_OK @ near_KI, b_OR @ a_RI)


def test_a_rank_is_for_adapters_of_linear_layers(siblings, tiny_decoder_dir, tmp_path) -> None:
    with pytest.raises(ModelError, match="a rank is given, and there is no adapter"):
        merged(siblings[:2], tmp_path / "to", Mix((0.5, 0.5), rank=3))
    one = adapted(tiny_decoder_dir, tmp_path / "one", 2, 0) / "adapter"
    tensors = load_file(one / ADAPTER)
    tensors["base_model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 8)
    save_file(tensors, one / ADAPTER)
    with pytest.raises(ModelError, match=r"lora_embedding_A cannot be merged"):
        merged([one, one], tmp_path / "other", Mix((0.5, 0.5)))


def test_adapters_that_cannot_be_added_are_refused(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    one = adapted(tiny_decoder_dir, tmp_path / "one", 2, 0) / "adapter"
    settings = json.loads((one / "adapter_config.json").read_text())
    for number, (change, said) in enumerate(
        [
            ({"use_dora": True}, "without DoRA"),
            ({"lora_bias": True}, "and biases"),
            ({"rank_pattern": {"q_proj": 8}}, "one rank for all layers"),
            ({"base_model_name_or_path": "another"}, "an adapter of another, and of"),
        ]
    ):
        other = tmp_path / f"other{number}"
        shutil.copytree(one, other)
        (other / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ModelError, match=said):
            merged([one, other], tmp_path / f"to{number}", Mix((0.5, 0.5)))
    with pytest.raises(ModelError, match="on a line only"):
        merged([one, one], tmp_path / "arc", Mix((0.5, 0.5), "slerp"))


def test_stabilised_ranks_scale_by_their_root(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    one = adapted(tiny_decoder_dir, tmp_path / "one", 4, 0) / "adapter"
    settings = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    found = load_file(merged([one], tmp_path / "to", Mix((1.0,))) / ADAPTER)
    for name, value in load_file(one / ADAPTER).items():
        factor = 12 / math.sqrt(4) if "lora_B" in name else 1
        torch.testing.assert_close(found[name], factor * value)


def test_shards_are_read(siblings, tmp_path: Path) -> None:
    split = tmp_path / "split"
    shutil.copytree(siblings[0], split)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    sizes = {name: value.nbytes for name, value in tensors.items()}
    write_shards(split, tensors, sizes, tensors.__getitem__, max_bytes=20_000)
    assert len(list(split.glob("model-*-of-*.safetensors"))) > 2
    found = weights(merged([split, siblings[1]], tmp_path / "to", Mix((0.5, 0.5))))
    whole = weights(merged(siblings[:2], tmp_path / "whole", Mix((0.5, 0.5))))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_stock_poolings_are_compared(tmp_path: Path) -> None:
    for name, mode in (("a", "mean"), ("b", "cls")):
        folder = tmp_path / name
        (folder / "1_Pooling").mkdir(parents=True)
        save_file({"x": torch.ones(2, 2)}, folder / "model.safetensors")
        kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
        entries = [
            {"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds
        ]
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    with pytest.raises(ModelError, match=r'pooling_mode is "cls" \(1_Pooling/config.*"mean" in'):
        merged([tmp_path / "a", tmp_path / "b"], tmp_path / "to", Mix((0.5, 0.5)))


# --- What does not belong together ----------------------------------------------------------------


def _config(folder: Path, key: str, value: object) -> None:
    for file in (folder / "config.json", folder / "1_LatentAttentionPooling" / "config.json"):
        values = json.loads(file.read_text())
        if key in values:
            file.write_text(json.dumps({**values, key: value}))


def _tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "normalizer": {"type": "NFC"}}))


def _shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:16].clone()
    save_file(tensors, folder / "model.safetensors")


def _from_elsewhere(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    others = {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(others, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: _config(f, "hidden_size", 64), r"hidden_size is 64 \(config\.json\), and 32 in"),
        (lambda f: _config(f, "num_latents", 8), r"num_latents is 8 \(1_LatentAtten.*, and 4 in"),
        (_tokenizer, "the tokenizer is another one than in"),
        (_shape, r"tensor norm\.weight is \[16\], and \[32\] in"),
        (_from_elsewhere, r"a cosine of -?0\.0. with those of .*tuned from one base"),
        (
            lambda f: shutil.rmtree(f / "1_LatentAttentionPooling"),
            "of the backbone; those of .* and 1_",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "of 1_Latent.*; those of the backbone and"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_models_that_do_not_belong_together(siblings, tmp_path, damage, said: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(siblings[1], other)
    damage(other)
    with pytest.raises(ModelError, match=said) as caught:
        merged([siblings[0], other], tmp_path / "to", Mix((0.5, 0.5)))
    assert str(other) in str(caught.value)
    assert "\n" not in str(caught.value)
