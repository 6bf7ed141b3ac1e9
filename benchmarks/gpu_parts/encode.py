"""The 7.85 B shape: encode texts of several lengths, folded latents, a checkpoint on the disk."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import Context
from numpy.typing import NDArray

from gpu_parts.shapes import (
    device_of,
    forward_operations,
    freed,
    gigabytes,
    official_values,
    peak_gb,
    products_ceiling,
    random_model,
    random_texts,
    seconds_of,
    wait,
)
from nvembed.interop.weights import write_shards
from nvembed.model.embedder import NVEmbed
from nvembed.model.official_load import official_shapes
from nvembed.model.packs import CUDA_PACK_TOKENS

SHARD_BYTES = 2_000_000_000
CHECKPOINT = "seven"  # below the folder of the run: the server loads it too
COMPLETE = "complete"


def encode_rates(context: Context, model: NVEmbed, device: torch.device) -> None:
    """Tokens per second of ``encode``, tokenising included, and their share of the ceiling."""
    ceiling = products_ceiling(device)
    tokens = 512 if context.rehearse else 4 * CUDA_PACK_TOKENS
    for length in (16, 64) if context.rehearse else (32, 128, 512, 4096):
        texts = random_texts(tokens // length, length)
        lengths = list(map(len, model.backbone.tokenize_texts(texts)))
        peak_gb(device)
        seconds = seconds_of(lambda texts=texts: model.encode(texts), device, most=5.0, runs=3)
        context.row(
            "encode",
            length=length,
            texts=len(texts),
            tokens_per_second=sum(lengths) / seconds,
            texts_per_second=len(texts) / seconds,
            of_ceiling=forward_operations(model, lengths) / seconds / ceiling,
            peak_gb=peak_gb(device),
        )


@torch.inference_mode()
def folded_against_plain(context: Context, model: NVEmbed, device: torch.device) -> None:
    """The latent attention of one pack in both forms, and how far they are apart."""
    layer, tokens = model.pooling.layer, 64 if context.rehearse else CUDA_PACK_TOKENS
    hidden_TD = torch.randn(tokens, model.dimension, device=device, dtype=torch.bfloat16)
    plain = seconds_of(lambda: layer.attend_plain(hidden_TD), device, most=2.0)
    fold = seconds_of(layer.fold, device, most=1.0)
    with layer.fixed_weights(fold_now=True):
        folded = seconds_of(lambda: layer.attend_folded(hidden_TD), device, most=2.0)
        ours = layer.attend_folded(hidden_TD).float()
    exact = layer.attend_plain(hidden_TD).float()
    context.row(
        "latent attention",
        tokens=tokens,
        plain_ms=1000 * plain,
        folded_ms=1000 * folded,
        fold_ms=1000 * fold,
        difference=float((ours - exact).norm() / exact.norm()),
    )


class TooSlowError(RuntimeError):
    """Writing would take more time than there is."""


def write(model: NVEmbed, folder: Path, values: dict[str, Any], seconds: float) -> None:
    """Write the weights in NVIDIA's layout, sharded; gives up early where that takes too long."""
    whole = torch.nn.ModuleList([torch.nn.ModuleDict({"model": model.backbone.model}), model[1]])
    shapes = official_shapes(model.backbone.model, model[1])
    weights = dict(zip(shapes, whole.state_dict().values(), strict=True))
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    if shutil.disk_usage(folder).free < 1.2 * sum(sizes.values()):
        raise TooSlowError("the disk has no room for it")
    started, done = time.perf_counter(), 0

    def tensor(name: str) -> torch.Tensor:
        nonlocal done
        spent = time.perf_counter() - started
        if done > SHARD_BYTES and spent * sum(sizes.values()) / done > seconds:
            raise TooSlowError(f"{done / 1e9:.1f} GB took {spent:.0f} s")
        done += sizes[name]
        return weights[name].cpu()

    (folder / "config.json").write_text(json.dumps(values))
    write_shards(folder, shapes, sizes, tensor, max_bytes=SHARD_BYTES)
    (folder / COMPLETE).touch()


def measured(context: Context, device: torch.device, folder: Path) -> NDArray[np.float32] | None:
    """Make the shape, measure, write; vectors of a few texts where it was written."""
    started = time.perf_counter()
    model = random_model(device, folder, rehearse=context.rehearse)
    wait(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - started
    context.row("made", parameters=parameters, gigabytes=gigabytes(model), seconds=seconds)
    encode_rates(context, model, device)
    folded_against_plain(context, model, device)
    expected = model.encode(random_texts(4, 32))
    values = official_values(context.rehearse)
    started = time.perf_counter()
    # Reading it back takes time as well.
    room = 0.5 * context.left()
    context.attempt("write", lambda: write(model, folder, values, room))
    if not (folder / COMPLETE).exists():
        shutil.rmtree(folder)
        return None
    context.row("write", seconds=time.perf_counter() - started, gigabytes=gigabytes(model))
    return expected


def run(context: Context) -> None:
    device = device_of(context.rehearse)
    folder = context.work / CHECKPOINT
    expected = measured(context, device, folder)
    if expected is None:
        return
    freed(device)
    peak_gb(device)
    started = time.perf_counter()
    loaded = NVEmbed.from_pretrained(folder, device=str(device), dtype="bfloat16")
    wait(device)
    context.row(
        "load",
        seconds=time.perf_counter() - started,
        peak_gb=peak_gb(device),
        same_vectors=bool(np.array_equal(loaded.encode(random_texts(4, 32)), expected)),
        remark="files are in the page cache",
    )
