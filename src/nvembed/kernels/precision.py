"""Which floating-point type a job computes in, and what its vectors depend on beside the model.

No flag says whether a CPU is faster in bfloat16, so it is measured: both products on one thread, in
turns, by the best CPU time, which other jobs do not move. The answer is kept for a month. A job
settles its type once; one that goes on takes the type that it was begun with.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast, overload

import torch

from nvembed.core import __version__
from nvembed.core.arguments import (
    FloatPrecision,
    Precision,
    PrecisionChoice,
    goes_on,
    is_settled,
)
from nvembed.core.cache import open_private, private_folders, read_private
from nvembed.core.errors import UserError
from nvembed.core.files import write_json
from nvembed.core.reporting import hold_note
from nvembed.kernels import attention, functions
from nvembed.kernels.build import library, this_cpu

MIN_GAIN = 1.5
"""How much faster products in bfloat16 must be: everything around them gains nothing, and whatever
is nearly even is float32 at every start."""
KEPT = timedelta(days=30)

_ROWS, _INNER, _COLUMNS = 1024, 256, 704
_TURNS = 15
_NATIVE = Path(__file__).parent / "native"


@overload
def settle_precision(
    choice: PrecisionChoice, *, begun: Precision | None = None, option: str | None = "--dtype"
) -> Precision: ...
@overload
def settle_precision(
    choice: None, *, begun: Precision | None = None, option: str | None = "--dtype"
) -> None: ...
def settle_precision(
    choice: PrecisionChoice | None,
    *,
    begun: Precision | None = None,
    option: str | None = "--dtype",
) -> Precision | None:
    """Return the choice, ``auto`` replaced by a type, which a held note tells; ``None`` stays."""
    if is_settled(choice):
        return choice
    precision, line = choose_precision(begun, option, choice)
    hold_note(line)
    return precision


def choose_precision(
    begun: Precision | None, option: str | None, choice: PrecisionChoice = "auto"
) -> tuple[Precision, str]:
    """Choose the type of a job, or the one it was ``begun`` with; say which, and why."""
    device = _device_type()
    kept = begun if goes_on(choice, begun) else None
    precision = kept or cast(Precision, choice.replace("auto", fastest_precision(device)))
    if kept:
        reason = "as it was begun"
    elif device != "cpu":
        reason = "what this GPU computes in"
    elif not this_cpu().may_multiply_bfloat16:
        reason = "this CPU has no instructions for bfloat16"
    else:
        reason = f"this CPU multiplies bfloat16 {bfloat16_gain():.1f}x as fast as float32"
    how = f"; fix with {option}" if option else ""
    return precision, f"computing in {precision} ({reason}{how})"


def fastest_precision(device_type: str) -> FloatPrecision:
    """Return the type that matrix products are fastest in on a device of ``torch.device.type``.

    On a CPU that may multiply bfloat16, products are measured (0.1 seconds, then kept).
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
        return kept_gain(
            "bfloat16", lambda: functions.product(*wide), lambda: functions.product(*narrow)
        )


def kernels() -> list[str]:
    """Name what computes in torch's place here; another set changes the last bits of vectors."""
    if _device_type() != "cpu":
        return []
    from nvembed.kernels import layers  # imports transformers, which settling a type does not need

    used = {
        "onednn": functions.onednn_pays(),
        "attention": attention.float32_available(),
        "bfloat16-attention": attention.bfloat16_available(),
        "layers": layers.available(),
        "norms-and-gates": library("elementwise.cpp") is not None,
    }
    return [name for name, is_used in used.items() if is_used]


def computing_record(precision: Precision | None) -> dict[str, Any]:
    """Describe how numbers are computed, for the record of a job; ``None`` is the saved type."""
    on_gpu = _device_type() == "cuda"
    return {
        "dtype": precision,
        "kernels": kernels(),
        "processor": torch.cuda.get_device_name() if on_gpu else this_cpu().model,
        "torch": torch.__version__,
    }


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- The measurement ------------------------------------------------------------------------------


def kept_gain(name: str, plain: Callable[[], object], other: Callable[[], object]) -> float:
    """Return how many times as fast ``other`` is as ``plain``, of milliseconds, kept by name."""
    file_name = f"{name}-{hashlib.sha256(_machine_key().encode()).hexdigest()[:24]}.json"
    gain: float | None = None
    with suppress(UserError):  # no folder can be had at all
        for folder in private_folders("measured"):
            found = _read(folder, file_name)
            if found is None and gain is None:
                gain = measured_gain(plain, other)
                # Of processes that measure at the same time, the later take the first answer.
                found = _read(folder, file_name)
            if found is not None:
                return found
            assert gain is not None
            if _write(folder, file_name, gain):
                return gain
    return measured_gain(plain, other) if gain is None else gain


def measured_gain(plain: Callable[[], object], other: Callable[[], object]) -> float:
    """Measure how many times as fast ``other`` is as ``plain``, by the CPU time of one thread."""
    best = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # time that other threads spend would not be counted
    try:
        for _ in range(_TURNS):
            for which, compute in enumerate((plain, other)):
                started = time.thread_time_ns()
                compute()
                best[which] = min(best[which], time.thread_time_ns() - started)
    finally:
        torch.set_num_threads(threads)
    return best[0] / max(best[1], 1)


def _machine_key() -> str:
    sources = [path.read_text("utf-8") for path in sorted(_NATIVE.iterdir())]
    code = hashlib.sha256("\0".join(sources).encode()).hexdigest()
    cpu = this_cpu()
    return json.dumps([cpu.model, cpu.described, cpu.cores, torch.__version__, __version__, code])


def _read(folder: Path, name: str) -> float | None:
    """Return a kept answer; None where there is none, or it is damaged or too old."""
    try:
        with open_private(folder) as opened:
            content = None if opened is None else read_private(opened, name)
        if content is None:
            return None
        kept: Any = json.loads(content)
        gain, measured = float(kept["gain"]), str(kept["measured"])
        age = datetime.now(UTC) - datetime.fromisoformat(measured)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    intact = kept.get("checksum") == _checksum({"gain": gain, "measured": measured})
    return gain if intact and timedelta(0) <= age < KEPT else None


def _write(folder: Path, name: str, gain: float) -> bool:
    content = {"gain": gain, "measured": datetime.now(UTC).isoformat()}
    with open_private(folder) as opened, suppress(UserError):
        if opened is not None:
            write_json(folder / name, content | {"checksum": _checksum(content)})
            return True
    return False


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
