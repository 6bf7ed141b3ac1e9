"""Peak memory of loading a checkpoint in NVIDIA's layout, against the bytes of its weights.

    python benchmarks/load_memory.py

writes a synthetic float16 checkpoint of about 3 GB (sharded, official names) to a temporary folder,
loads it in fresh processes in bfloat16 and in float32, and reports the peak resident memory of each
process less that of one which only imports. Target: at most 1.15 times the bytes in the wanted
dtype. `--scale` makes it smaller. Everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TARGET = 1.15
SHARD_BYTES = 1_000_000_000

_CHILD = """
import resource, sys, time
from nvembed.model.embedder import NVEmbed
import torch, transformers.models.mistral.modeling_mistral
folder, dtype = sys.argv[1:]
started = time.perf_counter()
if dtype != "import":
    model = NVEmbed.from_pretrained(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
seconds = time.perf_counter() - started
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds)
"""


def config(scale: float) -> dict[str, object]:
    """Shape of NV-Embed-v2 at half the width and half the depth, or less."""
    width = 2048
    latent = {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": width}
    return {
        "model_type": "nvembed",
        "hidden_size": width,
        "latent_attention_config": {**latent, "hidden_dim": width, "latent_dim": width},
        "text_config": {
            "model_type": "bidir_mistral",
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": 7168,
            "num_hidden_layers": max(1, round(24 * scale)),
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 10000.0,
        },
    }


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer of one token per byte, which puts BOS in front as the official one does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_checkpoint(folder: Path, scale: float) -> int:
    """Write configuration, a byte tokenizer and random weights; return the number of parameters."""
    import torch

    from nvembed.interop.official import read_config
    from nvembed.interop.weights import write_shards
    from nvembed.model.official_load import empty_modules, official_shapes

    values = config(scale)
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder)
    block = (0.02 * torch.randn(1 << 22)).half()  # drawing every weight would take minutes

    def weights(name: str) -> torch.Tensor:
        size = math.prod(shapes[name])
        return block.repeat(-(-size // block.numel()))[:size].reshape(shapes[name]).contiguous()

    shapes = official_shapes(*empty_modules(*read_config(values, where="config.json")))
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    write_shards(folder, shapes, sizes, weights, max_bytes=SHARD_BYTES)
    return sum(math.prod(shape) for shape in shapes.values())


def measure(folder: Path, dtype: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of a fresh process."""
    command = [sys.executable, "-c", _CHILD, str(folder), dtype]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, seconds = done.stdout.split()
    return int(peak), float(seconds)


def rows(scale: float) -> Iterator[str]:
    """The lines of the report."""
    with tempfile.TemporaryDirectory(prefix="nvembed-load-") as name:
        folder = Path(name)
        started = time.perf_counter()
        # In its own process: a child's peak starts at the memory of the parent it was forked from.
        command = [sys.executable, __file__, "--scale", str(scale), "--write", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        parameters = int(done.stdout)
        shards = len(list(folder.glob("*.safetensors")))
        yield (
            f"{parameters:,} parameters, {2 * parameters / 1e9:.2f} GB of float16 in {shards} "
            f"shards, written in {time.perf_counter() - started:.0f} s"
        )
        base, _ = measure(folder, "import")
        yield f"only imports: peak {base / 1e9:.2f} GB"
        for dtype, width in (("bfloat16", 2), ("float32", 4)):
            peak, seconds = measure(folder, dtype)
            ratio = (peak - base) / (width * parameters)
            yield (
                f"float16 -> {dtype}: peak {peak / 1e9:.2f} GB, less imports "
                f"{(peak - base) / 1e9:.2f} GB = {ratio:.3f} x {width * parameters / 1e9:.2f} GB "
                f"of weights (target {TARGET}); {seconds:.1f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 24 layers")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        print(write_checkpoint(arguments.write, arguments.scale))
        return
    for row in rows(arguments.scale):
        print(row, flush=True)


if __name__ == "__main__":
    main()
