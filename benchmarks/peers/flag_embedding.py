"""FlagEmbedding's own runner for decoder-only models, in an interpreter that has it.

It has no option to leave the prompt out of mean pooling, and its tokenizer loses BOS: both are set
right, nothing else is changed. Option: ``sub_batch_size`` (texts per forward; ``None`` is one
forward for all documents).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from FlagEmbedding.finetune.embedder.decoder_only.base import (
    DecoderOnlyEmbedderDataArguments,
    DecoderOnlyEmbedderModelArguments,
    DecoderOnlyEmbedderRunner,
    DecoderOnlyEmbedderTrainingArguments,
)
from tokenizers import Tokenizer

from peers.hf_clock import COMMON, StepClock, record_losses
from peers.job import Job, Outcome, memory_bytes, trainer_main


def leave_prompt_out(model: Any, prompt_tokens: int) -> None:
    """Pool queries from behind their prompt; they are encoded first in every step."""
    pool, encode = model._sentence_embedding, model.encode
    calls = {"encode": 0}

    def counted(features: Any) -> Any:
        calls["encode"] += 1
        return encode(features)

    def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if calls["encode"] % 2:  # queries
            mask = mask * (mask.cumsum(1) > prompt_tokens)
        result: torch.Tensor = pool(hidden, mask)
        return result

    model.encode, model._sentence_embedding = counted, pooled


def keep_bos(tokenizer: Any, stock: Path) -> None:
    """Put BOS back: asking for an EOS, as the runner does, leaves no other special token."""
    saved = Tokenizer.from_file(str(stock / "tokenizer.json"))
    tokenizer.backend_tokenizer.post_processor = saved.post_processor


def write_records(job: Job, path: Path) -> None:
    """The data in FlagEmbedding's layout."""
    columns = job.columns()
    negatives = [columns[name] for name in columns if name.startswith("negative")]
    with open(path, "w", encoding="utf-8") as out:
        for row, (query, positive) in enumerate(
            zip(columns["query"], columns["positive"], strict=True)
        ):
            record = {"query": query, "pos": [positive], "neg": [n[row] for n in negatives]}
            out.write(json.dumps(record) + "\n")


def run(job: Job) -> Outcome:
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.jsonl")
        write_records(job, data)
        runner = DecoderOnlyEmbedderRunner(
            DecoderOnlyEmbedderModelArguments(
                model_name_or_path=str(job.model("stock")),
                from_peft=str(job.model("adapter")),
            ),
            DecoderOnlyEmbedderDataArguments(
                train_data=[str(data)],
                cache_path=str(Path(folder, "cache")),
                train_group_size=1 + job.num_negatives,
                query_max_len=job.max_tokens,
                passage_max_len=job.max_tokens,
                query_instruction_for_retrieval=job.prompt,
            ),
            DecoderOnlyEmbedderTrainingArguments(
                output_dir=str(Path(folder, "out")),
                per_device_train_batch_size=job.batch_size,
                learning_rate=job.learning_rate,
                temperature=job.temperature,
                sentence_pooling_method="mean",
                normalize_embeddings=True,
                sub_batch_size=job.options.get("sub_batch_size"),
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                bf16=job.dtype == "bfloat16",
                **COMMON,
            ),
        )
        keep_bos(runner.tokenizer, job.model("stock"))
        leave_prompt_out(runner.model, job.prompt_tokens)
        for name, parameter in runner.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
        losses, clock = record_losses(runner.model), StepClock()
        runner.trainer.add_callback(clock)
        loaded = memory_bytes()
        runner.trainer.train()
    return Outcome([float(value) for value in losses], clock.seconds, loaded_bytes=loaded)


if __name__ == "__main__":
    trainer_main(run)
