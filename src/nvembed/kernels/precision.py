"""Which floating-point type a job computes in, and what its vectors depend on beside the model.

CPUs with AVX512-BF16 or AMX multiply matrices in bfloat16 several times as fast as in float32; on
others bfloat16 is emulated and slower, and no flag says which it will be (docs/log.md has both). So
it is measured (``kernels/timing.py``). A job settles its type once, when it begins: the settled
type goes to all its processes, into the names of what it keeps and into its record, and a job that
goes on takes the type that it was begun with.
"""

from __future__ import annotations

from typing import Any, overload

import torch

from nvembed.core.dtypes import Precision, PrecisionChoice
from nvembed.core.reporting import hold_note
from nvembed.kernels import attention, matmul
from nvembed.kernels.build import library
from nvembed.kernels.cpu import this_cpu
from nvembed.kernels.timing import kept_gain

MIN_GAIN = 1.5
"""How much faster products in bfloat16 must be: everything around them gains nothing, and whatever
is nearly even is float32 at every start."""

_ROWS, _INNER, _COLUMNS = 1024, 256, 704


@overload
def settle_precision(
    choice: PrecisionChoice, *, begun: Precision | None = None, option: str | None = "--dtype"
) -> Precision: ...
@overload
def settle_precision(
    choice: PrecisionChoice | None,
    *,
    begun: Precision | None = None,
    option: str | None = "--dtype",
) -> Precision | None: ...
def settle_precision(
    choice: PrecisionChoice | None,
    *,
    begun: Precision | None = None,
    option: str | None = "--dtype",
) -> Precision | None:
    """Return the choice, ``auto`` replaced by a type; a note says which one (``core/notes.py``).

    Args:
        choice: of the user; ``None``, what was saved, stays.
        begun: the type that the job was begun with, where it goes on.
        option: what fixes the choice, for the note; ``None`` where nothing does.
    """
    if choice != "auto":
        return choice
    precision, line = choose_precision(begun, option)
    hold_note(line)
    return precision


def choose_precision(begun: Precision | None, option: str | None) -> tuple[Precision, str]:
    """Choose the type of a job that may have any, and say in one line which it is, and why.

    Args:
        begun: the type that the job was begun with, where it goes on.
        option: what fixes the choice; ``None`` where nothing does.
    """
    device = _device_type()
    precision = begun or fastest_precision(device)
    reason = "as it was begun" if begun else _reason(device)
    how = f"; fix with {option}" if option else ""
    return precision, f"computing in {precision} ({reason}{how})"


def fastest_precision(device_type: str) -> Precision:
    """Return the type that matrix products are fastest in.

    On a CPU that may multiply bfloat16, two products of a small decoder's size are measured (0.1
    seconds, then kept). CUDA devices with bfloat16 arithmetic get bfloat16, others float32.

    Args:
        device_type: ``torch.device.type``.
    """
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device_type != "cpu" or not this_cpu().may_multiply_bfloat16:
        return "float32"
    return "bfloat16" if bfloat16_gain() >= MIN_GAIN else "float32"


def bfloat16_gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices."""
    wide, narrow = (
        (torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_COLUMNS, _INNER, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.inference_mode():
        return kept_gain("bfloat16", lambda: matmul.product(*wide), lambda: matmul.product(*narrow))


def kernels() -> list[str]:
    """Name what computes in torch's place here; another set changes the last bits of vectors."""
    if _device_type() != "cpu":
        return []
    from nvembed.kernels import layers  # imports transformers, which settling a type does not need

    used = {
        "onednn": matmul.onednn_pays(),
        "attention": attention.float32_available(),
        "bfloat16-attention": attention.bfloat16_available(),
        "layers": layers.available(),
        "norms-and-gates": library("elementwise.cpp") is not None,
    }
    return [name for name, is_used in used.items() if is_used]


def computing_record(precision: Precision | None) -> dict[str, Any]:
    """Describe how numbers are computed, for the record of a job.

    Args:
        precision: settled; ``None`` is what the model was saved in.
    """
    processor = this_cpu().model
    if _device_type() == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        "dtype": precision,
        "kernels": kernels(),
        "processor": processor,
        "torch": torch.__version__,
    }


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _reason(device_type: str) -> str:
    if device_type != "cpu":
        return "what this GPU computes in"
    if not this_cpu().may_multiply_bfloat16:
        return "this CPU has no instructions for bfloat16"
    return f"this CPU multiplies bfloat16 {bfloat16_gain():.1f}x as fast as float32"
