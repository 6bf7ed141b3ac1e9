"""The folder of a comparison: one model, one adapter and one data file for all sides."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed.core.files import atomic_folder, write_json, write_jsonl
from nvembed.core.runs import derive_seed, seed_everything
from nvembed.data.instructions import query_prompt
from nvembed.data.loading import load_mixture
from nvembed.model.backbone import save_adapter
from nvembed.training.config import TrainConfig
from nvembed.training.model import build_model
from peers.data import Steps
from peers.job import Job
from peers.models import Models

INSTRUCTION = "Given a question, retrieve passages that answer the question"
STAGE = "peers"


@dataclass(frozen=True)
class Comparison:
    """A job for every side, and the real tokens of each of its steps.

    Args:
        job: of our side; ``job.of(side)`` gives the others.
        step_tokens: tokens of all texts of a step, none of them padding.
        step_texts: texts of a step.
    """

    job: Job
    step_tokens: list[int]
    step_texts: int


def train_config(job: Job) -> TrainConfig:
    """What our trainer is told, in the process that trains as in the one that prepares."""
    return TrainConfig.model_validate(
        {
            "output": str(Path(job.work, "run")),
            "model": {
                "backbone": job.decoder,
                "pooling": {"kind": "mean"},
                "max_tokens": job.max_tokens,
                "dtype": job.dtype,
            },
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
            "datasets": [
                {
                    "name": "pairs",
                    "path": "train.jsonl",
                    "kind": "retrieval",
                    "instruction": job.instruction,
                    "stages": [1],
                }
            ],
            "stages": [
                {
                    "name": STAGE,
                    "steps": job.steps,
                    "batch_size": job.batch_size,
                    "learning_rate": job.learning_rate,
                    "warmup_steps": 0,
                    "in_batch_negatives": True,
                    "num_negatives": job.num_negatives,
                    "temperature": job.temperature,
                }
            ],
            "optimizer": {"weight_decay": 0.0, "max_grad_norm": 1.0},
            "precision": job.dtype,
            "checkpoint_every": 10**6,
            **job.options,
        }
    )


def prepare(job: Job, steps: Steps) -> Comparison:
    """Write what the sides read: the rows, and the stock model and the adapter where absent.

    Args:
        job: of our side; its prompt is filled in.
        steps: rows of the run.
    """
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    instruction = job.instruction or INSTRUCTION
    prompt = query_prompt(instruction)
    columns = steps.columns()
    write_json(work / "columns.json", columns)
    # Written first in any order: the order of a run depends on the number of queries alone.
    _write_rows(work / "train.jsonl", steps, list(range(len(steps.rows))))
    job = replace(job, instruction=instruction, prompt=prompt)
    _write_rows(work / "train.jsonl", steps, _order(job))
    models = Models(job.decoder, job.model("stock").parent)
    models.need("stock")
    _write_adapter(job)
    plain = models.load(max_tokens=job.max_tokens)
    tokenize = plain.backbone.tokenize_texts
    queries = tokenize(columns["query"], prompt)
    lengths = [[len(text) for text in queries]]
    lengths += [[len(t) for t in tokenize(c)] for name, c in columns.items() if name != "query"]
    per_row = [sum(row) for row in zip(*lengths, strict=True)]
    size = job.batch_size
    job = replace(job, prompt_tokens=queries[0].pool_start)
    assert {text.pool_start for text in queries} == {job.prompt_tokens}
    return Comparison(
        job,
        [sum(per_row[n : n + size]) for n in range(0, len(per_row), size)],
        size * len(columns),
    )


def _order(job: Job) -> list[int]:
    """Record of every slot of our trainer's run."""
    config = train_config(job)
    mixture = load_mixture(config.datasets, stage=1, base_dir=Path(job.work))
    seed = derive_seed(config.seed, "data", STAGE)
    order: list[int] = mixture.order(seed, job.steps * job.batch_size)[:, 1].tolist()
    return order


def _write_rows(path: Path, steps: Steps, record_of_slot: list[int]) -> None:
    """Write the rows so that the record of slot s is row s."""
    records = dict(zip(record_of_slot, steps.rows, strict=True))
    write_jsonl(
        path,
        (
            {
                "query": records[n].query,
                "positive": [records[n].positive],
                "negative": list(records[n].negatives),
            }
            for n in range(len(records))
        ),
    )


def _write_adapter(job: Job) -> None:
    """Write the adapter that our trainer starts from."""
    path = job.model("adapter")
    if not path.exists():
        config = train_config(replace(job, dtype="float32"))
        seed_everything(derive_seed(config.seed, "weights"))
        with atomic_folder(path, "models") as folder:
            save_adapter(build_model(config, Path(job.work), device="cpu").backbone, folder)
        saved = json.loads((path / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_dropout"]) == (16, 0.0)
