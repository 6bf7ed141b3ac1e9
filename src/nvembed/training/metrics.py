"""What a run says of itself: a line per stage and a row per step."""

from __future__ import annotations

from typing import Any

from nvembed.data.batch import effective_negatives
from nvembed.training.config import StageConfig
from nvembed.training.feed import Feed
from nvembed.training.step import StepResult


def describe(stage: StageConfig, feed: Feed) -> str:
    """One line that says what a stage will do."""
    sizes = ", ".join(f"{source.name} {len(source):,}" for source in feed.mixture.sources)
    return (
        f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} queries; "
        f"in-batch negatives {'on' if stage.in_batch_negatives else 'off'}; "
        f"effective negatives per query {effective_negatives(feed.batch(0)):.1f}; data: {sizes}"
    )


def metrics_row(
    stage: StageConfig,
    step: int,
    norm: float,
    share: float,
    temperature: float,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
    """The numbers of a step, as they go to ``metrics.jsonl`` and to the trackers.

    Args:
        stage: of the step.
        step: number of the update, from 1.
        norm: of the gradient before it was clipped.
        share: of the peak learning rate.
        temperature: after the step.
        result: of the step.
        seconds: it took.
    """
    statistics = result.statistics
    return {
        "step": step,
        "stage": stage.name,
        "loss": result.loss,
        "learning_rate": stage.learning_rate * share,
        "grad_norm": norm,
        "temperature": temperature,
        "positive_similarity": statistics.positive_similarity,
        "margin": statistics.margin,
        "accuracy": statistics.accuracy,
        "effective_negatives": result.effective_negatives,
        "texts": result.num_texts,
        "tokens": result.num_tokens,
        "padding": 0.0,
        "duplicates": result.duplicates,
        "recomputed": result.recomputed,
        "seconds": seconds,
        "tokens_per_second": result.num_tokens / seconds,
    }
