"""The demo's run and its recipe file are one."""

from __future__ import annotations

from pathlib import Path

from nvembed.core.config import load_config
from nvembed.training.config import TrainConfig
from pydocs.recipe import LARGE, LARGE_TUNED, SMALL, SMALL_TUNED, Steps, demo_config, preset_for

RECIPE = Path(__file__).parents[3] / "recipes" / "demo.yaml"


def test_recipe_file_is_the_run_of_the_demo() -> None:
    loaded = load_config(TrainConfig, RECIPE)
    steps = Steps(loaded.stages[0].steps, loaded.stages[1].steps)
    expected = demo_config(
        output="runs/demo-recipe",
        backbone="../assets/decoder-6m",
        steps=steps,
        data="../runs/demo/data",
    )
    assert loaded == expected


def test_rehearsal_differs_in_the_number_of_records_only() -> None:
    run = demo_config(output="x", backbone="y", steps=Steps(3, 3))
    rehearsal = demo_config(output="x", backbone="y", steps=Steps(3, 3), max_records=64)
    assert [d.max_records for d in rehearsal.datasets] == [64, 64, None, None]
    restored = tuple(
        short.model_copy(update={"max_records": full.max_records})
        for short, full in zip(rehearsal.datasets, run.datasets, strict=True)
    )
    assert rehearsal.model_copy(update={"datasets": restored}) == run


def test_short_stages_still_warm_up_and_cool_down() -> None:
    for steps in (1, 10, 1000):
        config = demo_config(output="x", backbone="y", steps=Steps(steps, steps))
        for stage in config.stages:
            assert 1 <= stage.warmup_steps <= max(1, steps // 10)


def test_presets_by_size_and_kind() -> None:
    assert preset_for(width=256, tuned=False) is SMALL
    assert preset_for(width=256, tuned=True) is SMALL_TUNED
    assert preset_for(width=576, tuned=False) is LARGE
    assert preset_for(width=576, tuned=True) is LARGE_TUNED
    # What is trained already keeps its head and moves less.
    assert LARGE_TUNED.pooling is None
    assert max(LARGE_TUNED.learning_rates) < max(LARGE.learning_rates)
