"""The demo's training run as a `TrainConfig`; ``recipes/demo.yaml`` is the same run as a file.

Stage 1 teaches retrieval with in-batch negatives. Stage 2 blends retrieval with negatives mined by
the stage-1 model, classification by package, and clustering by topic, each with own negatives only.
The sizes of batches, the rates and what is trained depend on the model it starts from (`PRESETS`),
the numbers of steps on the time there is (`budget.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.model.settings import LoraSettings, ModelSettings, PoolingSettings
from nvembed.training.config import OptimizerConfig, StageConfig, TrainConfig
from pydocs.dataset import (
    CLASSIFICATION_INSTRUCTION,
    CLUSTERING_INSTRUCTION,
    RETRIEVAL_INSTRUCTION,
    DatasetLimits,
)

STAGES = ("stage1", "stage2")
MAX_TOKENS = 80
"""Signature, first paragraph and the first arguments; the text beyond costs more than it gives."""


@dataclass(frozen=True)
class Preset:
    """What depends on the model that the demo starts from.

    Args:
        lora: adapters to train; None trains all weights.
        pooling: head to put on; None keeps that of an embedding model.
        batch_sizes: queries of a step, of the two stages.
        learning_rates: of the two stages.
        mined_queries: queries of stage 2; mining embeds each with its document.
        limits: sizes of the data set, which every model of the table embeds.
        searched_chars: documents of the example searches are cut there; None leaves them whole.
        least_steps: of each stage, even where the time does not suffice: fewer teach nothing.
        rehearsed: steps of the rehearsal, and how many records of each set it takes.
        saving_seconds: loading, checkpoints, models and plots, measured on two cores.
        thorough: score after stage 1 too, and search before training too.
    """

    lora: LoraSettings | None
    pooling: PoolingSettings | None
    batch_sizes: tuple[int, int]
    learning_rates: tuple[float, float]
    mined_queries: int
    limits: DatasetLimits
    searched_chars: int | None
    least_steps: int
    rehearsed: tuple[int, int]
    saving_seconds: float
    thorough: bool


SMALL = Preset(
    lora=None,  # at this size adapters would train too little
    pooling=PoolingSettings(kind="latent", num_latents=64, num_heads=4),
    batch_sizes=(128, 32),
    learning_rates=(2e-3, 1e-4),
    mined_queries=4000,
    limits=DatasetLimits(),
    searched_chars=None,
    least_steps=10,
    rehearsed=(4, 256),
    saving_seconds=12.0,
    thorough=True,
)
"""A language model of some millions of parameters."""

LARGE = Preset(
    lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
    pooling=PoolingSettings(kind="latent", num_latents=64, num_heads=1),
    batch_sizes=(32, 8),
    learning_rates=(5e-4, 1e-4),
    mined_queries=300,
    limits=DatasetLimits(
        held_out_documents=400, packages=8, topics=8, max_test_texts=25, max_train_texts=16
    ),
    searched_chars=120,
    least_steps=5,
    rehearsed=(2, 64),
    saving_seconds=25.0,
    thorough=False,
)
"""A language model of a hundred million: a token costs 20 times as much."""

LARGE_TUNED = replace(LARGE, pooling=None, learning_rates=(2e-4, 5e-5))
"""A model of that size that embeds well already."""

SMALL_TUNED = replace(SMALL, pooling=None, learning_rates=(5e-4, 1e-4))
"""A small one that was trained before, by the demo perhaps."""

PRESETS = (SMALL, SMALL_TUNED, LARGE, LARGE_TUNED)

LARGE_WIDTH = 512
"""Hidden size from which a model is large."""


def preset_for(*, width: int, tuned: bool) -> Preset:
    """The preset of a model: its hidden size, and whether it is an embedding model."""
    if width < LARGE_WIDTH:
        return SMALL_TUNED if tuned else SMALL
    return LARGE_TUNED if tuned else LARGE


@dataclass(frozen=True)
class Steps:
    """Optimizer updates of the two stages."""

    stage1: int
    stage2: int


def demo_config(
    *,
    output: str,
    backbone: str,
    steps: Steps,
    preset: Preset = SMALL,
    seed: int = 0,
    data: str = "data",
    max_records: int | None = None,
) -> TrainConfig:
    """Return the demo's run.

    Args:
        output: run folder.
        backbone: folder or hub id of the decoder to start from.
        steps: of the stages.
        preset: what depends on the backbone.
        seed: of the run.
        data: folder of the training records, absolute or relative to the folder of the recipe.
        max_records: use fewer records of each set; for rehearsals.
    """

    def most(limit: int | None) -> int | None:
        return min((n for n in (limit, max_records) if n is not None), default=None)

    return TrainConfig(
        output=output,
        seed=seed,
        model=ModelSettings(
            backbone=backbone,
            max_tokens=MAX_TOKENS,
            pooling=preset.pooling,
        ),
        lora=preset.lora,
        pack_tokens=4096,
        checkpoint_every=100,
        optimizer=OptimizerConfig(weight_decay=0.03, beta2=0.99),
        stages=(
            StageConfig(
                name=STAGES[0],
                steps=steps.stage1,
                batch_size=preset.batch_sizes[0],
                learning_rate=preset.learning_rates[0],
                warmup_steps=min(30, max(1, steps.stage1 // 10)),
                in_batch_negatives=True,
                num_negatives=0,
                temperature=0.03,
            ),
            StageConfig(
                name=STAGES[1],
                steps=steps.stage2,
                batch_size=preset.batch_sizes[1],
                learning_rate=preset.learning_rates[1],
                warmup_steps=min(15, max(1, steps.stage2 // 10)),
                in_batch_negatives=False,
                num_negatives=4,
                temperature=0.03,
                mine=MiningConfig(num_negatives=4),
            ),
        ),
        datasets=(
            DatasetConfig(
                name="pydocs",
                path=f"{data}/retrieval.jsonl",
                kind="retrieval",
                instruction=RETRIEVAL_INSTRUCTION,
                max_records=most(None),
                stages=(1,),
            ),
            DatasetConfig(
                name="pydocs-mined",
                path=f"{data}/retrieval.jsonl",
                kind="retrieval",
                instruction=RETRIEVAL_INSTRUCTION,
                weight=4.0,
                max_records=most(preset.mined_queries),
                stages=(2,),
            ),
            DatasetConfig(
                name="packages",
                path=f"{data}/classification.jsonl",
                kind="classification",
                instruction=CLASSIFICATION_INSTRUCTION,
                weight=1.0,
                stages=(2,),
            ),
            DatasetConfig(
                name="topics",
                path=f"{data}/clustering.jsonl",
                kind="clustering",
                instruction=CLUSTERING_INSTRUCTION,
                weight=1.0,
                stages=(2,),
            ),
        ),
    )
