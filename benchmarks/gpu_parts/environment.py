"""What the machine is: versions, memory, and how fast it multiplies and copies."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess

import psutil
import torch
from gpu import Context

# What some part needs besides what all of them need.
PACKAGES = (
    *("torch", "transformers", "sentence-transformers", "peft", "accelerate", "safetensors"),
    *("tokenizers", "pydantic", "psutil", "httpx2", "jinja2", "rich", "typer", "triton", "pytest"),
    *("fastapi", "starlette", "uvicorn", "httptools", "orjson", "prometheus-client"),
    *("torchao", "bitsandbytes", "gguf"),
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def driver() -> str:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.mem",
        "--format=csv,noheader",
    ]
    done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def fp8_ceiling(device: torch.device) -> float:
    """Operations per second of a product in E4M3 with one scale per matrix."""
    from gpu_parts.shapes import seconds_of

    size = 8192 if device.type == "cuda" else 64
    kind = torch.float8_e4m3fn
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    one = torch.ones((), device=device)

    def multiply() -> None:
        for _ in range(8):
            torch._scaled_mm(left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return 8 * 2.0 * size**3 / seconds_of(multiply, device, most=1.0)


def copies(device: torch.device) -> dict[str, float]:
    """Gigabytes per second: read and written within the device, and from the host to it."""
    from gpu_parts.shapes import seconds_of

    count = 2**31 if device.type == "cuda" else 2**20
    source = torch.randint(255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    within = 2 * count / seconds_of(lambda: target.copy_(source), device, most=1.0)
    host = torch.empty(count // 4, dtype=torch.uint8)
    to_it = count / 4 / seconds_of(lambda: host.to(device, copy=True), device, most=1.0)
    return {"within_gb_s": within / 1e9, "from_host_gb_s": to_it / 1e9}


def run(context: Context) -> None:
    context.row("packages", **{name: version(name) for name in PACKAGES})
    context.row(
        "host",
        cpus=os.cpu_count() or 1,
        memory_gb=psutil.virtual_memory().total / 1e9,
        disk_free_gb=shutil.disk_usage(context.work).free / 1e9,
    )
    # Only now: they need most of these packages.
    from gpu_parts.shapes import device_of, products_ceiling

    device = device_of(context.rehearse)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        context.row(
            "device",
            name=about.name,
            memory_gb=about.total_memory / 1e9,
            multiprocessors=about.multi_processor_count,
            cuda=str(torch.version.cuda),
        )
        if (found := context.attempt("driver", driver)) is not None:
            context.row("driver", driver_clocks=found)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        context.row("products", kind=name, tflops=products_ceiling(device, dtype) / 1e12)
    if (rate := context.attempt("products in fp8", lambda: fp8_ceiling(device))) is not None:
        context.row("products", kind="fp8", tflops=rate / 1e12)
    context.row("copies", **copies(device))
