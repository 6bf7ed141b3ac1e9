"""The demo from end to end, on invented documentation and a random decoder."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from interruption import interrupt_after
from nvembed import NVEmbed
from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError, TrainingError
from nvembed.core.runs import RunFolder
from nvembed.model.pooling import LatentAttentionPooling
from nvembed.training.config import TrainConfig
from pydocs import recipe
from pydocs import run as demo
from pydocs.harvest import DocEntry

VERBS = ["Compute", "Return", "Draw", "Sort", "Remove", "Parse", "Merge", "Check"]
NOUNS = ["matrix", "graph", "tensor", "window", "socket", "queue", "archive", "colour", "date"]


def invented_entries() -> list[DocEntry]:
    """Two packages of 80 modules each; words of a package occur nowhere else."""
    rng = random.Random(0)
    entries = []
    for number in range(640):
        package = f"pack{number % 2}"
        module = f"{package}.part.module{number % 160}"
        noun, other = rng.sample(NOUNS, 2)
        own = [f"{package}{n}" for n in range(40)]
        entries.append(
            DocEntry(
                name=f"{module}.f{number}",
                module=module,
                package=package,
                kind="function",
                signature=f"f{number}({noun})",
                summary=f"{rng.choice(VERBS)} the {noun} number {number} of the {other}.",
                rest=" ".join(rng.choices([*NOUNS, *own], k=30)),
            )
        )
    return entries


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documentation instead of what is installed, and as few steps as show that all is there."""
    monkeypatch.setattr(demo, "harvest", lambda *, cache: invented_entries())
    for module in (recipe, demo):  # the tiny tokenizer has one token per byte
        monkeypatch.setattr(module, "MAX_TOKENS", 160)
    few = {"least_steps": 3, "rehearsed": (2, 64)}
    for name in ("SMALL", "SMALL_TUNED", "LARGE_TUNED"):
        monkeypatch.setattr(recipe, name, replace(getattr(recipe, name), **few))
    presets = (recipe.SMALL, recipe.SMALL_TUNED, recipe.LARGE_TUNED)
    monkeypatch.setattr(demo, "PRESETS", presets)


@pytest.mark.usefixtures("invented")
def test_everything_is_made_and_reported(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    output, printed = tmp_path / "run", io.StringIO()
    results = demo.run_demo(
        0.01,
        str(tiny_decoder_dir),
        output,
        cache=None,
        console=Console(file=printed, width=120),
    )
    tasks = {"pydocs_retrieval", "pydocs_classification", "pydocs_clustering"}
    assert list(results) == ["BM25", "base, mean pooling", "after stage 1", "after stage 2"]
    assert set(results["BM25"]) == {"pydocs_retrieval"}
    assert all(set(results[model]) == tasks for model in list(results)[1:])
    scores = json.loads((output / "eval" / "scores.json").read_text(encoding="utf-8"))
    assert scores["after stage 2"][0] == results["after stage 2"]["pydocs_retrieval"].main_score
    # Three steps each, on one metrics file; the stages really changed the model.
    stages = [row["stage"] for row in RunFolder(output).read_metrics()]
    assert stages == ["stage1"] * 3 + ["stage2"] * 3
    assert len({tuple(row) for row in scores.values()}) == 4
    for name in ("losses.png", "scores.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    mined = (output / "mined" / "stage2" / "pydocs-mined.jsonl").read_text(encoding="utf-8")
    assert '"negative"' in mined
    text = printed.getvalue()
    for score in (s for row in scores.values() for s in row if s is not None):
        assert f"{score:.3f}" in text
    for expected in (
        "turn a picture",
        "before",
        "after",
        f"nvembed search {output}/model",
        "pydocs.own",
    ):
        assert expected in text


@pytest.mark.usefixtures("invented")
def test_an_interrupted_demo_goes_on(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    def start() -> str:
        printed = io.StringIO()
        console = Console(file=printed, width=120)
        demo.run_demo(0.01, str(tiny_decoder_dir), tmp_path / "run", cache=None, console=console)
        return printed.getvalue()

    rehearsed, first_stage = 4, 3
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, rehearsed + first_stage + 2)
        with pytest.raises(TrainingError, match="interrupted after step 5"):
            start()
    assert "going on with the interrupted run" in start()
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("invented")
def test_an_embedding_model_is_tuned_on(
    tiny_decoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the shipped one: adapters, its own head, scores before and after both stages."""
    monkeypatch.setattr(recipe, "LARGE_WIDTH", 1)
    start = tmp_path / "start"
    NVEmbed.from_pretrained(tiny_decoder_dir, pooling="latent", num_latents=8, num_heads=1).save(
        str(start)
    )
    output, printed = tmp_path / "run", io.StringIO()
    console = Console(file=printed, width=120)
    results = demo.run_demo(0.01, str(start), output, cache=None, console=console)
    assert list(results) == ["BM25", "before", "after stage 2"]
    config = load_config(TrainConfig, output / "config.yaml")
    assert config.lora == recipe.LARGE_TUNED.lora
    assert config.model.pooling is None
    head = NVEmbed.from_pretrained(output / "model").pooling
    assert isinstance(head, LatentAttentionPooling)
    assert head.num_latents == 8
    text = printed.getvalue()
    assert "turn a picture" in text
    assert "evaluating before" in text


@pytest.mark.parametrize("minutes", [0, -1])
def test_time_that_is_none(minutes: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected more than 0"):
        demo.run_demo(minutes, "anything", tmp_path)
