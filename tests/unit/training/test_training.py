"""The loop on a tiny decoder: it learns, resumes exactly, and stops before harm is done."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny_run
from interruption import interrupt_after
from nvembed.core.config import dump_config, load_config
from nvembed.core.errors import TrainingError
from nvembed.core.files import alone_in, write_jsonl, write_text
from nvembed.core.runs import RunFolder
from nvembed.encoding.export.folders import export_folder
from nvembed.kernels import machine as precision
from nvembed.model.embedder import NVEmbed
from nvembed.training import checkpoint, trainer
from nvembed.training.checkpoint import latest_checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.run_folder import changed_kernels, with_settled_choices
from nvembed.training.stages import schedule
from nvembed.training.trainer import train
from official_folders import write_official

COLOURS = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
WORDS = [*COLOURS, "hill", "sun", "moon", "star", "rain", "snow", "wind", "fire"]
PAIRS = [
    {"query": f"{word} {i}", "positive": f"{i * 7 % 16} of {word[::-1]}"}
    for i, word in enumerate(WORDS)
]
CLASSES = [{"text": f"{word} {kind}", "label": kind} for word in WORDS for kind in ("a", "b", "c")]


def recipe(folder: Path, decoder: Path, **changes) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "classes.jsonl", CLASSES)
    data = {
        "output": str(folder / "run"),
        "model": {
            "backbone": str(decoder),
            "max_tokens": 64,
            "pooling": {"kind": "latent", "num_latents": 8, "num_heads": 2},
        },
        "datasets": [
            {"name": "pairs", "path": "pairs.jsonl", "kind": "retrieval", "instruction": "find"},
            {
                "name": "classes",
                "path": "classes.jsonl",
                "kind": "classification",
                "instruction": "sort",
                "stages": [2],
            },
        ],
        "stages": [stage("one", in_batch_negatives=True), stage("two", in_batch_negatives=False)],
        "checkpoint_every": 3,
        "precision": "float32",  # the same numbers on every machine
    }
    return TrainConfig.model_validate({**data, **changes})


def stage(name: str, **changes) -> dict:
    common = {
        "steps": 5,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "temperature": 0.1,
    }
    return {"name": name, "num_negatives": 2, **common, **changes}


def one_stage(**changes) -> dict:
    datasets = [
        {
            "name": "pairs",
            "path": "pairs.jsonl",
            "kind": "retrieval",
            "instruction": "find",
            "stages": [1],
        }
    ]
    return {
        "datasets": datasets,
        "stages": [stage("one", **{"in_batch_negatives": True, **changes})],
    }


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{k}": v for k, v in load_file(path).items()}
    return found


def test_a_tiny_model_overfits_sixteen_pairs(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(
        tmp_path,
        tiny_decoder_dir,
        lora=None,
        **one_stage(steps=60, batch_size=16, learning_rate=3e-3, warmup_steps=3),
    )
    model = NVEmbed.from_pretrained(train(config, base_dir=tmp_path), device="cpu")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05
    queries = model.encode_query([pair["query"] for pair in PAIRS], task="find")
    documents = model.encode_document([pair["positive"] for pair in PAIRS])
    assert ((queries @ documents.T).argmax(1) == np.arange(16)).all()
    np.testing.assert_array_equal(
        queries, model.encode_query([pair["query"] for pair in PAIRS])
    )  # the instruction was saved as the query prompt


@pytest.mark.parametrize("stop_at", [2, 3, 5, 7])
def test_resumed_equals_uninterrupted_exactly(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, stop_at: int
) -> None:
    whole = recipe(tmp_path, tiny_decoder_dir, output=str(tmp_path / "whole"))
    train(whole, base_dir=tmp_path)
    parts = recipe(tmp_path, tiny_decoder_dir, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_at)
        with pytest.raises(TrainingError, match=f"interrupted after step {stop_at};"):
            train(parts, base_dir=tmp_path)
    assert not (tmp_path / "parts" / "model").exists()
    train(parts, base_dir=tmp_path)
    one, other = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert [row["step"] for row in other] == list(range(1, 11))
    first, second = (weights(tmp_path / name / "model") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    started = weights(tiny_decoder_dir)
    assert any("layers" in name for name in first)  # the vacuity guard: training moved the weights
    assert not all(
        torch.equal(value, started[f"{tiny_decoder_dir.name}/model.{name.split('/')[1]}"])
        for name, value in first.items()
        if "layers" in name and "pooling" not in name.lower()
    )


def interrupted(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, folder: Path) -> None:
    """Begin a run that ends after its second step."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=folder)


