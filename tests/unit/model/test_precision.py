"""The rule by which a machine's floating-point type is chosen."""

from __future__ import annotations

import pytest
import torch

from nvembed.model import precision


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    precision.fastest_precision.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, "bfloat16"), (0.6, "bfloat16"), (0.7, "float32"), (2, "float32")],
)
def test_a_cpu_takes_bfloat16_where_products_are_clearly_faster(
    seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(precision, "_product_seconds", times.__getitem__)
    assert precision.fastest_precision("cpu") == expected


def test_products_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(precision, "_product_seconds", lambda dtype: asked.append(dtype) or 1.0)
    for _ in range(3):
        precision.fastest_precision("cpu")
    assert asked == [torch.float32, torch.bfloat16]


def test_a_real_measurement_gives_plausible_times() -> None:
    seconds = precision._product_seconds(torch.float32)
    operations = 2 * precision._ROWS * precision._INNER * precision._COLUMNS
    assert 1e8 < operations / seconds < 1e14


def test_a_choice_is_kept_and_auto_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_product_seconds", {torch.float32: 1.0}.get)
    assert precision.settle_precision("float32") == "float32"
    assert precision.settle_precision("bfloat16") == "bfloat16"
    monkeypatch.setattr(precision, "fastest_precision", lambda device: f"of {device}")
    assert precision.settle_precision("auto").startswith("of c")
