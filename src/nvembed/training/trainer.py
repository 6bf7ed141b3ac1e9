"""The training loop: stages in order, one contrastive step after the other.

Every batch is a pure function of (seed, stage, step), so the place in the run is the whole state of
the data. A run folder holds ``config.yaml``, ``env.json``, ``metrics.jsonl``, ``train.log``,
``checkpoints/``, ``mined/<stage>/``, a model per finished stage (``model-<stage>/``) and the last
one as ``model/``.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nvembed.core.config import dump_config, load_config
from nvembed.core.errors import TrainingError, UserError
from nvembed.core.progress import progress
from nvembed.core.runs import RunFolder
from nvembed.core.seeding import derive_seed, seed_everything
from nvembed.data.batch import ContrastiveBatch, build_batch, effective_negatives
from nvembed.data.mixture import Mixture, load_mixture
from nvembed.model.adapters import save_adapter
from nvembed.model.precision import settle_precision
from nvembed.training.checkpoint import (
    Position,
    latest_checkpoint,
    read_position,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
)
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.model import build_model, save_model
from nvembed.training.optim import build_optimizer, schedule, set_learning_rate
from nvembed.training.stages import mine_mixture
from nvembed.training.step import StepResult, contrastive_step


def train(config: TrainConfig, *, base_dir: Path, fresh: bool = False) -> Path:
    """Train all stages and save the model.

    A run that was stopped goes on from its last checkpoint when started again with the same
    configuration; a finished run does nothing.

    Args:
        config: the run.
        base_dir: folder that relative data and backbone paths start from (that of the recipe).
        fresh: delete what an earlier run left in the output folder and start over.

    Returns:
        Folder of the trained model.

    Raises:
        UserError: data, model or output folder cannot be used; the loss is not finite; interrupted.
    """
    run = RunFolder(Path(config.output))
    config = _with_settled_precision(config, run, fresh=fresh)
    resolved = dump_config(config)
    if fresh or not run.exists:
        run.create(resolved, replace=fresh)
    elif run.config.read_text(encoding="utf-8") != resolved:
        raise TrainingError(
            "the folder holds a run with another configuration",
            where=str(run.config),
            hint="Choose another output folder, or start over with --fresh",
        )
    if (run.model / "modules.json").is_file():
        return run.model
    return _Run(config, run, base_dir).train()


def _with_settled_precision(config: TrainConfig, run: RunFolder, *, fresh: bool) -> TrainConfig:
    """Replace ``auto``: by what the run was started with, which must not change half-way."""
    precision = config.precision
    if precision == "auto" and run.exists and not fresh:
        with suppress(UserError):  # not readable: the comparison of configurations refuses it
            precision = load_config(TrainConfig, run.config).precision
    return config.model_copy(update={"precision": settle_precision(precision)})


class _Run:
    """A run in progress: configuration, model, and where it stands."""

    def __init__(self, config: TrainConfig, run: RunFolder, base_dir: Path) -> None:
        self.config = config
        self.run = run
        self.base_dir = base_dir
        # All data are read first: a bad line is told before a large model is loaded.
        self.mixtures = [
            load_mixture(config.datasets, stage=number, base_dir=base_dir)
            for number in range(1, len(config.stages) + 1)
        ]
        self.accelerator = Accelerator()
        seed_everything(derive_seed(config.seed, "weights"))
        self.embedder = build_model(config, base_dir, device=str(self.accelerator.device))
        self.checkpoint = latest_checkpoint(run.checkpoints)
        self.position = read_position(self.checkpoint) if self.checkpoint else Position()
        run.trim_metrics(self.position.step)
        if self.checkpoint:
            restore_weights(self.checkpoint, self.embedder)
            self.log(f"going on after step {self.position.step} ({self.checkpoint.name})")

    def train(self) -> Path:
        for number in range(self.position.stage, len(self.config.stages)):
            self._stage(number)
        if self.config.lora is not None and self.config.lora.save_adapter:
            save_adapter(self.embedder.backbone, self.run.adapter)
        save_model(self.embedder, self.config, self.run.model, final=True)
        self.log(f"model written to {self.run.model}")
        return self.run.model

    def _autocast(self) -> torch.autocast:
        """Computation in the run's precision.

        One block for all packs of a step, in which every weight is cast once; accelerate's own
        mixed precision casts them again for every pack.
        """
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def log(self, line: str) -> None:
        """One line to the terminal and to ``train.log``."""
        if self.accelerator.is_main_process:
            self.accelerator.print(line)
            with open(self.run.log, "a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def _stage(self, number: int) -> None:
        stage = self.config.stages[number]
        mixture = self.mixtures[number]
        if stage.mine is not None:
            with self._autocast():
                mixture = mine_mixture(
                    self.config,
                    number,
                    stage.mine,
                    base_dir=self.base_dir,
                    mined_dir=self.run.mined / stage.name,
                    teacher=self.embedder,
                    log=self.log,
                )
        seed_everything(derive_seed(self.config.seed, "stage", stage.name))
        optimizer = build_optimizer(
            self.embedder.pooling, self.embedder, stage, self.config.optimizer
        )
        model, prepared = self.accelerator.prepare(self.embedder, optimizer)
        if self.position.stage_step:
            assert self.checkpoint is not None
            restore_optimizer(self.checkpoint, self.embedder, optimizer)
        batches = self._batches(stage, mixture)
        self.log(self._describe(stage, mixture, batches(0)))
        left = stage.steps - self.position.stage_step
        with progress(left, stage.name) as bar, _stop_signals() as stopping:
            for stage_step in range(self.position.stage_step, stage.steps):
                row = self._step(stage, stage_step, model, prepared, batches(stage_step))
                bar.advance(1, loss=row["loss"], tokens_per_s=row["tokens_per_second"])
                self.position = Position(
                    row["step"], number, stage_step + 1, self.position.seconds + row["seconds"]
                )
                if row["step"] % self.config.log_every == 0:
                    self.run.append_metrics(row)
                self._maybe_checkpoint(optimizer, stopping)
        self._finish_stage(number, optimizer)

    def _batches(self, stage: StageConfig, mixture: Mixture) -> Callable[[int], ContrastiveBatch]:
        """The batch of a step, as a pure function of seed, stage and step."""
        seed = derive_seed(self.config.seed, "data", stage.name)
        order = mixture.order(seed, stage.steps * stage.batch_size)

        def batch(step: int) -> ContrastiveBatch:
            first = step * stage.batch_size
            examples = mixture.examples(
                order,
                first,
                first + stage.batch_size,
                seed=seed,
                num_negatives=stage.num_negatives,
            )
            return build_batch(examples, in_batch_negatives=stage.in_batch_negatives)

        return batch

    def _describe(self, stage: StageConfig, mixture: Mixture, first: ContrastiveBatch) -> str:
        sizes = ", ".join(f"{source.name} {len(source):,}" for source in mixture.sources)
        return (
            f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} queries; "
            f"in-batch negatives {'on' if stage.in_batch_negatives else 'off'}; "
            f"effective negatives per query {effective_negatives(first):.1f}; data: {sizes}"
        )

    def _step(
        self,
        stage: StageConfig,
        stage_step: int,
        model: nn.Module,
        optimizer: Any,
        batch: ContrastiveBatch,
    ) -> dict[str, Any]:
        """One update; returns its metrics. A number that is not finite changes nothing."""
        started = time.perf_counter()
        share = schedule(stage_step, steps=stage.steps, warmup_steps=stage.warmup_steps)
        set_learning_rate(optimizer, share)
        model.train()
        with self._autocast():
            result = contrastive_step(
                model,
                self.embedder.backbone,
                batch,
                temperature=stage.temperature,
                pack_tokens=self.config.pack_tokens,
            )
        loss = float(result.loss.detach())
        step = self.position.step + 1
        self._require_finite(loss, "loss", stage, step)
        self.accelerator.backward(result.loss)
        limit = self.config.optimizer.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(
            self.embedder.parameters(), math.inf if limit is None else limit
        )
        self._require_finite(float(norm), "gradient norm", stage, step)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return _metrics(stage, step, loss, float(norm), share, result, seconds)

    def _require_finite(self, value: float, what: str, stage: StageConfig, step: int) -> None:
        if not math.isfinite(value):
            last = latest_checkpoint(self.run.checkpoints)
            raise TrainingError(
                f"the {what} of step {step} ({stage.name}) is {value}; "
                "the weights were not changed",
                where=str(self.run.path),
                expected="finite numbers",
                hint=f"Lower the learning rate or raise the temperature; last checkpoint: "
                f"{last.name if last else 'none'}",
            )

    def _maybe_checkpoint(
        self, optimizer: torch.optim.Optimizer, stopping: Callable[[], bool]
    ) -> None:
        stop = stopping()
        if stop or self.position.step % self.config.checkpoint_every == 0:
            self._checkpoint(optimizer)
        if stop:
            raise TrainingError(
                f"interrupted after step {self.position.step}; a checkpoint was written",
                where=str(self.run.checkpoints),
                hint="The same command goes on from there",
            )

    def _checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        self.checkpoint = save_checkpoint(
            self.run.checkpoints,
            self.position,
            self.embedder,
            optimizer,
            keep=self.config.keep_checkpoints,
        )

    def _finish_stage(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        stage = self.config.stages[number]
        if number + 1 < len(self.config.stages):
            save_model(self.embedder, self.config, self.run.path / f"model-{stage.name}")
        self.position = Position(self.position.step, number + 1, 0, self.position.seconds)
        self._checkpoint(optimizer)
        self.log(f"{stage.name} finished after step {self.position.step}")


def _metrics(
    stage: StageConfig,
    step: int,
    loss: float,
    norm: float,
    share: float,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
    statistics = result.statistics
    return {
        "step": step,
        "stage": stage.name,
        "loss": loss,
        "learning_rate": stage.learning_rate * share,
        "grad_norm": norm,
        "temperature": stage.temperature,
        "positive_similarity": statistics.positive_similarity,
        "margin": statistics.margin,
        "accuracy": statistics.accuracy,
        "effective_negatives": result.effective_negatives,
        "texts": result.num_texts,
        "tokens": result.num_tokens,
        "seconds": seconds,
        "tokens_per_second": result.num_tokens / seconds,
    }


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag that the loop looks at after each step.

    Outside the loop (loading, mining) they stop at once: nothing there is lost by it. So does a
    second Ctrl-C inside.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
