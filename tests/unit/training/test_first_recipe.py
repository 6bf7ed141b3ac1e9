"""A first recipe: how steps follow from time and data, and that the file is the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvembed.core.config import load_config
from nvembed.core.errors import ModelError
from nvembed.core.files import write_jsonl
from nvembed.data.config import DatasetConfig
from nvembed.training import first_recipe
from nvembed.training.config import TrainConfig
from nvembed.training.first_recipe import FirstRun, default_backbone, fit_recipe, recipe_text

RUN = {"negatives": False, "evaluated": ("text",), "output": "run", "minutes": 1.0}


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        (10_000, 2_560, (100, 128)),  # five times through the data
        (10_000, 100_000, (156, 128)),  # the time, at half a second a record
        (3_500, 100_000, (109, 64)),  # 54 steps of 128 are too few
        (500, 100_000, (62, 16)),  # too few even of 16, and no smaller batch
        (1, 100_000, (10, 16)),  # never less
        (10_000, 100, (31, 16)),  # a step is a quarter of the data at most
    ],
)
def test_steps_and_batch(seconds: float, size: int, expected: tuple[int, int]) -> None:
    assert first_recipe._steps(seconds, 0.5, size, 16) == expected


@pytest.mark.parametrize("kind", ["retrieval", "classification", "sts"])
def test_the_file_is_the_run(
    kind: str, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_recipe, "_TRUST", 0.99)
    rows = {
        "retrieval": lambda i: {"query": f"q{i}", "positive": f"d{i} " * 8, "negative": f"n{i}"},
        "classification": lambda i: {"text": f"text {i}", "label": "xy"[i % 2]},
        "sts": lambda i: {"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i % 5},
    }[kind]
    write_jsonl(tmp_path / "train.jsonl", map(rows, range(40)))
    data = DatasetConfig(
        name="own", path="train.jsonl", kind=kind, instruction='find: "ä"', stages=(1,)
    )
    run = FirstRun(
        data,
        "held-out",
        queries=["q"] * 40,
        documents=["d" * 40] * 40,
        backbone=str(tiny_decoder_dir),
        **{**RUN, "negatives": kind == "retrieval"},
    )
    before = sorted(tmp_path.iterdir())
    found = fit_recipe(run, tmp_path)
    assert sorted(tmp_path.iterdir()) == before  # a rehearsal leaves nothing
    text = recipe_text(found, command="nvembed train it", remarks=["made"])
    assert text.startswith("# nvembed train it\n# made\n")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_config(TrainConfig, tmp_path / "recipe.yaml") == found.config
    config, stage = found.config, found.config.stages[0]
    # Bytes are tokens: 40 and BOS and EOS, or 33 of the prompt and 3.
    assert config.model.max_tokens == 48
    assert (stage.batch_size, stage.steps) == (16, 12)  # five times through 40 records
    assert stage.learning_rate == 2e-3
    assert config.lora is None
    assert stage.in_batch_negatives == (kind == "retrieval")
    assert (stage.cosent is not None) == (kind == "sts")
    assert stage.num_negatives == {"retrieval": 1, "classification": 4, "sts": 0}[kind]
    assert config.evaluation is not None
    assert (config.evaluation.every, config.evaluation.before) == (12, True)


def test_large_backbones_get_adapters(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_recipe, "_FULL_TUNING", 100)
    rows = ({"query": f"q{i}", "positive": f"d{i}"} for i in range(8))
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = DatasetConfig(
        name="own", path="train.jsonl", kind="retrieval", instruction=None, stages=(1,)
    )
    texts = ["d" * 400] * 8
    run = FirstRun(
        data, "held-out", queries=texts, documents=texts, backbone=str(tiny_decoder_dir), **RUN
    )
    found = fit_recipe(run, tmp_path)
    assert found.config.lora is not None
    assert found.config.model.max_tokens == 256  # the most
    assert found.config.stages[0].batch_size == 4
    assert found.epochs == pytest.approx(found.config.stages[0].steps / 2)


def test_texts_are_cut_before_there_are_too_few_steps(
    tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["d" * 300] * 40
    rows = [{"query": f"q{i} {text}", "positive": f"d{i} {text}"} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    data = DatasetConfig(
        name="own", path="train.jsonl", kind="retrieval", instruction=None, stages=(1,)
    )
    wanted: list[float] = []

    def steps(seconds: float, per_query: float, size: int, small: int) -> tuple[int, int]:
        wanted.append(per_query)
        return int(60 * wanted[0] / per_query), 2  # as if the time were 60 whole steps

    monkeypatch.setattr(first_recipe, "_steps", steps)
    given = {"queries": texts, "documents": texts, "backbone": str(tiny_decoder_dir)}
    found = fit_recipe(FirstRun(data, "held-out", **given, **RUN), tmp_path)
    # Of 256 tokens half is cut.
    assert found.config.model.max_tokens == 128
    assert [one / wanted[0] for one in wanted] == pytest.approx([1, 192 / 256, 128 / 256])


def test_the_best_model_at_hand_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("assets/best", "package:nvembed-no-such-package", "assets/small")
    monkeypatch.setattr(first_recipe, "BACKBONES", names)
    with pytest.raises(ModelError, match="no model here to start from"):
        default_backbone()
    (tmp_path / "assets" / "small").mkdir(parents=True)
    assert default_backbone() == "assets/small"
    best = tmp_path / "assets" / "best"
    best.mkdir()
    (best / "nvembed_config.json").write_text('{"bases": ["package:nvembed-no-such-package"]}')
    assert default_backbone() == "assets/small"  # the base of the best is not at hand
    (best / "nvembed_config.json").write_text("{}")
    assert default_backbone() == "assets/best"
