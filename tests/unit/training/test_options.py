"""Every option of a recipe in a real run of a few steps, by what would be different without it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interruption import interrupt_after
from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.files import write_jsonl
from nvembed.core.runs import RunFolder
from nvembed.data.batch import ContrastiveBatch
from nvembed.kernels import machine as threads
from nvembed.model.embedder import NVEmbed
from nvembed.training import trainer
from nvembed.training.checkpoint import latest_checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.distributed import DistributedContext
from nvembed.training.run_folder import settle_choices
from nvembed.training.trainer import train

COLOURS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS = [*COLOURS, "hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
PAIRS = [
    {
        "query": f"{word} {i}",
        "positive": [f"{i * 7 % 16} of {word[::-1]}", f"{word} again"],
        "negative": [f"{WORDS[(i + k) % 16]} {k}" for k in (3, 5)],
    }
    for i, word in enumerate(WORDS)
]
SCORED = [
    {**pair, "positive_scores": [1.0, 0.9], "negative_scores": [0.8 - i / 20, 0.1]}
    for i, pair in enumerate(PAIRS)
]
CLASSES = [{"text": f"{word} {kind}", "label": kind} for word in WORDS for kind in ("a", "b", "c")]
SETS = {
    name: {
        "name": name,
        "path": f"{name}.jsonl",
        "kind": "classification" if name == "classes" else "retrieval",
        "instruction": f"find {name}",
        "stages": [1],
    }
    for name in ("pairs", "scored", "classes")
}
STAGE = {
    "name": "one",
    "in_batch_negatives": True,
    "steps": 2,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "temperature": 0.1,
    "num_negatives": 2,
}
LATENT = {"kind": "latent", "num_latents": 4, "num_heads": 2}

Runner = Callable[..., "Run"]


class Run:
    """A finished run."""

    def __init__(self, folder: Path, batches: list[ContrastiveBatch]) -> None:
        self.folder = folder
        self.batches = batches
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]

    def trained(self) -> dict[str, torch.Tensor]:
        latest = latest_checkpoint(self.folder / "checkpoints")
        assert latest is not None
        return load_file(latest / "weights.safetensors")

    def latents(self) -> torch.Tensor:
        return next(value for name, value in self.trained().items() if "latents" in name)


def recipe(
    folder: Path,
    decoder: Path,
    stage: dict[str, Any],
    *,
    sets: tuple[str, ...] = ("pairs",),
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainConfig:
    for name, rows in (("pairs", PAIRS), ("scored", SCORED), ("classes", CLASSES)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    data = {
        "output": str(folder / "run"),
        "model": {"backbone": str(decoder), "max_tokens": 64, "pooling": LATENT, **(model or {})},
        "lora": {"rank": 4, "dropout": 0.1},
        "datasets": [SETS[name] for name in sets],
        "stages": [{**STAGE, **stage}],
        "precision": "float32",
        "pack_tokens": 96,
        "memory_gb": 1.0,
    }
    return TrainConfig.model_validate({**data, **changes})


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_dir: Path) -> Runner:
    """Trains by a recipe, changed for the stage and as a whole."""

    def train_with(stage: dict[str, Any] | None = None, **changes: Any) -> Run:
        folder = tmp_path_factory.mktemp("options")
        config = recipe(folder, tiny_decoder_dir, stage or {}, **changes)
        batches: list[ContrastiveBatch] = []
        original = trainer.contrastive_step

        def noted(model: Any, batch: ContrastiveBatch, *arguments: Any, **options: Any) -> Any:
            batches.append(batch)
            return original(model, batch, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "contrastive_step", noted)
            train(config, base_dir=folder)
        return Run(folder / "run", batches)

    return train_with


@pytest.fixture(scope="module")
def plain(runner: Runner) -> Run:
    return runner()


@pytest.fixture(scope="module")
def plain_scored(runner: Runner) -> Run:
    return runner(sets=("scored",))


def test_harder_negatives_count_more(runner: Runner, plain: Run) -> None:
    # The states of the tiny decoder are alike, so most cosines are positive: every share grows.
    assert runner({"hardness": 3.0}).column("loss")[0] > plain.column("loss")[0] + 0.1


def test_matryoshka_is_the_mean_over_widths(runner: Runner, plain: Run) -> None:
    alone, both = runner({"matryoshka": [8]}), runner({"matryoshka": [8, 32]})
    losses = [run.column("loss")[0] for run in (alone, both, plain)]
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert abs(losses[0] - losses[2]) > 0.01
    assert both.column("margin")[0] == plain.column("margin")[0]  # of the full width


def test_distillation_is_added_by_its_weight(runner: Runner, plain_scored: Run) -> None:
    light, heavy = (
        runner({"distillation": {"weight": w, "teacher_temperature": 0.1}}, sets=("scored",))
        for w in (1.0, 3.0)
    )
    base, one, three = (run.column("loss")[0] for run in (plain_scored, light, heavy))
    assert one > base + 0.1
    assert three - base == pytest.approx(3 * (one - base), rel=1e-5)
    assert not torch.equal(light.latents(), plain_scored.latents())


def test_several_positives(runner: Runner, plain: Run) -> None:
    run = runner({"num_positives": 2})
    assert [len(batch.query_B) for batch in run.batches] == [16, 16]
    assert run.column("texts")[0] > plain.column("texts")[0]


def sets_of(batch: ContrastiveBatch) -> Counter[str]:
    """How many queries of a batch come from which set, by their instruction."""
    prompts = [batch.texts[row][0] for row in batch.query_B]
    return Counter(next(name for name in SETS if f"find {name}" in prompt) for prompt in prompts)


def test_homogeneous_batches_and_tempered_shares(runner: Runner) -> None:
    sets = ("pairs", "classes")
    mixed = runner({"steps": 4}, sets=sets)
    assert all(len(sets_of(batch)) == 2 for batch in mixed.batches)
    one = runner({"steps": 4, "batches": "homogeneous"}, sets=sets)
    assert all(len(sets_of(batch)) == 1 for batch in one.batches)
    even = runner({"steps": 4, "mixture_temperature": 1000.0}, sets=sets)
    shares = [sum(map(sets_of, run.batches), Counter())["pairs"] / 32 for run in (mixed, even)]
    assert shares == pytest.approx([16 / 64, 1 / 2], abs=0.05)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_schedules(runner: Runner, kind: str, expected: list[float]) -> None:
    rates = runner({"schedule": kind, "steps": 4}).column("learning_rate")
    assert [rate / 1e-2 for rate in rates] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "package"), [("schedule_free", "schedulefree"), ("adamw_8bit", "bitsandbytes")]
)
def test_optimizers(runner: Runner, plain: Run, kind: str, package: str) -> None:
    pytest.importorskip(package)
    run = runner(optimizer={"kind": kind})
    assert run.column("loss")[0] == plain.column("loss")[0]
    latents = [r.latents() for r in (run, plain)]
    assert 0 < (latents[0] - latents[1]).abs().max() < 0.1


def test_the_norm_of_gradients_is_limited(runner: Runner, plain: Run) -> None:
    # AdamW forgets a scale that stays: the scale must change from step to step.
    free = runner(optimizer={"max_grad_norm": None})
    assert free.column("grad_norm")[0] == plain.column("grad_norm")[0] > 1
    assert free.column("loss")[1] != plain.column("loss")[1]


@pytest.mark.parametrize("kind", ["mean", "last", "self_attention"])
def test_poolings(runner: Runner, plain: Run, kind: str) -> None:
    run = runner(model={"pooling": {"kind": kind, "num_heads": 2}})
    modules = json.loads((run.folder / "model" / "modules.json").read_text())
    assert kind.split("_")[0] in modules[1]["type"].lower()
    # New latent and self attention begin as the mean.
    assert (run.column("loss")[0] != plain.column("loss")[0]) == (kind == "last")
    assert run.column("loss")[1] != plain.column("loss")[1]
    assert any(name.startswith("1.") for name in run.trained()) == (kind == "self_attention")


def test_causal_attention(runner: Runner, plain: Run) -> None:
    run = runner(model={"attention": "causal"})
    assert run.column("loss")[0] != plain.column("loss")[0]
    # Loading proves the direction that was saved.
    model = NVEmbed.from_pretrained(run.folder / "model", device="cpu")
    assert model.backbone.attention == "causal"


def test_what_is_trained(runner: Runner, plain: Run) -> None:
    assert {name.split(".")[0] for name in plain.trained()} == {"0", "1"}
    full = runner(lora=None).trained()
    assert "0.model.embed_tokens.weight" in full
    assert not any("lora" in name for name in full)
    some = runner(lora={"rank": 4, "targets": ["q_proj", "down_proj"]}, pooling_head="freeze")
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in some.trained()}
    assert targets == {"q_proj", "down_proj"}


def test_a_head_of_its_own_rate(runner: Runner) -> None:
    # The first update of AdamW is as long as the rate, whatever the gradient.
    run = runner({"head_learning_rate": 1e-4, "steps": 1})
    same = runner({"steps": 1})
    start = runner({"head_learning_rate": 1e-12, "steps": 1}).trained()
    moved = [
        max(
            (value - start[name]).abs().max().item()
            for name, value in other.trained().items()
            if name.startswith("1.")
        )
        for other in (run, same)
    ]
    assert moved == pytest.approx([1e-4, 1e-2], rel=0.05)


def test_bfloat16(runner: Runner, plain: Run) -> None:
    run = runner(precision="bfloat16")
    assert 0 < abs(run.column("loss")[0] - plain.column("loss")[0]) < 0.05


def test_little_memory_and_layers_computed_again(runner: Runner, plain: Run) -> None:
    """Neither changes a number: dropout is the same when a text or a layer is computed again."""
    little = runner(memory_gb=0.0016)
    again = runner(activation_checkpointing=True)
    assert plain.column("recomputed") == again.column("recomputed") == [0.0, 0.0]
    assert little.column("recomputed")[0] > 0.3
    for run in (little, again):
        assert run.column("loss") == plain.column("loss")
        for name, value in plain.trained().items():
            assert torch.equal(run.trained()[name], value), name
    held = [
        json.loads((run.folder / "graph-memory.json").read_text())["bytes_per_token"]
        for run in (again, plain)
    ]
    # Of two layers their inputs are left, and the pooling head as it was.
    assert held[0] < held[1] / 2


def test_a_learned_temperature_moves_and_goes_on_where_it_was(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    stage = {"learn_temperature": True, "steps": 5}
    whole = recipe(tmp_path, tiny_decoder_dir, stage, output=str(tmp_path / "whole"))
    parts = recipe(tmp_path, tiny_decoder_dir, stage, output=str(tmp_path / "parts"))
    train(whole, base_dir=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(TrainingError, match="interrupted after step 3"):
            train(parts, base_dir=tmp_path)
    train(parts, base_dir=tmp_path)
    one, other = (Run(tmp_path / name, []) for name in ("whole", "parts"))
    assert one.column("temperature") == other.column("temperature")
    assert one.column("loss") == other.column("loss")
    assert len({0.1, *one.column("temperature")}) == 6


def test_a_learned_temperature_has_a_floor(runner: Runner) -> None:
    stage = {"learn_temperature": True, "temperature": 0.0052, "steps": 4, "batch_size": 2}
    temperatures = runner({**stage, "learning_rate": 0.1}).column("temperature")
    assert all(temperature > 0.005 - 1e-9 for temperature in temperatures)


EVERYTHING = {
    "hardness": 1.0,
    "matryoshka": [8, 32],
    "distillation": {"teacher_temperature": 0.5},
    "learn_temperature": True,
    "num_positives": 2,
    "batches": "homogeneous",
    "schedule": "cosine",
    "steps": 3,
}


@pytest.mark.parametrize("in_batch", [True, False])
def test_all_at_once_and_in_parts(runner: Runner, in_batch: bool) -> None:
    stage = {**EVERYTHING, "in_batch_negatives": in_batch}
    sets = ("scored", "classes")
    lora = {"rank": 4, "dropout": 0.0}  # dropout is drawn for the groups of a stage without
    whole = runner(stage, sets=sets, lora=lora)
    parts = runner(stage, sets=sets, lora=lora, memory_gb=0.0014, activation_checkpointing=True)
    for column in ("loss", "grad_norm", "temperature"):
        assert parts.column(column) == pytest.approx(whole.column(column), rel=1e-4), column
    assert parts.column("loss")[0] != parts.column("loss")[1]


def test_widths_beyond_the_model_are_refused(runner: Runner) -> None:
    with pytest.raises(ConfigError, match=r"^stages\.0\.matryoshka: width 33 is larger.*1 to 32$"):
        runner({"matryoshka": [8, 33]})


def test_distillation_without_scores_is_refused(runner: Runner) -> None:
    asked = {"distillation": {}}
    with pytest.raises(
        ConfigError, match=r"^stages\.0\.distillation: no record of pairs, classes has a teacher"
    ):
        runner(asked, sets=("pairs", "classes"))
    mine = {"strategy": "top_k", "num_negatives": 2}
    with pytest.raises(ConfigError, match="no record of scored has a teacher's scores"):
        runner({**asked, "mine": mine}, sets=("scored",))
    run = runner({**asked, "mine": {**mine, "write_scores": True}, "steps": 1})
    assert run.batches[0].teacher is not None


def test_threads(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on two CPUs that others want as well: told once, and followed where that is asked."""
    number, used, clock = [2], list[int](), itertools.count()
    original = trainer.contrastive_step

    def noted(*arguments: Any, **options: Any) -> Any:
        used.append(number[-1])
        return original(*arguments, **options)

    def crowded() -> threads.Reading:
        at = 6.0 * next(clock)
        return threads.Reading(at, {"one": (at / 2, at)}, 0.0)

    # Threads that wait for each other would take minutes on a machine that really is busy.
    counted = {"get_num_threads": lambda: number[-1], "set_num_threads": number.append}
    torchs = SimpleNamespace(**{**vars(torch), **counted})
    monkeypatch.setattr(threads, "torch", torchs)
    monkeypatch.setattr(threads, "read_now", crowded)
    monkeypatch.setattr(threads, "allowed_cpus", lambda: 2.0)
    monkeypatch.setattr(trainer, "contrastive_step", noted)
    logs = [
        (runner({"steps": 5}, threads=choice).folder / "train.log").read_text("utf-8")
        for choice in (None, "auto", 1)
    ]
    assert used == [2] * 5 + [2, 1, 1, 1, 1] + [1] * 5
    assert number[-1] == 2
    for log, line in zip(logs, ("the CPUs are busy: ", "threads 2 → 1: ", "the CPUs"), strict=True):
        assert log.count(line) == 1
        assert log.count(" are free for ") == 1
    assert "; end other jobs, or set threads=auto\n" in logs[0]


def test_several_processes_keep_their_threads(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path, {}, threads="auto")
    with pytest.raises(ConfigError, match="threads: auto is for one process"):
        settle_choices(config, RunFolder(tmp_path), DistributedContext(count=2), fresh=False)