@pytest.mark.parametrize("fresh", [False, True])
def test_two_processes_do_not_train_into_one_folder(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, fresh: bool
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage())
    interrupted(monkeypatch, config, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with alone_in(tmp_path / "run" / "checkpoints") as alone:
        assert alone
        with pytest.raises(TrainingError, match="another process is training into this folder"):
            train(config, base_dir=tmp_path, fresh=fresh)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    train(config, base_dir=tmp_path, fresh=fresh)
    with alone_in(tmp_path / "run" / "checkpoints") as alone:
        assert alone  # a finished run holds nothing


def test_a_checkpoint_of_before_an_option_goes_on(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage())
    interrupted(monkeypatch, config, tmp_path)
    file = latest_checkpoint(tmp_path / "run" / "checkpoints") / "state.json"
    state = json.loads(file.read_text())
    for key in ("contrastive", "teacher", "cosent", "spread"):
        del state["recipe"]["stages"][0][key]
    file.write_text(json.dumps(state))
    train(config, base_dir=tmp_path)
    assert len(rows(tmp_path / "run")) == 5


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=8))
    original = trainer.contrastive_step
    calls = []

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError(float("nan"))
        return original(*arguments, **options)

    seen = []
    original_step = torch.optim.AdamW.step
    monkeypatch.setattr(trainer, "contrastive_step", broken)
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (seen.append(1), original_step(self, *a))[1]
    )
    with pytest.raises(TrainingError, match=r"loss of step 5 \(one\) is nan.*step-0000000003"):
        train(config, base_dir=tmp_path)
    assert len(seen) == 4
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-0000000003"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=8))
    original = checkpoint.write_tensors

    def full(path: Path, *arguments) -> None:
        if "step-0000000006" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        original(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(Exception, match=r"step-0000000006: cannot write: No space left") as caught:
        train(config, base_dir=tmp_path)
    assert "\n" not in str(caught.value)
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-0000000003"]
    monkeypatch.undo()
    train(config, base_dir=tmp_path)
    assert len(rows(tmp_path / "run")) == 8


def test_the_frozen_base_is_not_in_checkpoints(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=1))
    train(config, base_dir=tmp_path)
    saved = load_file(latest_checkpoint(tmp_path / "run" / "checkpoints") / "weights.safetensors")
    assert all("lora" in name or name.startswith("1.") for name in saved)
    assert any("lora" in name for name in saved)
    assert any("latents" in name for name in saved)
    assert not list((tmp_path / "run").rglob("*.pt"))


