"""``SentenceTransformerTrainer`` on the stock model, with the options that are tuned for it.

Options: ``cached`` (gradient cache), ``mini_batch_size`` (of the cache), ``merge`` (one forward for
all document columns, its default), ``attention`` (``sdpa`` or ``eager``), ``frozen`` (the type that
weights without gradient are held in; float32 ones are rounded in every product of a bfloat16 run),
``workers`` (processes that tokenise ahead). It has a third way, texts joined without padding, for
flash attention alone, which transformers allows on a GPU only.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.data import SequentialSampler

from peers.hf_clock import COMMON, StepClock, record_losses
from peers.job import Job, Outcome, memory_bytes, trainer_main


def load(job: Job) -> SentenceTransformer:
    """The stock model with our adapter on it."""
    model = SentenceTransformer(
        str(job.model("stock")),
        device="cpu",
        local_files_only=True,
        model_kwargs={
            "attn_implementation": job.options.get("attention", "sdpa"),
            "dtype": job.options.get("frozen", "float32"),
        },
    )
    model.max_seq_length = job.max_tokens
    model.load_adapter(str(job.model("adapter")), is_trainable=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == torch.float32 or not parameter.requires_grad, name
    return model


def in_order(dataset: Dataset, *, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """Batch sampler that keeps our order."""
    return DefaultBatchSampler(
        SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last
    )


def run(job: Job) -> Outcome:
    torch.set_num_threads(job.threads)
    model = load(job)
    columns = job.columns()
    scale = 1 / job.temperature
    loss: torch.nn.Module
    if job.options.get("cached"):
        size = job.options.get("mini_batch_size", 32)
        loss = CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=size)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=scale)
    losses, clock = record_losses(loss), StepClock()
    with tempfile.TemporaryDirectory() as output:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            batch_sampler=in_order,
            prompts={"query": job.prompt},
            bf16=job.dtype == "bfloat16",
            dataloader_num_workers=job.options.get("workers", 0),
            **COMMON,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=loss,
            callbacks=[clock],
        )
        loaded = memory_bytes()
        with nullcontext() if job.options.get("merge", True) else column_merging_disabled():
            trainer.train()
    assert len(losses) == job.steps, (len(losses), job.steps)
    return Outcome([float(value) for value in losses], clock.seconds, loaded_bytes=loaded)


if __name__ == "__main__":
    trainer_main(run)
