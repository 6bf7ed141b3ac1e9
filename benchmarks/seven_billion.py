"""NV-Embed-v2's shape, 7.85 B parameters, in the memory of this machine: load, encode, measured.

    python benchmarks/seven_billion.py                                       # needs 16 GB of disk
    python benchmarks/seven_billion.py --layers 2 --width 512 --tokens 128   # a rehearsal

writes random bfloat16 weights (15.7 GB in shards of 2 GB, a few megabytes of them in memory) in
NVIDIA's layout, then as a folder that nvembed saves; the first is deleted before the second is
written. Each is loaded in a fresh process per way of holding the weights: bfloat16, int8 and nf4
(``quantize``), int8_products (``dtype="int8"``). Measured are the seconds of loading, the highest
resident memory of the process until then and at the end, what is resident afterwards, the share of
it that no file backs, and tokens/s of ``encode`` at several lengths (median of runs that fit into
``--seconds``, after one). Cosines are to the bfloat16 vectors. Rows are appended to
``OUT/results.jsonl`` as they are found; started again, only missing rows are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gpu
import numpy as np
from peers.job import memory_bytes
from peers.report import say, table

LAYOUTS = ("official", "saved")
HELD = ("bfloat16", "int8", "nf4", "int8_products")
SHARD_BYTES = 2_000_000_000
WRITTEN = "written"  # of a folder whose weights are all there
_LATENTS = "1_LatentAttentionPooling"

# --- A checkpoint ---------------------------------------------------------------------------------


def shape_values(layers: int, width: int) -> dict[str, Any]:
    """``config.json`` of NV-Embed-v2, of another depth or width in the same proportions."""
    from gpu_parts.shapes import official_values

    values = official_values(rehearse=False)
    full = int(values["hidden_size"])
    sizes = ("hidden_dim", "latent_dim", "cross_dim_head")
    heads = max(width // 128, 4)
    values["hidden_size"] = width
    values["latent_attention_config"] |= dict.fromkeys(sizes, width)
    values["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": values["text_config"]["intermediate_size"] * width // full,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if heads >= 8 else 2,
    }
    return values


def random_bytes(name: str, count: int) -> Iterator[memoryview]:
    """So many numbers in bfloat16, a few megabytes at a time: ones for norms, else normal."""
    if name.endswith("bias") or "norm" in name:
        value = 0 if name.endswith("bias") else 0x3F80
        yield memoryview(np.full(count, value, dtype=np.uint16)).cast("B")
        return
    drawn = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    drawn *= 1.0 if "latents" in name else 0.02
    block = np.roll((drawn.view(np.uint32) >> 16).astype(np.uint16), zlib.crc32(name.encode()))
    while count:
        part = block[:count]
        yield memoryview(part).cast("B")
        count -= len(part)


def write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of random weights, which appears when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    growing = path.with_suffix(".growing")
    with open(growing, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            for part in random_bytes(name, math.prod(shape)):
                file.write(part)
    os.replace(growing, path)


def write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Shards and their index; those that are there already stay."""
    shards: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if not shards or size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if not (folder / name).exists():
            write_shard(folder / name, shard)
    found = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {}, "weight_map": found}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(folder: Path, layout: str, layers: int, width: int) -> None:
    """All files of a model; the disk is looked at first."""
    import torch
    from gpu_parts.shapes import random_model
    from load_memory import write_tokenizer

    from nvembed.interop.official import read_config
    from nvembed.model.official_load import empty_modules, official_shapes

    values = shape_values(layers, width)
    decoder, pooling = empty_modules(*read_config(values, where="seven_billion.py"))
    elements = sum(p.numel() for part in (decoder, pooling) for p in part.parameters())
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed, free = 2.02 * elements - there, shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} are free")
    if layout == "official":
        write_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(values))
        write_weights(folder, official_shapes(decoder, pooling))
        return
    # What a small model is saved as, with the settings and the weights of the large one.
    small = random_model(torch.device("cpu"), folder, rehearse=True)
    small.save_pretrained(str(folder), create_model_card=False)
    (folder / "model.safetensors").unlink()
    decoder.config.dtype, decoder.config.is_causal = torch.bfloat16, False
    decoder.config.save_pretrained(folder)
    write_weights(folder, {n: tuple(value.shape) for n, value in decoder.state_dict().items()})
    pooling.save_config(str(folder / _LATENTS))
    inner = {name: tuple(value.shape) for name, value in pooling.state_dict().items()}
    write_shard(folder / _LATENTS / "model.safetensors", inner)


# --- A process that measures ----------------------------------------------------------------------