@pytest.mark.parametrize("head", ["train", "freeze"])
def test_fine_tuning_of_an_official_checkpoint(
    tmp_path: Path, tiny_tokenizer, head: str, monkeypatch
) -> None:
    official = write_official(tmp_path / "official", tiny_tokenizer)
    config = recipe(
        tmp_path,
        official,
        model={"backbone": "official", "max_tokens": 64},
        lora={"rank": 2, "alpha": 4, "save_adapter": True},
        pooling_head=head,
        **one_stage(steps=4),
    )
    gradients = {}
    original = torch.optim.AdamW.step

    def noted(self, *arguments):
        names = {id(p): name for name, p in built[0].named_parameters()}
        for group in self.param_groups:
            gradients.update({names[id(p)]: p.grad is not None for p in group["params"]})
        return original(self, *arguments)

    built = []
    make = trainer.model.starting_model

    def build(*arguments, **options):
        built.append(make(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(trainer.model, "starting_model", build)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    folder = train(config, base_dir=tmp_path)
    assert all(gradients.values())
    stored = load_file(latest_checkpoint(tmp_path / "run" / "checkpoints") / "weights.safetensors")
    assert stored.keys() == gradients.keys()
    in_head = {name for name in stored if name.startswith("1.")}
    assert {name for name in stored if "lora_" in name} == stored.keys() - in_head
    assert len(in_head) == (0 if head == "freeze" else 14)

    before = NVEmbed.from_pretrained(official, device="cpu", max_tokens=64)
    after = NVEmbed.from_pretrained(folder, device="cpu")
    assert after.backbone.text_style == "official"
    assert after.max_seq_length == 64
    start, end = before.state_dict(), after.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any(name.startswith("1.") for name in moved) == (head == "train")
    assert any("q_proj" in name for name in moved)
    assert not any("norm" in name and name.startswith("0.") for name in moved)

    # The adapters alone, put on the checkpoint that training started from, give the same model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(before.backbone.model, tmp_path / "run" / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, end[f"0.model.{name}"], atol=1e-6, rtol=0)


def test_a_tuned_official_checkpoint_goes_back_to_the_official_layout(
    tmp_path: Path, tiny_tokenizer
) -> None:
    write_official(tmp_path / "official", tiny_tokenizer)
    config = recipe(
        tmp_path,
        tmp_path / "official",
        model={"backbone": str(tmp_path / "official"), "max_tokens": 64},
        **one_stage(steps=2),
    )
    folder = train(config, base_dir=tmp_path)
    export_folder(str(folder), tmp_path / "out", "nv-embed")
    texts = [pair["query"] for pair in PAIRS]
    expected = NVEmbed.from_pretrained(folder, device="cpu").encode_query(texts)
    back = NVEmbed.from_pretrained(tmp_path / "out", device="cpu")
    np.testing.assert_allclose(back.encode_query(texts), expected, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "cc-by-nc-4.0",
        "LoRA of rank 16",
        "| one | 2 | 8 |",
        "| pairs | retrieval | find",
    ):
        assert part in card


def test_mining_before_a_stage_gives_negatives(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    stages = [
        stage("one", in_batch_negatives=True, steps=1),
        stage(
            "two", in_batch_negatives=False, steps=1, mine={"strategy": "top_k", "num_negatives": 3}
        ),
    ]
    config = recipe(tmp_path, tiny_decoder_dir, stages=stages)
    train(config, base_dir=tmp_path)
    mined = (tmp_path / "run" / "mined" / "two" / "pairs.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["negative"]) == 3 for line in mined)
    assert rows(tmp_path / "run")[1]["effective_negatives"] == 2.0
    settings = tmp_path / "run" / "model-one" / "config_sentence_transformers.json"
    prompts = json.loads(settings.read_text())["prompts"]
    assert prompts["SciFact"].startswith("Instruct: Given a scientific claim, retrieve")
    assert prompts["query"] == prompts["pairs"] != prompts["SciFact"]
    # Starting over must not use what an earlier model mined.
    for path in (tmp_path / "run" / "mined" / "two").glob("pairs*"):
        write_text(path, "stale", "train")
    train(config, base_dir=tmp_path, fresh=True)
    assert (tmp_path / "run" / "mined" / "two" / "pairs.jsonl").read_text().splitlines() == mined


def test_a_cap_forgets_no_positive_in_mining_and_in_batches(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    """Of two records of each query training sees the first; the second knows another positive."""
    pairs = []
    for number, word in enumerate(WORDS[:8]):
        pairs.append({"query": word, "positive": f"a{number}"})
        pairs.append({"query": word, "positive": f"a{(number + 1) % 8}"})
    changes = one_stage(in_batch_negatives=True, batch_size=8, mine={"strategy": "top_k"})
    changes["datasets"][0]["max_records"] = 8
    config = recipe(tmp_path, tiny_decoder_dir, **changes)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    train(config, base_dir=tmp_path)
    file = tmp_path / "run" / "mined" / "one" / "pairs.jsonl"
    mined = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["query"] for row in mined] == [row["query"] for row in pairs]
    for number, row in enumerate(mined[::2]):
        known = {f"a{number}", f"a{(number + 1) % 8}"}
        assert set(row["negative"]) == {f"a{n}" for n in range(8)} - known
    assert not any("negative" in row for row in mined[1::2])
    # Of eight documents of a step two answer each query.
    assert {row["effective_negatives"] for row in rows(tmp_path / "run")} == {6.0}


def test_the_precision_measured_at_the_start_is_kept(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that measures something else after a restart must not refuse or change the run."""
    config = recipe(tmp_path, tiny_decoder_dir, precision="auto", **one_stage(steps=6))
    measured: list[str] = ["bfloat16"]
    monkeypatch.setattr(precision, "fastest_precision", lambda device: measured[-1])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=tmp_path)
    measured.append("float32")
    train(config, base_dir=tmp_path)
    run = Path(config.output)
    assert "precision: bfloat16" in (run / "config.yaml").read_text()
    assert json.loads((run / "env.json").read_text())["computing"]["dtype"] == "bfloat16"
    lines = [
        line.partition(" ")[2]
        for line in (run / "train.log").read_text().splitlines()
        if "computing in" in line
    ]
    assert re.fullmatch(r"computing in bfloat16 \(.*; fix with precision=float32\)", lines[0])
    assert lines[1:] == [
        "computing in bfloat16 (as it was begun; fix with precision=float32)",
    ]
    half = rows(run)
    train(config.model_copy(update={"precision": "float32"}), base_dir=tmp_path, fresh=True)
    full = rows(run)
    assert len(half) == len(full) == 6
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(half, full, strict=True)]
    assert 0 < max(differences) < 0.1  # really another arithmetic, and a harmless one


def test_the_same_folder_with_other_settings_is_refused(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    train(recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=1)), base_dir=tmp_path)
    other = recipe(tmp_path, tiny_decoder_dir, **one_stage(steps=2))
    with pytest.raises(TrainingError, match="another configuration"):
        train(other, base_dir=tmp_path)
    train(other, base_dir=tmp_path, fresh=True)
    assert len(rows(tmp_path / "run")) == 2


def test_a_run_that_came_to_nothing_may_be_changed_as_its_error_says(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    little = recipe(tmp_path, tiny_decoder_dir, memory_gb=0.0001, **one_stage(steps=1))
    text = r"longest text has \d+ tokens \('.*(of|fox|owl|cat|tree|lake|hill|wind|fire).*'\)"
    with pytest.raises(TrainingError, match=rf"does not fit: its {text}.*raise memory_gb"):
        train(little, base_dir=tmp_path)
    train(
        recipe(tmp_path, tiny_decoder_dir, memory_gb=1.0, **one_stage(steps=1)), base_dir=tmp_path
    )
    assert json.loads((tmp_path / "run" / "graph-memory.json").read_text())["budget_bytes"] == 10**9
    with pytest.raises(TrainingError, match="another configuration: memory_gb"):
        train(little, base_dir=tmp_path)


def test_contradictions_of_a_recipe_are_named(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    with pytest.raises(ValueError, match="nothing to contrast with"):
        recipe(tmp_path, tiny_decoder_dir, **one_stage(in_batch_negatives=False, num_negatives=0))
    with pytest.raises(ValueError, match="no data set is used in stage 3"):
        recipe(
            tmp_path,
            tiny_decoder_dir,
            stages=[stage(name, in_batch_negatives=True) for name in ("a", "b", "c")],
        )


def test_schedule_is_a_ramp_and_a_line_to_zero() -> None:
    shares = [schedule(step, steps=10, warmup_steps=4) for step in range(10)]
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert schedule(0, steps=1, warmup_steps=0) == 1.0


def test_a_run_that_goes_on_with_other_kernels_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setattr("nvembed.training.run_folder.kernels", lambda: ["onednn"])
    for content in ("", "[1]", '{"computing": null}', '{"computing": {"kernels": ["onednn"]}}'):
        run.env.write_text(content)
        assert changed_kernels(run) is None
    run.env.write_text('{"computing": {"kernels": ["onednn", "attention"]}}')
    line = changed_kernels(run)
    assert line is not None
    assert line.startswith("the kernels have changed, from onednn, attention to onednn: ")


def test_the_first_process_settles_the_type_for_all(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = one_stage(steps=1, learning_rate=None)
    config = recipe(tmp_path, tiny_decoder_dir, precision="auto", **open_)
    given: list[Any] = []

    class Other(trainer.DistributedContext):
        """The second of two processes, which is told what the first has."""

        def of_main(self, value: Any) -> Any:
            assert value == ("auto", [None])  # nothing was measured here
            return "bfloat16", [3e-4]

        def barrier(self) -> None:
            pass

    monkeypatch.setattr(
        trainer.DistributedContext,
        "of_environment",
        classmethod(lambda cls, **_: Other(rank=1, count=2)),
    )
    monkeypatch.setattr(precision, "fastest_precision", lambda device: pytest.fail("measured"))
    monkeypatch.setattr(
        trainer,
        "_Run",
        lambda config, *_: given.append(config) or SimpleNamespace(train=lambda threads: None),
    )
    assert train(config, base_dir=tmp_path) is None
    assert [(c.precision, c.stages[0].learning_rate) for c in given] == [("bfloat16", 3e-4)]


def test_a_dry_run_settles_as_the_run_does(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, precision="auto", **one_stage(steps=2))
    for measured in ("bfloat16", "float32"):
        monkeypatch.setattr(precision, "fastest_precision", lambda device, m=measured: m)
        folder = RunFolder(tmp_path / measured)
        rehearsed, _ = with_settled_choices(config, folder, fresh=False)
        settled = config.model_copy(update={"output": str(folder.path)})
        train(settled, base_dir=tmp_path)
        assert load_config(TrainConfig, folder.config).precision == rehearsed.precision == measured


@pytest.mark.parametrize("how", ["loaded", "recipe", "working folder"])
def test_relative_paths_start_from_the_recipe_or_the_working_folder(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run.recipe(tmp_path)
    asked: list[Path] = []

    def stop(config: TrainConfig, base_dir: Path, recipe: Path | None) -> None:
        asked.append(base_dir.resolve())
        raise TrainingError("far enough")

    monkeypatch.setattr(trainer, "training_inputs", stop)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    if how == "working folder":
        monkeypatch.chdir(tmp_path)
    given = load_config(TrainConfig, file) if how == "loaded" else config
    with pytest.raises(TrainingError, match="far enough"):
        train(given, recipe=file if how == "recipe" else None)
    assert asked == [tmp_path.resolve()]
