"""Memory and speed of the 7.85 B shape in bfloat16, int8, fp8 and nf4."""

from __future__ import annotations

import time

from gpu import Context

from gpu_parts.shapes import (
    device_of,
    freed,
    gigabytes,
    peak_gb,
    random_model,
    random_texts,
    seconds_of,
    wait,
)
from nvembed.model.quantization import quantize_backbone


def run(context: Context) -> None:
    device = device_of(context.rehearse)
    length, count = (16, 4) if context.rehearse else (512, 128)
    texts = random_texts(count, length)
    exact = None

    def measure(kind: str) -> None:
        nonlocal exact
        peak_gb(device)
        model = random_model(device, context.work / "quantize", rehearse=context.rehearse)
        started = time.perf_counter()
        if kind != "bfloat16":
            quantize_backbone(model, kind)
        wait(device)
        taken = time.perf_counter() - started
        peak_gb(device)
        vectors = model.encode(texts[:16], convert_to_tensor=True).float()
        exact = vectors if exact is None else exact
        seconds = seconds_of(lambda: model.encode(texts), device, most=4.0, runs=3)
        context.row(
            kind,
            weights_gb=gigabytes(model),
            quantize_seconds=taken,
            tokens_per_second=count * length / seconds,
            peak_gb=peak_gb(device),
            least_cosine=float((vectors * exact).sum(1).min()),
        )

    for kind in ("bfloat16", "int8", "fp8", "nf4"):
        context.attempt(kind, lambda kind=kind: measure(kind))
        freed(device)
