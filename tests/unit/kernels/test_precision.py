"""The rule by which a machine's floating-point type is chosen."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from nvembed.kernels import functions as products
from nvembed.kernels import machine as precision
from nvembed.kernels.build import read_cpu

AMD = ["vendor_id : AuthenticAMD", "model name : EPYC", "flags : fpu avx512f avx512_bf16"]
OLD = ["vendor_id : GenuineIntel", "model name : Xeon", "flags : fpu avx avx2"]
ARM = ["CPU part : 0xd40", "Features : fp asimd bf16"]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(precision, "hold_note", lines.append)
    return lines


def cpu(monkeypatch: pytest.MonkeyPatch, lines: list[str], gain: float | None) -> None:
    """Be on another CPU; a gain of None must not be measured."""
    monkeypatch.setattr(precision, "this_cpu", lambda: read_cpu(lines))

    def kept(name: str, *_: Any) -> float:
        assert name == "bfloat16"
        assert gain is not None
        return gain

    monkeypatch.setattr(precision, "kept_gain", kept)


@pytest.mark.parametrize("lines", [AMD, ARM, []], ids=["amd", "arm", "unknown"])
@pytest.mark.parametrize(
    ("gain", "expected"),
    [(4.5, "bfloat16"), (1.5, "bfloat16"), (1.45, "float32"), (1.0, "float32"), (0.2, "float32")],
)
def test_a_cpu_takes_bfloat16_where_products_are_clearly_faster(
    gain: float, expected: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(monkeypatch, lines, gain)
    assert precision.fastest_precision("cpu") == expected


def test_a_cpu_without_the_instructions_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    cpu(monkeypatch, OLD, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.settle_precision("auto") == "float32"
    assert noted == [
        "computing in float32 (this CPU has no instructions for bfloat16; fix with --dtype)"
    ]


def test_products_of_both_types_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(name: str, plain: Any, other: Any) -> float:
        assert plain().dtype is torch.float32
        assert other().dtype is torch.bfloat16
        assert plain().shape == other().shape
        return 2.0

    monkeypatch.setattr(precision, "kept_gain", kept)
    assert precision.bfloat16_gain() == 2.0


def test_a_choice_is_kept_and_auto_is_settled_and_told(
    monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    cpu(monkeypatch, AMD, 3.14)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for choice in ("float32", "bfloat16", None):
        assert precision.settle_precision(choice) == choice  # type: ignore[call-overload]
        assert precision.settle_precision(choice, begun="float32") == choice  # type: ignore[call-overload]
    assert noted == []
    assert precision.settle_precision("auto") == "bfloat16"
    assert precision.settle_precision("auto", begun="float32") == "float32"
    assert precision.settle_precision("auto", option=None) == "bfloat16"
    assert noted == [
        "computing in bfloat16 (this CPU multiplies bfloat16 3.1x as fast as float32; fix with "
        "--dtype)",
        "computing in float32 (as it was begun; fix with --dtype)",
        "computing in bfloat16 (this CPU multiplies bfloat16 3.1x as fast as float32)",
    ]


def test_which_library_multiplies_follows_from_the_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "has_onednn", lambda: True)
    for lines, expected in ((AMD, True), (OLD, False), (ARM, False), ([], False)):
        products.onednn_pays.cache_clear()
        monkeypatch.setattr(products, "this_cpu", lambda lines=lines: read_cpu(lines))
        assert products.onednn_pays() is expected
    products.onednn_pays.cache_clear()


def test_the_record_names_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    monkeypatch.setattr(precision.attention, "float32_available", lambda: False)
    monkeypatch.setattr(precision.attention, "bfloat16_available", lambda: True)
    monkeypatch.setattr(precision, "this_cpu", lambda: read_cpu(AMD))
    monkeypatch.setattr("nvembed.kernels.layers.float32_available", lambda: False)
    monkeypatch.setattr(precision, "library", lambda name: None)
    assert precision.computing_record("bfloat16") == {
        "dtype": "bfloat16",
        "kernels": ["onednn", "bfloat16-attention"],
        "processor": "EPYC",
        "torch": torch.__version__,
    }


def test_notes_are_shown_by_the_command_line_and_silent_in_python() -> None:
    code = (
        "from nvembed.core.reporting import hold_note, release_notes, show_notes;"
        "hold_note('silent'); release_notes(); hold_note('of before'); show_notes();"
        "hold_note('shown'); release_notes(); release_notes(); hold_note('held')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "shown\n")


@pytest.mark.parametrize(
    ("choice", "begun", "expected"),
    [
        ("auto-nf4", None, "bfloat16-nf4"),
        ("auto-nf4", "float32-nf4", "float32-nf4"),  # as it was begun
        ("auto-nf4", "float32", "bfloat16-nf4"),  # begun with whole weights: other vectors
        ("auto-int8", "int8", "bfloat16-int8"),
        ("auto", "float32-fp8", "float32-fp8"),
        ("float32-nf4", "bfloat16-nf4", "float32-nf4"),
    ],
)
def test_how_weights_are_held_stays_with_the_type(
    choice: Any,
    begun: Any,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    noted: list[str],
) -> None:
    cpu(monkeypatch, AMD, 4.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.settle_precision(choice, begun=begun) == expected
    assert (f"computing in {expected} " in "".join(noted)) == choice.startswith("auto")
