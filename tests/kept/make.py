"""Make files that later commits must be able to read: ``python tests/kept/make.py FOLDER``.

Run it at the commit whose files are to be kept (with ``src`` and ``tests`` on PYTHONPATH), zip the
folder and name the archive after the commit. ``tests/integration/test_kept_files.py`` reads them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import conftest
from interruption import interrupt_after
from nvembed import NVEmbed
from nvembed.cli.main import run

RECIPE = """\
output: run
seed: 0
model: {backbone: decoder, max_tokens: 32, pooling: {kind: latent, num_latents: 2, num_heads: 2}}
lora: {rank: 2, alpha: 4}
precision: float32
pack_tokens: 128
memory_gb: 1.0
checkpoint_every: 2
datasets:
  - {name: pairs, path: pairs.jsonl, kind: retrieval, instruction: find, stages: [1, 2]}
  - {name: classes, path: classes.jsonl, kind: classification, instruction: sort, stages: [2]}
stages:
  - {name: one, steps: 4, batch_size: 8, learning_rate: 1.0e-3, in_batch_negatives: true,
     num_negatives: 1}
  - {name: two, steps: 4, batch_size: 8, learning_rate: 1.0e-3, in_batch_negatives: false,
     num_negatives: 2}
"""
BUILD = """\
output: run-built
model: {backbone: decoder, max_tokens: 32, pooling: {kind: mean}}
build: {folder: built, mine: {teacher: bm25, strategy: top_k, num_negatives: 2}}
datasets:
  - {name: pairs, path: pairs.jsonl, kind: retrieval, instruction: find, stages: [1]}
  - {name: classes, path: classes.jsonl, kind: classification, instruction: sort, stages: [1]}
stages:
  - {name: one, steps: 1, batch_size: 8, learning_rate: 1.0e-3, in_batch_negatives: true,
     num_negatives: 1}
"""
NAMES = [f"{'very ' * (i % 5)}{word}" for i, word in enumerate("abcdefghijklmnopqrstuvwx")]
TEXTS = ["what is very a", "b it is", "a text that nobody has seen"]


def command(*arguments: str) -> None:
    assert run(list(arguments)) == 0, arguments


def write_lines(name: str, rows: list[dict[str, object]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir()
    os.chdir(folder)
    tokenizer = conftest.tiny_tokenizer.__wrapped__()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        initializer_range=0.1,
    )
    MistralForCausalLM(config).save_pretrained("decoder")
    tokenizer.save_pretrained("decoder")
    pairs = enumerate(NAMES)
    write_lines(
        "pairs.jsonl",
        [
            {"query": f"what is {name}", "positive": f"{name} it is", "negative": [NAMES[i - 3]]}
            for i, name in pairs
        ],
    )
    labels = ("one", "two")
    classes = [{"text": f"{name} {label}", "label": label} for name in NAMES for label in labels]
    write_lines("classes.jsonl", classes)
    documents = [
        {"id": f"d{i}", "text": f"{name} it is", "year": 2000 + i} for i, name in enumerate(NAMES)
    ]
    write_lines("docs.jsonl", documents)
    Path("recipe.yaml").write_text(RECIPE, "utf-8")
    Path("build.yaml").write_text(BUILD, "utf-8")
    command("train", "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 5)
        assert run(["train", "recipe.yaml", "output=open-run"]) == 2
    model = NVEmbed.from_pretrained("run/model")
    query = model.encode(TEXTS[:1], prompt="Instruct: find\nQuery: ")
    np.save("vectors.npy", np.concatenate([query, model.encode(TEXTS[1:])]))
    Path("texts.json").write_text(json.dumps(TEXTS), "utf-8")
    options = ("--model", "run/model", "--dtype", "float32")
    command("index", "docs.jsonl", "--to", "docs.db", *options)
    output = ("--input", "docs.jsonl", "--output", "docs.parquet")
    command("encode", "run/model", *output, "--dtype", "float32")
    command("data", "build", "build.yaml")


if __name__ == "__main__":
    main()
