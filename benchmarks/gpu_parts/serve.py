"""The server under load, with a small model beside a plain handler and with the 7.85 B shape."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import serve_peers
from gpu import Context
from peers.bench import Side
from peers.models import Models

from gpu_parts.encode import CHECKPOINT, COMPLETE
from gpu_parts.shapes import device_of

ROOT = Path(__file__).resolve().parents[2]
_OPTIONS = Namespace(settings=[], venvs=Path())
_PORT = 18600


def measure(context: Context, name: str, side: Side, folder: Path, port: int) -> None:
    """Start a server and raise the number of its clients; a failure is a row."""
    context.attempt(name, lambda: levels(context, name, side, folder, port))


def levels(context: Context, name: str, side: Side, folder: Path, port: int) -> None:
    few = context.rehearse
    process = serve_peers.start(side, folder, port, _OPTIONS)
    try:
        serve_peers.run_load(port, 4, 1.0)  # warm
        for clients in (2,) if few else (1, 16, 128):
            found = serve_peers.run_load(port, clients, 1.0 if few else 2.5)
            statuses = found.pop("statuses")
            context.row(name, clients=clients, **found, answers=statuses.get("200", 0))
    finally:
        process.kill()
        process.wait()


def run(context: Context) -> None:
    device = device_of(context.rehearse)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    small = context.work / "small"
    small.mkdir(exist_ok=True)
    base = str(ROOT / "assets" / "decoder-6m") if context.rehearse or not context.base else None
    Models(base or context.base, small).need("ours", "stock")
    ours, plain = Side(serve_peers.OURS, dtype), Side(serve_peers.PLAIN, dtype)
    measure(context, "nvembed, small", ours, small, _PORT)
    checkpoint = context.work / CHECKPOINT
    if (checkpoint / COMPLETE).exists():
        large = context.work / "large"
        large.mkdir()
        (large / "ours").symlink_to(checkpoint)
        measure(context, "nvembed, 7.85 B", Side(serve_peers.OURS, "bfloat16"), large, _PORT + 1)
    else:
        context.row("nvembed, 7.85 B", failed="the part encode left no checkpoint")
    measure(context, "sentence-transformers, small", plain, small, _PORT + 2)
