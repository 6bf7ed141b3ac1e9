"""Learning from a teacher's states of tokens: against one graph over texts that are read alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from families import make_family
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_jsonl
from nvembed.data.batch import build_batch
from nvembed.data.examples import Example
from nvembed.model.embedder import NVEmbed
from nvembed.model.packs import embed_pack, pack_features
from nvembed.training.config import StageConfig
from nvembed.training.contrastive_loss import Objective, info_nce, scores
from nvembed.training.distributed import DistributedContext
from nvembed.training.loss_config import TeacherConfig
from nvembed.training.stages import tokenized
from nvembed.training.step import StepResult, StepSettings, contrastive_step
from nvembed.training.teacher_states import TeacherStates, distance_of_states, teacher_states
from tiny_run import STAGE

EVERYTHING = 10**9
WORDS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake", "hill", "sun"]
TEXTS = [f"the {a} {b} is near a {c}" for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[:3]]


@pytest.fixture
def models(tiny_decoder_dir: Path) -> tuple[NVEmbed, NVEmbed]:
    """A teacher, and a model that is another one."""
    torch.manual_seed(0)
    teacher = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu", max_tokens=64)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return teacher, model.train()


def examples() -> list[Example]:
    return [
        Example(
            query=f"where is {'the ' * (n % 3)}{TEXTS[n]}",
            positive=TEXTS[n],
            negatives=(TEXTS[(7 * n + 3) % len(TEXTS)],),
            known_positives=(TEXTS[n],),
            labels=(),
            instruction="find",
            symmetric=False,
            dataset="d",
        )
        for n in range(9)
    ]


def step(
    model: NVEmbed, teacher: NVEmbed, objective: Objective, budget: int
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model.zero_grad()
    batch = build_batch(examples(), in_batch_negatives=True)
    texts = tokenized(model.backbone.text_tokenizer, batch.texts)
    states = TeacherStates(teacher.backbone, 0.7)
    settings = StepSettings(objective, True, 120, budget, states=states)
    found = contrastive_step(
        model, batch, texts, settings, DistributedContext.of_environment(), seed=1
    )
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget", [EVERYTHING, 300, 120])
@pytest.mark.parametrize("contrastive", [True, False])
def test_loss_and_gradients_are_those_of_one_graph(
    models: tuple[NVEmbed, NVEmbed], budget: int, contrastive: bool
) -> None:
    teacher, model = models
    batch = build_batch(examples(), in_batch_negatives=True)
    texts = [model.backbone.tokenize_texts([text], prompt)[0] for prompt, text in batch.texts]
    missing = []
    for text in texts:
        own_TD = pack_features(model, [text])["token_embeddings"]
        with torch.no_grad():
            wanted_TD = pack_features(teacher, [text])["token_embeddings"]
        for own_D, wanted_D in zip(own_TD, wanted_TD, strict=True):
            missing.append(((own_D - wanted_D) ** 2).sum() / (wanted_D**2).sum())
    of_states = 0.7 * torch.stack(missing).mean()
    loss = of_states
    if contrastive:
        embedding_UD = torch.cat([embed_pack(model, [text]) for text in texts])
        loss = loss + info_nce(
            scores(embedding_UD[batch.query_B], embedding_UD[batch.document_N]),
            torch.from_numpy(batch.positive_B),
            torch.from_numpy(batch.negative_BN),
            temperature=0.1,
        )
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    objective = Objective(0.1, contrastive=1.0 if contrastive else None)
    result, gradients = step(model, teacher, objective, budget)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.parts["states"] == pytest.approx(of_states.item(), rel=1e-5)
    assert of_states.item() > 1e-2
    assert (result.recomputed > 0) is (budget < EVERYTHING)
    for name, value in expected.items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=3e-5 * scale)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_itself_has_nothing_to_learn(models: tuple[NVEmbed, NVEmbed]) -> None:
    teacher, _ = models
    result, gradients = step(
        copy.deepcopy(teacher).train(), teacher, Objective(0.1, contrastive=None), EVERYTHING
    )
    assert result.loss < 1e-9
    assert max(float(value.abs().max()) for value in gradients.values()) < 1e-4


def test_states_that_are_not_finite_are_not_sent_back(models: tuple[NVEmbed, NVEmbed]) -> None:
    teacher, model = models
    with torch.no_grad():
        next(teacher.backbone.parameters()).fill_(float("nan"))
    model.zero_grad()
    with pytest.raises(FloatingPointError):
        step(model, teacher, Objective(0.1, contrastive=None), 120)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_distance_counts_by_the_wanted_states() -> None:
    own_TD, wanted_TD = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [5.0, 0]])
    found_T = distance_of_states(own_TD, wanted_TD)
    np.testing.assert_allclose(found_T.numpy(), [8 / 25, 1.0])


def test_a_run_learns_the_states_of_its_teacher(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = NVEmbed.from_pretrained(tiny_decoder_dir, pooling="mean", device="cpu", max_tokens=64)
    teacher.save_pretrained("teacher")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    teacher.save_pretrained("other")
    write_jsonl(Path("texts.jsonl"), [{"text": text} for text in TEXTS])
    recipe: dict[str, Any] = {
        "output": "run",
        "model": {"backbone": "other"},
        "lora": None,
        "precision": "float32",
        "memory_gb": 1.0,
        "datasets": [
            {"name": "texts", "path": "texts.jsonl", "kind": "text", "instruction": None}
            | {"stages": [1]},
            {"name": "queries", "path": "texts.jsonl", "kind": "text", "instruction": "find it"}
            | {"stages": [1]},
        ],
        "stages": [
            {"name": "recover", "steps": 12, "batch_size": 16, "warmup_steps": 2}
            | {"learning_rate": 1e-3, "in_batch_negatives": False, "num_negatives": 0}
            | {"contrastive": None, "teacher": {"model": "teacher", "similarities": None}},
        ],
    }
    recipe["stages"][0]["teacher"]["states"] = 1.0
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert run(["train", "recipe.yaml"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    parts = [row["parts"]["states"] for row in rows if "parts" in row]
    assert all(set(row["parts"]) == {"states"} for row in rows if "parts" in row)
    assert parts[-1] < 0.5 * parts[0]
    assert run(["train", "recipe.yaml", "output=again", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "auto"}, "name the type"),
        ({"query_prefix": "query: "}, "no prefixes"),
        ({"instructions": False}, "instructions=true"),
        ({"model": "http://localhost:1", "endpoint_model": "m"}, "no endpoint"),
        ({"states": None}, "all off"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TeacherConfig(**{"model": "t", "similarities": None, "states": 1.0} | changes)


def test_teachers_that_do_not_fit(
    tmp_path: Path, models: tuple[NVEmbed, NVEmbed], byte_level_tokenizer: Any
) -> None:
    _, model = models
    config = LlamaConfig(
        vocab_size=len(model.backbone.tokenizer),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaModel(config).save_pretrained(tmp_path / "wide")
    model.backbone.tokenizer.save_pretrained(tmp_path / "wide")
    make_family("llama", tmp_path / "tokens", byte_level_tokenizer)
    stage = StageConfig.model_validate({"name": "smaller", "in_batch_negatives": True, **STAGE})

    def taught_by(name: str) -> None:
        teacher = TeacherConfig(model=name, similarities=None, states=1.0)
        teacher_states(stage.model_copy(update={"teacher": teacher}), tmp_path, model)

    where = r"stages\.smaller\.teacher\.states"
    wrong = rf"{where}: the states of .* are 64 wide, and the model's 32.*set teacher.vectors"
    with pytest.raises(ConfigError, match=wrong):
        taught_by("wide")
    with pytest.raises(ConfigError, match=f"{where}: .* has another tokenizer than the model"):
        taught_by("tokens")
    assert teacher_states(stage, tmp_path, model) is None
