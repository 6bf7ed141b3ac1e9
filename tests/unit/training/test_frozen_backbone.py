"""``backbone: freeze``: the head learns, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import make_family
from interruption import interrupt_after
from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.files import write_jsonl
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack
from nvembed.training.checkpoint import latest_checkpoint, trained_parameters
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.model import graph_bytes_per_token, starting_model
from nvembed.training.trainer import train

PAIRS = [{"query": f"what is {c}", "positive": f"{c} it is, {c * 3}"} for c in "abcdefghijklmnop"]
LATENT = {"kind": "latent", "num_latents": 4, "num_heads": 2}


def recipe(folder: Path, backbone: Path, **changes: Any) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    stage = {"steps": 4, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 1}
    data = {
        "output": str(folder / "run"),
        "model": {"backbone": str(backbone), "max_tokens": 32, "pooling": LATENT},
        "lora": None,
        "backbone": "freeze",
        "datasets": [
            {
                "name": "pairs",
                "path": "pairs.jsonl",
                "kind": "retrieval",
                "instruction": "find",
                "stages": [1],
            }
        ],
        "stages": [{"name": "one", "in_batch_negatives": True, "temperature": 0.1, **stage}],
        "checkpoint_every": 2,
        "precision": "float32",
        "pack_tokens": 64,
        "memory_gb": 0.5,
    }
    return TrainConfig.model_validate({**data, **changes})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return make_family("bert", tmp_path_factory.mktemp("bert"), tiny_tokenizer)


@pytest.mark.parametrize("kind", ["latent", "self_attention"])
def test_only_the_head_moves(tmp_path: Path, encoder: Path, kind: str) -> None:
    pooling = {**LATENT, "kind": kind}
    model = {"backbone": str(encoder), "max_tokens": 32, "pooling": pooling}
    config = recipe(tmp_path, encoder, model=model)
    start = starting_model(config, tmp_path, device="cpu").state_dict()
    folder = train(config, base_dir=tmp_path)
    end = NVEmbed.from_pretrained(folder, device="cpu").state_dict()
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(name.startswith("1.") for name in moved)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert all(name.startswith("1.") for name in load_file(checkpoint / "weights.safetensors"))


def test_gradients_of_the_head_are_those_of_autograd(tmp_path: Path, encoder: Path) -> None:
    """Compared with a model that is tuned as a whole, in evaluation mode (dropout of BERT)."""
    config = recipe(tmp_path, encoder)
    frozen = starting_model(config, tmp_path, device="cpu").train()
    whole = starting_model(
        config.model_copy(update={"backbone": "train"}), tmp_path, device="cpu"
    ).eval()
    texts = frozen.backbone.tokenize_texts(["a b c", "what is it", "d"])
    target = torch.randn(3, 32)
    gradients = []
    for model in (frozen, whole):
        torch.nn.init.normal_(model.pooling.layer.to_out.weight)  # zero passes no gradient on
        model.pooling.load_state_dict(frozen.pooling.state_dict())
        embedding = embed_pack(model, texts)
        (embedding * target).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    of_frozen, of_whole = gradients
    for name, gradient in of_frozen.items():
        if name.startswith("0."):
            assert gradient is None
            assert of_whole[name] is not None
        else:
            torch.testing.assert_close(gradient, of_whole[name], rtol=1e-4, atol=1e-6)
    assert of_frozen["1.layer.to_query.weight"].abs().max() > 0


def test_no_graph_and_no_dropout_in_the_backbone(tmp_path: Path, encoder: Path) -> None:
    model = starting_model(recipe(tmp_path, encoder), tmp_path, device="cpu")
    assert model.backbone.model.config.hidden_dropout_prob > 0
    model.train()
    assert model.pooling.training
    texts = model.backbone.tokenize_texts(["what is it", "a b"])
    features = [model.backbone(model.backbone.preprocess(["what is it"])) for _ in range(2)]
    first, second = (each["token_embeddings"] for each in features)
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert embed_pack(model, texts).requires_grad
    tuned = recipe(tmp_path, encoder).model_copy(update={"backbone": "train"})
    held = graph_bytes_per_token(starting_model(tuned, tmp_path, device="cpu").train(), 64)
    assert graph_bytes_per_token(model, 64) < held / 2


def test_resume_is_exact(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(recipe(tmp_path, encoder), base_dir=tmp_path)
    config = recipe(tmp_path, encoder, output=str(tmp_path / "again"))
    interrupt_after(monkeypatch, 3)
    with pytest.raises(TrainingError, match="interrupted"):
        train(config, base_dir=tmp_path)
    monkeypatch.undo()
    resumed = train(config, base_dir=tmp_path)
    weights = [
        NVEmbed.from_pretrained(folder, device="cpu").state_dict() for folder in (straight, resumed)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dry_run_counts_the_head_alone(tmp_path: Path, encoder: Path) -> None:
    config = recipe(tmp_path, encoder)
    forecast = dry_run(config, base_dir=tmp_path)
    model = starting_model(config, tmp_path, device="cpu")
    assert forecast.memory.trained == sum(p.numel() for p in model.pooling.parameters())
    # What gets a gradient, in float32.
    held = sum(p.nbytes for p in trained_parameters(model).values())
    assert held == 4 * forecast.memory.trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2}}, "lora is on.*set lora to null"),
        ({"pooling_head": "freeze"}, "both freeze: nothing to train"),
        ({"activation_checkpointing": True}, "activation_checkpointing is on"),
        ({"model": {"backbone": "x", "pooling": {"kind": "mean"}}}, "mean pooling has no weights"),
        ({"model": {"backbone": "x", "pooling": {"kind": "last"}}}, "last pooling has no weights"),
    ],
)
def test_senseless_combinations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, Path("x"), **changes)


def test_a_saved_model_without_a_head(tmp_path: Path, encoder: Path) -> None:
    """Its pooling is known only once it is loaded."""
    NVEmbed.from_pretrained(encoder, pooling="mean", device="cpu").save(str(tmp_path / "saved"))
    config = recipe(tmp_path, encoder, model={"backbone": str(tmp_path / "saved")})
    with pytest.raises(ConfigError, match="nothing to train"):
        starting_model(config, tmp_path, device="cpu")