def measure(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Load and encode; rows of what was found."""
    import torch
    from gpu_parts.shapes import gigabytes, random_texts, seconds_of
    from transformers.models.mistral import modeling_mistral  # noqa: F401

    from nvembed.model.embedder import NVEmbed

    imported = memory_bytes("VmHWM")
    held = job["held"]
    options: dict[str, Any] = {"dtype": "bfloat16"}
    if held == "int8_products":
        options["dtype"] = "int8"
    elif held != "bfloat16":
        options["quantize"] = held
    started = time.perf_counter()
    model = NVEmbed.from_pretrained(job["folder"], device="cpu", **options)
    yield {
        "what": "load",
        "seconds": time.perf_counter() - started,
        "parameters": job["parameters"],
        "weights_gb": gigabytes(model),
        "peak_gb": memory_bytes("VmHWM") / 1e9,
        "imports_gb": imported / 1e9,
        "resident_gb": memory_bytes("VmRSS") / 1e9,
        "anonymous_gb": memory_bytes("RssAnon") / 1e9,
        "threads": torch.get_num_threads(),
    }
    few = model.encode(random_texts(4, 32))
    assert np.isfinite(few).all()
    kept = Path(job["vectors"])
    if held == "bfloat16":
        np.save(kept, few)
    cosine = float((few * np.load(kept)).sum(1).min()) if kept.exists() else None
    for length in job["lengths"]:
        texts = random_texts(max(job["tokens"] // length, 1), length)
        tokens = sum(map(len, model.backbone.tokenize_texts(texts)))
        seconds = seconds_of(
            lambda texts=texts: model.encode(texts),
            torch.device("cpu"),
            most=job["seconds"],
            runs=3,
        )
        yield {
            "what": str(length),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "peak_gb": memory_bytes("VmHWM") / 1e9,
            "least_cosine": cosine,
        }


def child(job: dict[str, Any]) -> None:
    """What a process of its own does: write a checkpoint, or measure it."""
    if job["do"] == "write":
        write_checkpoint(Path(job["folder"]), job["layout"], job["layers"], job["width"])
        return
    about = {key: job[key] for key in ("layout", "held", "layers", "width")}
    for row in measure(job):
        if row["what"] in job["missing"]:
            gpu.add_row(Path(job["out"]), about | row)


# --- All of it ------------------------------------------------------------------------------------


def start(job: dict[str, Any]) -> str | None:
    """Run a job in a fresh process; one line says why it failed."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or ["nothing said"]
    return f"exit {done.returncode} ({'killed: memory?' if done.returncode < 0 else said[-1]})"


def read_rows(out: Path, layers: int, width: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What was found for a shape, by layout, way of holding weights, and what was measured."""
    rows = gpu.read_rows(out) if (out / gpu.RESULTS).exists() else []
    return {
        (row["layout"], row["held"], row["what"]): row
        for row in rows
        if (row["layers"], row["width"]) == (layers, width)
    }


def parameters_of(folder: Path) -> int:
    """Weights of a checkpoint, by the bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) // 2


def run(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    shape = {"layers": given.layers, "width": given.width}
    wanted = ["load", *map(str, given.lengths)]
    for layout in given.layouts:
        folder = (given.work or given.out) / f"{layout}-{given.layers}-{given.width}"
        job = {"layout": layout, "folder": str(folder), "out": str(given.out), **shape}
        job |= {"vectors": str(given.out / f"{folder.name}.npy"), "tokens": given.tokens}
        for held in given.held:
            known = read_rows(given.out, **shape)
            missing = [what for what in wanted if (layout, held, what) not in known]
            if not missing:
                continue
            if not (folder / WRITTEN).exists():
                folder.mkdir(parents=True, exist_ok=True)
                started = time.perf_counter()
                if why := start(job | {"do": "write"}):
                    raise SystemExit(f"{folder}: not written: {why}")
                (folder / WRITTEN).touch()
                say(
                    f"{folder}: {parameters_of(folder):,} parameters written in "
                    f"{time.perf_counter() - started:.0f} s"
                )
            asked = job | {"do": "measure", "held": held, "missing": missing}
            asked |= {"lengths": [int(what) for what in missing if what != "load"]}
            asked |= {"seconds": given.seconds, "parameters": parameters_of(folder)}
            if why := start(asked):
                say(f"{layout}, {held}: {why}")
        if folder.exists() and not given.keep:
            shutil.rmtree(folder)
    show(read_rows(given.out, **shape), given)


def show(found: dict[tuple[str, str, str], dict[str, Any]], given: argparse.Namespace) -> None:
    """The rows as a table."""
    head = ["layout", "held as", "weights, GB", "load, s", "peak, GB", "resident", "not of files"]
    head += [f"tokens/s at {length}" for length in given.lengths] + ["highest, GB", "cosine"]
    lines = []
    for layout in given.layouts:
        for held in given.held:
            load = found.get((layout, held, "load"))
            if load is None:
                continue
            keys = ("weights_gb", "seconds", "peak_gb", "resident_gb", "anonymous_gb")
            cells = [layout, held, *(f"{load[key]:.2f}" for key in keys)]
            rates = [found.get((layout, held, str(length))) for length in given.lengths]
            cells += ["" if rate is None else f"{rate['tokens_per_second']:.1f}" for rate in rates]
            there = [rate for rate in rates if rate is not None]
            cells.append(f"{max(row['peak_gb'] for row in (load, *there)):.2f}")
            cosine = there[0]["least_cosine"] if there else None
            lines.append([*cells, "" if cosine is None else f"{cosine:.4f}"])
    table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=32)
    add("--width", type=int, default=4096)
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    add("--held", nargs="+", choices=(*HELD, "fp8"), default=HELD)
    add("--lengths", type=int, nargs="+", default=[32, 128, 512])
    add("--tokens", type=int, default=512, help="of one call of encode")
    add("--seconds", type=float, default=60.0, help="of one rate, after the first call")
    add("--out", type=Path, default=Path("runs/seven-billion"))
    add("--work", type=Path, help="where checkpoints lie meanwhile (default: --out)")
    add("--keep", action="store_true", help="leave checkpoints on the disk")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        child(given.job)
    else:
        run(given)


if __name__ == "__main__":
    main()
