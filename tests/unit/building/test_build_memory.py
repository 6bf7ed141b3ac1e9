"""Memory of a build does not grow with the texts."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import pytest

from nvembed.building.build import build_recipe
from nvembed.core.config import load_config
from nvembed.data import built_sets
from nvembed.data.sources import files
from nvembed.training.config import TrainConfig
from tiny_build import write_inputs

LONG = "a long text of many words " * 40  # about 1 kB


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to these sets; with the real ones a build of them is one buffer."""
    monkeypatch.setattr(built_sets, "GROUP_ROWS", 128)
    monkeypatch.setattr(files, "_PARQUET_ROWS", 64)


def peak_of_build(folder: Path, records: int) -> int:
    folder.mkdir()
    recipe = write_inputs(folder, mine=None)
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as out:
        for number in range(records):
            # Two of three records share a query with another.
            query = f"query {number % (records * 2 // 3)}"
            out.write(json.dumps({"query": query, "positive": f"{LONG}{number}"}) + "\n")
    config = load_config(TrainConfig, recipe, ["datasets.0.max_records=null"])
    only_pairs = config.model_copy(update={"datasets": config.datasets[:1]})
    gc.collect()
    tracemalloc.start()
    try:
        (outcome,) = build_recipe(only_pairs, base_dir=folder, folder="")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.manifest is not None
    assert outcome.manifest["rows"] == records * 2 // 3
    return peak


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    peak_of_build(tmp_path / "first", 30)  # imports and caches
    few, many = 400, 2000
    growth = peak_of_build(tmp_path / "many", many) - peak_of_build(tmp_path / "few", few)
    # Holding the texts would take 1.6 MB more.
    assert growth < 0.2 * (many - few) * len(LONG)
