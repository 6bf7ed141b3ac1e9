"""Attention against plain maths on the CPU, then the tests that are marked ``gpu``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from gpu import Context
from torch import Tensor, nn

from gpu_parts.shapes import device_of, products_ceiling, seconds_of
from nvembed.model.attention import flat_attention
from nvembed.model.packing import Segments

ROOT = Path(__file__).resolve().parents[2]
HEADS, KEY_HEADS, WIDTH = 32, 8, 128
LENGTHS = (512, 300, 300, 33, 8, 1)
LARGEST_ERROR = 1e-2  # ‖ours − exact‖ / ‖exact‖: of bfloat16 it is between 1e-3 and 1e-2


def difference(found: Tensor, exact: Tensor) -> float:
    """Relative error; not a number is infinite."""
    ratio = float((found.double().cpu() - exact).norm() / exact.norm())
    return ratio if ratio == ratio else float("inf")


def parity(device: torch.device, lengths: tuple[int, ...], *, causal: bool) -> dict[str, float]:
    """Errors of the output and of the three gradients, of fresh random inputs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from oracles.attention import attend

    heads = [HEADS, KEY_HEADS, KEY_HEADS]
    plain = [torch.randn(n, sum(lengths), WIDTH).bfloat16() for n in heads]
    ours = [x.to(device).requires_grad_() for x in plain]
    exact = [x.double().requires_grad_() for x in plain]
    found, _ = flat_attention(
        nn.Identity(),
        *(x[None] for x in ours),
        None,
        segments=Segments.of_lengths(lengths, device=device),
        causal=causal,
    )
    expected = attend(*exact, lengths, WIDTH**-0.5, causal=causal)
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((found[0] * weight.to(found)).sum(), ours)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    errors = {"output": difference(found[0].detach(), expected.detach())}
    names = ("query", "key", "value")
    return errors | {n: difference(g, w) for n, g, w in zip(names, got, wanted, strict=True)}


def speed(device: torch.device, length: int, tokens: int) -> dict[str, float]:
    """Of attention alone, forward, in texts of one length."""
    lengths = (length,) * (tokens // length)
    segments = Segments.of_lengths(lengths, device=device)
    inputs = [
        torch.randn(1, heads, sum(lengths), WIDTH, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]

    def attend() -> None:
        flat_attention(nn.Identity(), *inputs, None, segments=segments, causal=False)

    with torch.inference_mode():
        seconds = seconds_of(attend, device, most=1.0)
    rate = 4.0 * HEADS * WIDTH * sum(length**2 for length in lengths) / seconds
    return {"milliseconds": 1000 * seconds, "tflops": rate / 1e12}


def marked_tests(seconds: float) -> dict[str, object]:
    """The outcome of pytest, and its last lines where something failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/integration/test_gpu.py"]
    command += ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "default"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    print(done.stdout, done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.split("\n\n")[-1])
    failed = [line[:200] for line in done.stdout.splitlines() if line.startswith(("FAILED", "E "))]
    return {"code": done.returncode, **{kind: int(n) for n, kind in counts}, "failures": failed[:8]}


def run(context: Context) -> None:
    device = device_of(context.rehearse)
    lengths = (9, 4, 4, 1) if context.rehearse else LENGTHS
    for causal in (False, True):
        errors = parity(device, lengths, causal=causal)
        good = max(errors.values()) < LARGEST_ERROR
        context.row("parity", causal=causal, within=good, **errors)
    tokens = 64 if context.rehearse else 16384
    ceiling = products_ceiling(device)
    for length in (8, 32) if context.rehearse else (32, 128, 512, 4096):
        found = speed(device, length, tokens)
        context.row("speed", length=length, **found, of_ceiling=1e12 * found["tflops"] / ceiling)
    tests = context.attempt("tests", lambda: marked_tests(max(5.0, context.left() - 5.0)))
    if tests is not None:
        context.row("tests", **tests)
