"""A grid file becomes the right training runs, or says everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nvembed.core.config import load_config
from nvembed.core.errors import ConfigError
from nvembed.training.ablation.grid import GridConfig, grid_runs

STAGE = {"steps": 5, "batch_size": 4, "warmup_steps": 1, "num_negatives": 2}
RECIPE = {
    "output": "run",
    "model": {"backbone": "decoder"},
    "datasets": [
        {"name": "pairs", "path": "p.jsonl", "kind": "retrieval", "stages": [1, 2]},
        {"name": "labels", "path": "l.jsonl", "kind": "classification", "stages": [2]},
        {"name": "first", "path": "f.jsonl", "kind": "retrieval", "stages": [1]},
    ],
    "stages": [
        {"name": "one", "in_batch_negatives": True, **STAGE},
        {"name": "two", "in_batch_negatives": False, **STAGE},
    ],
}
for _dataset in RECIPE["datasets"]:  # type: ignore[attr-defined]
    _dataset["instruction"] = "find"
GRID = {
    "recipe": "recipe.yaml",
    "output": "out",
    "settings": {"model.max_tokens": 32, "stages.two.steps": 7},
    "axes": {
        "mask": {
            "both": {"model.attention": "bidirectional"},
            "causal": {"model.attention": "causal"},
        },
        "order": {
            "two": {},
            "reversed": {"stage_order": [2, 1]},
            "single": {"stage_order": [2], "stages.two.in_batch_negatives": True},
        },
    },
    "seeds": [3, 5],
    "tasks": ["tasks"],
}


def grid(folder: Path, **changes: Any) -> GridConfig:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "grid.yaml").write_text(
        yaml.safe_dump({**GRID, **changes}, sort_keys=False), encoding="utf-8"
    )
    return load_config(GridConfig, folder / "grid.yaml")


def test_every_combination_once_per_seed_seeds_outermost(tmp_path: Path) -> None:
    runs = grid_runs(grid(tmp_path), tmp_path)
    arms = [f"{mask}+{order}" for mask in ("both", "causal") for order in GRID["axes"]["order"]]  # type: ignore[index]
    assert [(run.arm, run.seed) for run in runs] == [(a, s) for s in (3, 5) for a in arms]
    assert [run.config.seed for run in runs] == [run.seed for run in runs]
    assert len({run.folder for run in runs}) == 12
    assert all(run.config.output == str(run.folder) for run in runs)
    assert {run.config.model.max_tokens for run in runs} == {32}
    assert [run.config.model.attention for run in runs[:6]] == ["bidirectional"] * 3 + [
        "causal"
    ] * 3


def test_stages_change_places_with_their_data_sets(tmp_path: Path) -> None:
    runs = {run.arm: run.config for run in grid_runs(grid(tmp_path), tmp_path)}

    def shape(arm: str) -> tuple[Any, Any]:
        config = runs[arm]
        return (
            [(s.name, s.steps, s.in_batch_negatives) for s in config.stages],
            {d.name: d.stages for d in config.datasets},
        )

    assert shape("both+two") == (
        [("one", 5, True), ("two", 7, False)],
        {"pairs": (1, 2), "labels": (2,), "first": (1,)},
    )
    assert shape("both+reversed") == (
        [("two", 7, False), ("one", 5, True)],
        {"pairs": (1, 2), "labels": (1,), "first": (2,)},
    )
    assert shape("both+single") == ([("two", 7, True)], {"pairs": (1,), "labels": (1,)})


def test_left_out_combinations_and_the_baseline(tmp_path: Path) -> None:
    made = grid(
        tmp_path,
        leave_out=[{"mask": "causal", "order": "single"}, {"order": "reversed"}],
        baseline={"mask": "causal", "order": "two"},
    )
    assert list(made.arms()) == ["both+two", "both+single", "causal+two"]
    assert made.baseline_arm == "causal+two"
    assert grid(tmp_path).baseline_arm == "both+two"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds holds a seed twice"),
        ({"baseline": {"mask": "both"}}, "baseline has no value for order"),
        ({"leave_out": [{"msak": "both"}]}, "leave_out.0 names 'msak', which is no axis"),
        ({"leave_out": [{"mask": "none"}]}, "'none', which is no value of mask"),
        ({"leave_out": [{"mask": "both"}]}, "takes away the baseline both+two"),
        ({"leave_out": [{"mask": "both"}, {"mask": "causal"}]}, "leaves no arm"),
        ({"axes": {"a/b": {"x": {}}}}, "a/b"),
        ({"paper": [{"table": "v2", "rows": {"nope": "x"}}]}, "paper names nope"),
    ],
)
def test_what_is_wrong_with_a_grid(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        grid(tmp_path, **changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stage_order": [3]}, "a list of stage numbers 1 to 2"),
        ({"stage_order": [1, 1]}, "names a stage twice"),
        ({"stages.tow.steps": 3}, "or a name (one, two) instead of 'tow'"),
        ({"datasets.labels.wieght": 3}, "wieght"),
        ({"stages.0.steps": 0}, "steps"),
    ],
)
def test_an_arm_that_is_no_recipe_is_named(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    made = grid(tmp_path, axes={"only": {"good": {}, "bad": setting}})
    with pytest.raises(ConfigError) as raised:
        grid_runs(made, tmp_path)
    assert "arm bad: " in str(raised.value)
    assert message in str(raised.value)
    assert "arm good" not in str(raised.value)


def test_sets_are_left_out_of_all_arms(tmp_path: Path) -> None:
    runs = grid_runs(grid(tmp_path, without=["labels"]), tmp_path)
    assert len(runs) == 12
    for run in runs:
        names = [dataset.name for dataset in run.config.datasets]
        assert names == (["pairs"] if "single" in run.arm else ["pairs", "first"])
    with pytest.raises(ConfigError, match=r"without: lebals: no data set .*pairs, labels, first"):
        grid_runs(grid(tmp_path, without=["lebals"]), tmp_path)
