"""The demo's training run as a `TrainConfig`; ``recipes/demo.yaml`` is the same run as a file.

Stage 1 teaches retrieval with in-batch negatives. Stage 2 blends retrieval with negatives mined by
the stage-1 model, classification by package, and clustering by topic, each with own negatives only.
Only the numbers of steps depend on the time there is (`budget.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.model.settings import ModelSettings, PoolingSettings
from nvembed.training.config import OptimizerConfig, StageConfig, TrainConfig
from pydocs.dataset import (
    CLASSIFICATION_INSTRUCTION,
    CLUSTERING_INSTRUCTION,
    RETRIEVAL_INSTRUCTION,
)

STAGES = ("stage1", "stage2")
MAX_TOKENS = 80
"""Signature, first paragraph and the first arguments; the text beyond costs more than it gives."""

MINED_QUERIES = 4000
"""Queries of stage 2: mining embeds each with its document, so they have to be few."""


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
    seed: int = 0,
    data: str = "data",
    max_records: int | None = None,
) -> TrainConfig:
    """Return the demo's run.

    Args:
        output: run folder.
        backbone: folder or hub id of the decoder to start from.
        steps: of the stages.
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
            pooling=PoolingSettings(kind="latent", num_latents=64, num_heads=4),
        ),
        lora=None,
        pack_tokens=4096,
        checkpoint_every=100,
        optimizer=OptimizerConfig(weight_decay=0.03, beta2=0.99),
        stages=(
            StageConfig(
                name=STAGES[0],
                steps=steps.stage1,
                batch_size=128,
                learning_rate=2e-3,
                warmup_steps=min(30, max(1, steps.stage1 // 10)),
                in_batch_negatives=True,
                num_negatives=0,
                temperature=0.03,
            ),
            StageConfig(
                name=STAGES[1],
                steps=steps.stage2,
                batch_size=32,
                learning_rate=1e-4,
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
                max_records=most(MINED_QUERIES),
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
