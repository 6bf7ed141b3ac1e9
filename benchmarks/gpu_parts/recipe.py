"""SmolLM2-135M's recipe for the seconds that are left; adapters and head come back in pieces.

The steps are scaled so that they fit, by a few steps that are timed first. Should they not, the run
is asked to stop in time and its checkpoint comes back instead.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu import Context
from quantization import lines_of_documents

from gpu_parts.shapes import device_of
from nvembed.core.errors import TrainingError
from nvembed.core.files import write_jsonl
from nvembed.core.runs import RunFolder
from nvembed.training.checkpoint import WEIGHTS, latest_checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
PIECE_BYTES = 15 * 2**20  # what comes back from a lent machine is often limited by file
_RESERVE = 20.0  # seconds for a checkpoint and the pieces
_TRUST = 0.7  # of what the timed steps promise


def random_base(folder: Path, *, rehearse: bool) -> str:
    """A decoder of SmolLM2-135M's shape, or a tiny one, with the tokenizer of the small decoder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    width, inner, layers, heads, keys, vocabulary = (
        (64, 128, 2, 4, 2, 8192) if rehearse else (576, 1536, 30, 9, 3, 49152)
    )
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaModel(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "decoder-6m").save_pretrained(folder)
    return str(folder)


def data_sets(values: dict[str, Any], folder: Path | None, work: Path) -> list[dict[str, Any]]:
    """The sets whose files lie in the folder; without one, each line and the line after it."""
    if folder is not None:
        files = {path.name.split(".")[0]: path for path in sorted(folder.rglob("*.jsonl*"))}
        return [
            each | {"path": str(files[key].absolute())}
            for each in values["datasets"]
            for key in [name for name in names_of(each) if name in files][:1]
        ]
    lines = lines_of_documents()
    pairs = itertools.pairwise(lines)
    write_jsonl(work / "lines.jsonl", ({"query": a, "positive": [b]} for a, b in pairs))
    path = str(work / "lines.jsonl")
    return [
        {"name": "lines", "path": path, "kind": "retrieval", "instruction": "Find what follows"}
    ]


def names_of(dataset: dict[str, Any]) -> list[str]:
    """What the file of a set may be called: by the set's name, as built ones are, or as its own."""
    return [dataset["name"], Path(dataset["path"]).name.split(".")[0]]


def settings(context: Context, base: str) -> TrainConfig:
    """The recipe, without what is not at hand."""
    values = yaml.safe_load(RECIPE.read_text("utf-8"))
    values |= {"output": str(context.work / "run"), "build": None, "checkpoint_every": 200}
    values["model"]["backbone"] = base
    values["datasets"] = data_sets(values, context.data, context.work)
    del values["memory_gb"]
    values["pack_tokens"] = 1024 if context.rehearse else 16384
    if context.teacher is None:
        values["datasets"] = [each for each in values["datasets"] if each["kind"] != "text"]
    kinds = {each["kind"] for each in values["datasets"]}
    if context.data is None:  # lines have no negatives of their own, which the second stage needs
        values["stages"] = values["stages"][:1]
    for stage in values["stages"]:
        if context.teacher is None:
            stage.pop("teacher", None)
        else:
            stage["teacher"]["model"] = context.teacher
        if "sts" not in kinds:
            stage.pop("cosent", None)
        if context.rehearse:
            stage |= {"steps": 4, "batch_size": 4, "warmup_steps": 1}
    count = len(values["stages"])
    for each in values["datasets"]:
        each["stages"] = [n for n in each.get("stages", [1]) if n <= count]
    return TrainConfig.model_validate(values)


def scaled(config: TrainConfig, share: float) -> TrainConfig:
    """With a share of the steps, in the recipe's proportions."""
    counts = [max(2, int(stage.steps * share)) for stage in config.stages]
    stages = tuple(
        stage.model_copy(update={"steps": steps, "warmup_steps": max(1, steps // 20)})
        for stage, steps in zip(config.stages, counts, strict=True)
    )
    return config.model_copy(update={"stages": stages})


def pieces(source: Path, extra: list[Path], out: Path, work: Path) -> list[str]:
    """Pack a folder or file into ``model.tar.00``, ``model.tar.01`` and so on."""
    whole = work / "model.tar"
    with tarfile.open(whole, "w") as archive:
        for path in (source, *extra):
            archive.add(path, arcname=path.name)
    names = []
    with open(whole, "rb") as file:
        while part := file.read(PIECE_BYTES):
            names.append(f"model.tar.{len(names):02d}")
            (out / names[-1]).write_bytes(part)
    return names


def run(context: Context) -> None:
    device_of(context.rehearse)
    base = context.base or random_base(context.work / "base", rehearse=context.rehearse)
    config = settings(context, base)
    started = time.monotonic()
    whole = dry_run(config, base_dir=ROOT).seconds
    starting = time.monotonic() - started  # the run reads its data and loads its model again
    room = _TRUST * (context.left() - _RESERVE - starting)
    config = scaled(config, (4.0 if context.rehearse else room) / whole)
    steps = sum(stage.steps for stage in config.stages)
    context.row(
        "plan", steps=steps, recipe_seconds=whole, starting=starting, sets=len(config.datasets)
    )
    stop = threading.Timer(context.left() - _RESERVE, os.kill, (os.getpid(), signal.SIGTERM))
    stop.daemon = True
    stop.start()
    try:
        train(config, base_dir=ROOT)
        ended = "all steps"
    except TrainingError as error:
        ended = str(error)
    stop.cancel()
    done = RunFolder(Path(config.output))
    rows = [row for row in done.read_metrics() if "loss" in row]
    tokens = sum(row["tokens"] for row in rows)
    few = max(1, min(20, len(rows) // 4))
    context.row(
        "trained",
        base=context.base or "random weights",
        ended=ended,
        steps=len(rows),
        tokens=tokens,
        seconds=sum(row["seconds"] for row in rows),
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in rows),
        first_loss=statistics.fmean(row["loss"] for row in rows[:few]),
        last_loss=statistics.fmean(row["loss"] for row in rows[-few:]),
        recomputed=statistics.fmean(row["recomputed"] for row in rows),
    )
    last = latest_checkpoint(done.checkpoints, log=print)
    source = done.adapter if done.adapter.exists() else last and last / WEIGHTS
    if source is not None:
        extra = [done.path / "metrics.jsonl", done.path / "config.yaml"]
        names = pieces(source, [path for path in extra if path.exists()], context.out, context.work)
        context.row("model", files=", ".join(names), unpack="cat model.tar.* | tar x")
