"""How far do the vectors of a shipped model move with its base: Q4_1 blocks, or the numbers before?

    python benchmarks/base_rounding.py assets/nvembed-smollm2-135m --task ../shared/data/tasks/sts13

The original weights of the base cannot be had without a hub. But of a Q4_1 block (32 numbers on 16
even steps) it is known how far each number was moved at most: by half a step. So the rounding is
undone at random, evenly within half a step, which is what the original is like as far as the blocks
can tell; the distance of the vectors of one such base from those of the blocks is that of the
original, up to chance. `--draws` of them give its spread. Prints the cosines of the vectors of the
task's texts, and its main score with each base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvembed import NVEmbed, evaluate, load_tasks
from nvembed.core.files import read_jsonl
from nvembed.interop.gguf import GgufFile, read_gguf
from nvembed.interop.model_folder import ModelSource, find_base
from nvembed.model import transformer_load

BLOCK, STEPS = 32, 15


def unrounded(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Each number moved within half a step of its block: ``(max − min) / 15`` of 32 numbers."""
    blocks_NB = weight.float().unflatten(-1, (-1, BLOCK))
    step_N1 = (blocks_NB.amax(-1, keepdim=True) - blocks_NB.amin(-1, keepdim=True)) / STEPS
    moved_NB = torch.rand(blocks_NB.shape, generator=generator) - 0.5
    return (blocks_NB + moved_NB * step_N1).flatten(-2).to(weight.dtype)


def with_base_of(draw: int, folder: str) -> NVEmbed:
    """The model on a base whose rounding is undone at random."""
    generator = torch.Generator().manual_seed(draw)
    read = transformer_load.read_tensor

    def changed(file: GgufFile, name: str, dtype: torch.dtype | None = None) -> Tensor:
        weight = read(file, name, dtype)
        return unrounded(weight, generator) if file.tensors[name].kind == "Q4_1" else weight

    transformer_load.read_tensor = changed
    try:
        return NVEmbed.from_pretrained(folder)
    finally:
        transformer_load.read_tensor = read


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--task", type=Path, required=True, help="folder of an STS task")
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    base = find_base(ModelSource(given.model)).gguf
    assert base is not None, "the base is no GGUF file"
    kinds = [tensor.kind for tensor in read_gguf(base).tensors.values()]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
    (task,) = load_tasks([given.task])
    rows = [row for _, row in read_jsonl(given.task / "test.jsonl")]
    texts = [row[key] for row in rows for key in ("sentence1", "sentence2")][:500]
    plain = NVEmbed.from_pretrained(given.model)
    known = plain.encode(texts)
    print(f"blocks: {task.name} {evaluate(plain, [task])[task.name].main_score:.4f}")
    for draw in range(given.draws):
        model = with_base_of(draw, given.model)
        cosines = np.sum(known * model.encode(texts), axis=1)
        score = evaluate(model, [task])[task.name].main_score
        line = f"cosine mean {cosines.mean():.4f}, least {cosines.min():.4f}"
        print(f"draw {draw}: {task.name} {score:.4f}, {line} ({len(texts)} texts)", flush=True)


if __name__ == "__main__":
    main()
