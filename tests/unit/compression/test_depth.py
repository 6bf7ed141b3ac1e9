"""Which layers go: changes of runs against a changed copy for each, and the choice among all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import make_family
from nvembed import NVEmbed
from nvembed.core.errors import ModelError
from nvembed.encoding.compression.compress import _packs
from nvembed.encoding.compression.depth import (
    changes_of_runs,
    cheapest_runs,
    layers_to_leave_out,
)
from oracles import compression as oracle

NOUNS = ["cat", "moon", "answer", "word", "lake", "hill", "star", "owl"]
TEXTS = [f"the {a} and one {b} or no {c}" for a in NOUNS for b in NOUNS for c in NOUNS[:2]]
FITTING, CHOOSING = TEXTS[::2], TEXTS[1::9]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Qwen 2 of 5 layers, every other of them with a sliding window."""
    from transformers import Qwen2Config, Qwen2Model

    folder = tmp_path_factory.mktemp("five")
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    )
    torch.manual_seed(0)
    Qwen2Model(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def packs(model: NVEmbed, texts: list[str], size: int) -> Any:
    return [pack for n in range(0, len(texts), size) for pack in _packs(model, texts[n : n + size])]


def both(model: NVEmbed) -> tuple[Any, Any]:
    return packs(model, CHOOSING, 6), packs(model, FITTING, 24)


def by_copies(model: NVEmbed, longest: int, *, fits: bool = True) -> np.ndarray:
    count = len(model.backbone.model.layers)
    found = np.full((count, count + 1), np.inf)
    for first in range(count):
        found[first, first] = 0
        for end in range(first + 1, min(first + longest, count) + 1):
            taught = packs(model, FITTING, 24) if fits and first else None
            found[first, end] = oracle.change_of_run(model, CHOOSING, taught, first, end)
    return found


@pytest.fixture(scope="module")
def expected(saved: Path) -> np.ndarray:
    return by_copies(NVEmbed.from_pretrained(saved, max_tokens=64), 5)


@pytest.mark.parametrize("longest", [2, 5])
def test_runs_change_vectors_as_copies_without_them_do(
    saved: Path, expected: np.ndarray, longest: int
) -> None:
    model = NVEmbed.from_pretrained(saved, max_tokens=64)
    first, end = np.indices(expected.shape)
    expected = np.where(end - first <= longest, expected, np.inf)
    before = copy.deepcopy(dict(model.named_parameters()))
    told: list[int] = []
    with torch.no_grad():
        found = changes_of_runs(model, *both(model), longest, lambda: told.append(1))
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-5)
    assert len(told) == 5
    measured = found[np.isfinite(found) & (found > 0)]
    assert len(measured) == {2: 9, 5: 15}[longest]
    assert measured.min() > 1e-3
    for name, value in model.named_parameters():  # looking changes nothing
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("keep", [1, 3])
def test_the_layers_that_stay_are_the_cheapest_choice(
    saved: Path, expected: np.ndarray, keep: int
) -> None:
    model = NVEmbed.from_pretrained(saved, max_tokens=64)
    least, stay = oracle.cheapest(expected, keep)
    runs = layers_to_leave_out(model, *both(model), keep)
    gone = [layer for run in runs for layer in run.layers]
    assert [n for n in range(5) if n not in gone] == list(stay)
    assert sum(run.change for run in runs) == pytest.approx(least, rel=0.02)


@given(st.data())
def test_the_choice_of_runs_is_the_best_of_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6))
    keep = data.draw(st.integers(1, count - 1))
    longest = data.draw(st.integers(-(-count // (keep + 1)), count))
    changes = np.full((count, count + 1), np.inf)
    for first in range(count):
        changes[first, first] = 0
        for end in range(first + 1, min(first + longest, count) + 1):
            changes[first, end] = data.draw(st.floats(0, 1))
    least, _ = oracle.cheapest(changes, keep)
    runs = cheapest_runs(changes, keep)
    gone = [layer for run in runs for layer in run.layers]
    assert gone == sorted(set(gone))
    assert len(gone) == count - keep
    assert sum(changes[run.layers[0], run.layers[-1] + 1] for run in runs) == pytest.approx(least)
    for run in runs:
        assert run.layers == tuple(range(run.layers[0], run.layers[-1] + 1))
    fronts = {run.layers[0] - 1 for run in runs}
    assert not fronts & set(gone)  # runs beside each other are one


def test_a_layer_that_does_nothing_goes(saved: Path) -> None:
    model = NVEmbed.from_pretrained(saved, max_tokens=64)
    layer: Any = model.backbone.model.layers[2]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        weight.data.zero_()
    ((layers, change),) = layers_to_leave_out(model, *both(model), 4)
    assert layers == (2,)
    assert change == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "smollm3", "phi"])
def test_families(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = NVEmbed.from_pretrained(make_family(family, tmp_path / "a", tiny_tokenizer))
    fits = family in ("llama", "smollm3")
    (run,) = layers_to_leave_out(model, *both(model), 1)
    expected = by_copies(model, 1, fits=fits)
    first = run.layers[0]
    assert run.change == pytest.approx(expected[first, first + 1], rel=0.02, abs=1e-5)
    assert run.change <= min(expected[0, 1], expected[1, 2]) * 1.02


def test_families_that_have_no_list_of_layers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    bert = NVEmbed.from_pretrained(make_family("bert", tmp_path / "bert", tiny_tokenizer))
    with pytest.raises(ModelError, match="layers of the bert family cannot be taken out"):
        layers_to_leave_out(bert, *both(bert), 1)
