"""A dry run: its numbers are those of the run that follows, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from interruption import interrupt_after
from nvembed.cli.main import run
from nvembed.core.errors import ConfigError, TrainingError, UserError
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.core.runs import derive_seed
from nvembed.data.batch import Mixture
from nvembed.training import dry_run as dry_run_forecast
from nvembed.training import forecast as report
from nvembed.training import trial
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import SeveralError, dry_run
from nvembed.training.model import graph_bytes_per_token, starting_model
from nvembed.training.stage_mining import plan_mining
from nvembed.training.stages import load_mixtures
from nvembed.training.trainer import train

NAMES = [f"{'very ' * (i % 5)}{word}" for i, word in enumerate("abcdefghijklmnopqrstuvwx")]
PAIRS = [
    {"query": f"what is {name}", "positive": f"{name} it is", "negative": [NAMES[i - 3]]}
    for i, name in enumerate(NAMES)
]
CLASSES = [{"text": f"{name} {kind}", "label": kind} for name in NAMES for kind in ("one", "two")]
ROOMY = {"memory_gb": 1.0}


def recipe(folder: Path, decoder: Path, **changes) -> TrainConfig:
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "classes.jsonl", CLASSES)
    common = {"batch_size": 8, "learning_rate": 1e-3, "num_negatives": 2, "steps": 4}
    data = {
        "output": str(folder / "run"),
        "model": {"backbone": str(decoder), "max_tokens": 32, "pooling": {"kind": "mean"}},
        "lora": {"rank": 2, "alpha": 4},
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
        "stages": [
            {"name": "one", "in_batch_negatives": True, **common},
            {"name": "two", "in_batch_negatives": False, **common},
        ],
        "precision": "float32",
        "pack_tokens": 128,
        "checkpoint_every": 3,
        **ROOMY,
    }
    return TrainConfig.model_validate({**data, **changes})


def tight(config: TrainConfig, folder: Path, tokens: int) -> TrainConfig:
    """With memory for the graphs of so many tokens."""
    model = starting_model(config, folder, device="cpu").train()
    bytes_per_token = graph_bytes_per_token(model, config.pack_tokens)
    return config.model_copy(update={"memory_gb": (tokens + 0.5) * bytes_per_token / 1e9})


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_numbers_are_those_of_the_run(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = tight(recipe(tmp_path, tiny_decoder_dir), tmp_path, 300)
    forecast = dry_run(config, base_dir=tmp_path)
    assert not (tmp_path / "run").exists()

    train(config, base_dir=tmp_path)
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert [stage.config.name for stage in forecast.stages] == ["one", "two"]
    for stage in forecast.stages:
        own = [row for row in rows if row["stage"] == stage.config.name]
        found = stage.batches
        assert (stage.steps, found.sampled, len(own)) == (4, 4, 4)

        def mean(key, own=own):
            return pytest.approx(np.mean([row[key] for row in own]))

        assert found.texts == mean("texts")
        assert found.tokens == mean("tokens")
        assert found.duplicates == mean("duplicates")
        assert found.negatives == mean("effective_negatives")
        assert found.recomputed == mean("recomputed")
        assert found.most_tokens == max(row["tokens"] for row in own)
        assert found.most_texts == max(row["texts"] for row in own)
        assert stage.tokens == pytest.approx(sum(row["tokens"] for row in own))
        assert stage.seconds == 4 * stage.seconds_per_step > 0
    one, two = (stage.batches for stage in forecast.stages)
    assert 0.1 < one.recomputed < 1
    assert two.recomputed == 0
    assert 0 < one.full < 1
    assert forecast.seconds == pytest.approx(sum(stage.seconds for stage in forecast.stages))
    assert "embedded twice; with memory_gb=" in forecast.warnings[0]


def test_data_are_counted(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    rows = [*PAIRS[:18], *({**pair, "negative": []} for pair in PAIRS[18:])]
    config = recipe(tmp_path, tiny_decoder_dir)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    one, two = dry_run(config, base_dir=tmp_path).stages
    (pairs,) = one.data
    assert (pairs.queries, pairs.share, pairs.used) == (24, 1.0, 32)
    assert (pairs.negatives, pairs.without) == (0.75, 0.25)
    by_name = {row.name: row for row in two.data}
    assert by_name["classes"].share == pytest.approx(48 / 72)
    assert by_name["classes"].negatives == 2
    assert sum(row.used for row in two.data) == 32
    found = dry_run(config, base_dir=tmp_path)
    assert found.warnings == (
        "two: there are queries without negatives, which teach nothing without in-batch "
        "negatives: pairs (25%)",
    )


def test_nothing_changes(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, optimizer={"kind": "adamw"})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=tmp_path)
    before = files(tmp_path)
    dry_run(config, base_dir=tmp_path)
    dry_run(config, base_dir=tmp_path, fresh=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_memory_is_that_of_steps_with_updates(
    tmp_path: Path, tiny_decoder_dir: Path, lora: dict | None, monkeypatch
) -> None:
    config = recipe(tmp_path, tiny_decoder_dir, lora=lora)
    stepped, held = [], iter([10**6, 5 * 10**6])
    step = trial.contrastive_step

    def noted(model, batch, texts, *arguments, **options):
        stepped.append((model, sum(map(len, texts))))
        return step(model, batch, texts, *arguments, **options)

    monkeypatch.setattr(trial, "contrastive_step", noted)
    monkeypatch.setattr(dry_run_forecast, "peak_bytes", lambda device: next(held))
    found = dry_run(config, base_dir=tmp_path)
    memory = found.memory
    model = starting_model(config, tmp_path, device="cpu").train()
    elements = sum(parameter.numel() for parameter in model.parameters())
    # Two layers: q and o 32 × 32, k and v 32 × 16, three matrices 32 × 64.
    adapters = 2 * 2 * ((64 + 64) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (memory.elements, memory.trained) == (elements, adapters if lora else elements)
    assert memory.graph.bytes_per_token == graph_bytes_per_token(model, 128)
    assert memory.graph.budget_bytes == 10**9
    assert memory.peak == 4 * 10**6
    assert memory.free > memory.peak
    # The largest step of each stage is among those taken, and updates are part of them.
    for number, stage in enumerate(found.stages):
        assert stepped[4 * number][1] == stage.batches.most_tokens
    started, after = model.state_dict(), stepped[0][0].state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in started.items())


def test_a_run_that_goes_on(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch) -> None:
    config = recipe(tmp_path, tiny_decoder_dir)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(TrainingError, match="interrupted"):
            train(config, base_dir=tmp_path)
    found = dry_run(config, base_dir=tmp_path)
    assert (found.position.step, found.resumed.name) == (5, "step-0000000005")
    assert [(stage.config.name, stage.steps) for stage in found.stages] == [("two", 3)]
    again = dry_run(config, base_dir=tmp_path, fresh=True)
    assert again.replaces
    assert again.resumed is None
    assert [stage.steps for stage in again.stages] == [4, 4]

    other = config.model_copy(update={"seed": 1})
    with pytest.raises(SeveralError, match="another configuration: seed: 0 → 1"):
        dry_run(other, base_dir=tmp_path)
    train(config, base_dir=tmp_path)
    assert dry_run(config, base_dir=tmp_path).finished


def test_mining_is_planned(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(tmp_path, tiny_decoder_dir)
    mine = {"num_negatives": 3, "strategy": "top_k"}
    stages = [config.stages[0].model_dump(), {**config.stages[1].model_dump(), "mine": mine}]
    config = recipe(tmp_path, tiny_decoder_dir, stages=stages)
    found = dry_run(config, base_dir=tmp_path)
    first, second = found.stages
    assert first.mining == ()
    (mining,) = second.mining
    documents = {text for pair in PAIRS for text in (pair["positive"], *pair["negative"])}
    assert (mining.dataset, len(mining.queries), len(mining.documents)) == (
        "pairs",
        24,
        len(documents),
    )
    assert second.mining_seconds > 0
    assert found.seconds > sum(stage.seconds for stage in found.stages)
    assert {row.name: row.to_mine for row in second.data} == {"pairs": True, "classes": False}

    def planned() -> tuple[Mixture, int]:
        mixture, left = plan_mining(
            config,
            config.stages[1],
            load_mixtures(config, tmp_path)[1],
            tmp_path,
            tmp_path / "run" / "mined" / "two",
        )
        return mixture, len(left)

    def examples(mixture: Mixture):
        order = mixture.order(derive_seed(0), 32)
        return mixture.examples(order, 0, 32, seed=0, num_negatives=3)

    before, left = planned()
    train(config, base_dir=tmp_path)
    after, none_left = planned()
    assert (left, none_left) == (1, 0)
    stand_ins, mined = examples(before), examples(after)
    assert [e.query for e in stand_ins] == [e.query for e in mined]
    assert [e.positive for e in stand_ins] == [e.positive for e in mined]
    assert [len(e.negatives) for e in stand_ins] == [len(e.negatives) for e in mined]
    pairs = [(e, m) for e, m in zip(stand_ins, mined, strict=True) if e.dataset == "pairs"]
    assert any(e.negatives != m.negatives for e, m in pairs)
    assert all(e.query not in e.negatives and e.positive not in e.negatives for e, _ in pairs)


def test_what_does_not_fit_is_an_error(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    config = recipe(tmp_path, tiny_decoder_dir)
    with pytest.raises(TrainingError, match=r"a pack of \d+ tokens does not fit: its longest"):
        dry_run(tight(config, tmp_path, 40), base_dir=tmp_path)


def test_a_loss_that_is_not_finite(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch) -> None:
    def broken(*arguments, **options):
        raise FloatingPointError(float("nan"))

    monkeypatch.setattr(trial, "contrastive_step", broken)
    with pytest.raises(TrainingError, match="one: the loss of a step is nan"):
        dry_run(recipe(tmp_path, tiny_decoder_dir), base_dir=tmp_path)


def test_one_process_only(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--dry-run: 2 processes were started; expected one"):
        dry_run(recipe(tmp_path, tiny_decoder_dir), base_dir=tmp_path)


def test_a_warning_where_memory_is_short(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch, capsys
) -> None:
    held = iter([0, 10**6])
    monkeypatch.setattr(dry_run_forecast, "free_bytes", lambda device: 10**5)
    monkeypatch.setattr(dry_run_forecast, "peak_bytes", lambda device: next(held))
    found = dry_run(recipe(tmp_path, tiny_decoder_dir), base_dir=tmp_path)
    assert "are needed and 0.0 GB are free" in found.warnings[-1]
    report.print_dry_run(found)
    assert capsys.readouterr().out.splitlines()[-1].startswith("✗ about ")


@pytest.fixture
def written(tmp_path: Path, tiny_decoder_dir: Path, monkeypatch) -> list[str]:
    config = recipe(tmp_path, tiny_decoder_dir, output="runs/one")
    data = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.chdir(tmp_path)
    return ["train", "recipe.yaml", "--dry-run"]


def test_the_command(written: list[str], tmp_path: Path, capsys) -> None:
    before = files(tmp_path)
    assert run(written) == 0
    assert files(tmp_path) == before
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "runs/one"
    assert "a new run; seed 0, float32, one process on" in lines[0]
    assert lines[-1].startswith("✓ about ")
    cells = {tuple(line.split()) for line in lines}
    assert ("steps", "4", "4", "8") in cells
    assert ("queries", "per", "step", "8", "8") in cells
    assert max(map(len, lines)) <= 80

    assert run(written[:2]) == 0
    assert run(written) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert run([*written, "seed=1"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert run([*written, "--fresh"]) == 0
    assert "replaces the run that is there" in capsys.readouterr().out


def test_all_mistakes_are_told_at_once(written: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "a"}\n')
    (tmp_path / "file").write_text("")
    assert run([*written, "output=file/run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "file: cannot make the run folder: that is a file" in lines[0]
    assert "pairs.jsonl:1" in lines[1]
    assert all(line.startswith("error: ") for line in lines)
    assert run([*written, "stages.0.stepz=3"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0123, "0.0123 s"),
        (42.4, "42 s"),
        (89, "89 s"),
        (3540, "59 min"),
        (3599, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (180000, "2 days 2 h"),
    ],
)
def test_times_are_readable(seconds: float, expected: str) -> None:
    assert report.duration(seconds) == expected


def test_several_mistakes_are_one_user_error() -> None:
    error = SeveralError([UserError("one"), UserError("two", where="there")])
    assert isinstance(error, UserError)
    assert str(error) == "one | there: two"
