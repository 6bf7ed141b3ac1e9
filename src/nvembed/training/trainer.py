"""The training loop: stages in order, one contrastive step after the other.

Every batch and all dropout are pure functions of (seed, stage, step), so the place in the run is
the whole state of data and randomness. A run folder holds ``config.yaml``, ``env.json``,
``metrics.jsonl``, ``train.log``, ``checkpoints/``, ``mined/<stage>/``, a model per finished stage
(``model-<stage>/``) and the last one as ``model/``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvembed.core.config import dump_config, load_config
from nvembed.core.errors import TrainingError, UserError
from nvembed.core.progress import progress
from nvembed.core.runs import RunFolder
from nvembed.core.seeding import derive_seed, seed_everything
from nvembed.data.batch import effective_negatives
from nvembed.data.mixture import Mixture, load_mixture
from nvembed.model.adapters import save_adapter
from nvembed.model.precision import settle_precision
from nvembed.text.token_cache import TokenCache, default_cache_folder
from nvembed.training.checkpoint import (
    Position,
    latest_checkpoint,
    read_position,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
)
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.feed import Fed, Feed
from nvembed.training.graph_memory import settle_graph_memory
from nvembed.training.model import build_model, save_model
from nvembed.training.objective import stage_objective
from nvembed.training.optim import build_optimizer, schedule, set_learning_rate
from nvembed.training.processes import Processes
from nvembed.training.signals import stop_signals
from nvembed.training.stages import mine_mixture
from nvembed.training.step import StepResult, StepSettings, contrastive_step


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
    processes = Processes.of_environment()
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
    return _Run(config, run, base_dir, processes).train()


def _with_settled_precision(config: TrainConfig, run: RunFolder, *, fresh: bool) -> TrainConfig:
    """Replace ``auto``: by what the run was started with, which must not change half-way."""
    precision = config.precision
    if precision == "auto" and run.exists and not fresh:
        with suppress(UserError):  # not readable: the comparison of configurations refuses it
            precision = load_config(TrainConfig, run.config).precision
    return config.model_copy(update={"precision": settle_precision(precision)})


@dataclass
class _Stage:
    """A stage at work.

    Args:
        number: from 0.
        config: its settings.
        feed: its batches.
        settings: of its steps.
        optimizer: of everything that is trained.
        log_temperature: log τ where it is learned.
    """

    number: int
    config: StageConfig
    feed: Feed
    settings: StepSettings
    optimizer: torch.optim.Optimizer
    log_temperature: nn.Parameter | None


class _Run:
    """A run in progress: configuration, model, and where it stands."""

    def __init__(
        self, config: TrainConfig, run: RunFolder, base_dir: Path, processes: Processes
    ) -> None:
        self.config = config
        self.run = run
        self.base_dir = base_dir
        self.processes = processes
        # All data are read first: a bad line is told before a large model is loaded.
        self.mixtures = [
            load_mixture(config.datasets, stage=number, base_dir=base_dir)
            for number in range(1, len(config.stages) + 1)
        ]
        seed_everything(derive_seed(config.seed, "weights"))
        self.embedder = build_model(config, base_dir, device=str(processes.device))
        self.tokens = TokenCache(default_cache_folder(), self.embedder.backbone.text_tokenizer)
        self.checkpoint = latest_checkpoint(run.checkpoints)
        self.position = read_position(self.checkpoint) if self.checkpoint else Position()
        run.trim_metrics(self.position.step)
        if self.checkpoint:
            restore_weights(self.checkpoint, self.embedder)
            self.log(f"going on after step {self.position.step} ({self.checkpoint.name})")

    def train(self) -> Path:
        with self._autocast():
            self.embedder.train()
            self.memory = settle_graph_memory(
                self.run.graph_memory,
                self.embedder,
                memory_gb=self.config.memory_gb,
                pack_tokens=self.config.pack_tokens,
                write=self.processes.is_main,
            )
        self.log(
            f"memory for graphs {self.memory.budget_bytes / 1e9:.2f} GB: {self.memory.tokens:,} "
            f"tokens ({self.memory.bytes_per_token / 1e3:,.0f} kB each)"
        )
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
        device = self.processes.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def log(self, line: str) -> None:
        """One line to the terminal and to ``train.log``."""
        if self.processes.is_main:
            print(line, flush=True)
            with open(self.run.log, "a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def _stage(self, number: int) -> None:
        config = self.config.stages[number]
        stage = self._start(number, self._mixture(number))
        self.log(_describe(config, stage.feed))
        start = self.position.stage_step
        with (
            progress(config.steps - start, config.name, shown=self.processes.is_main) as bar,
            stop_signals() as stopping,
            stage.feed.ahead(start) as fed,
        ):
            for stage_step, batch in enumerate(fed, start):
                row = self._step(stage, stage_step, batch)
                bar.advance(1, loss=row["loss"], tokens_per_s=row["tokens_per_second"])
                self.position = Position(
                    row["step"], number, stage_step + 1, self.position.seconds + row["seconds"]
                )
                if row["step"] % self.config.log_every == 0:
                    self.run.append_metrics(row)
                self._maybe_checkpoint(stage, stopping)
        self._finish_stage(stage)

    def _mixture(self, number: int) -> Mixture:
        """The data of a stage, with negatives mined by the model as it is now where asked for."""
        config = self.config.stages[number]
        if config.mine is None:
            return self.mixtures[number]
        with self._autocast():
            return mine_mixture(
                self.config,
                number,
                config.mine,
                base_dir=self.base_dir,
                mined_dir=self.run.mined / config.name,
                teacher=self.embedder,
                log=self.log,
            )

    def _start(self, number: int, mixture: Mixture) -> _Stage:
        config = self.config.stages[number]
        optimizer = build_optimizer(
            self.embedder.pooling, self.embedder, config, self.config.optimizer
        )
        if self.position.stage_step:
            assert self.checkpoint is not None
            restore_optimizer(self.checkpoint, self.embedder, optimizer)
        settings = StepSettings(
            objective=stage_objective(config),
            coupled=config.in_batch_negatives,
            pack_tokens=self.config.pack_tokens,
            graph_tokens=self.memory.tokens,
        )
        feed = Feed(mixture, config, seed=self.config.seed, tokens=self.tokens)
        return _Stage(number, config, feed, settings, optimizer, None)

    def _step(self, stage: _Stage, stage_step: int, fed: Fed) -> dict[str, Any]:
        """One update; returns its metrics. A number that is not finite changes nothing."""
        started = time.perf_counter()
        config = stage.config
        share = schedule(stage_step, steps=config.steps, warmup_steps=config.warmup_steps)
        set_learning_rate(stage.optimizer, share)
        self.embedder.train()
        step = self.position.step + 1
        batch, texts = fed
        try:
            with self._autocast():
                result = contrastive_step(
                    self.embedder,
                    batch,
                    texts,
                    stage.settings,
                    self.processes,
                    seed=derive_seed(self.config.seed, "dropout", config.name, stage_step),
                    log_temperature=stage.log_temperature,
                )
        except FloatingPointError as error:
            raise self._not_finite(error.args[0], "loss", config, step) from error
        norm = self._clipped_norm()
        if not math.isfinite(norm):
            raise self._not_finite(norm, "gradient norm", config, step)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return _metrics(config, step, norm, share, result, seconds)

    def _clipped_norm(self) -> float:
        trained = [p for p in self.embedder.parameters() if p.requires_grad]
        self.processes.sum_gradients(trained)
        return self.processes.clip_gradients(trained, self.config.optimizer.max_grad_norm)

    def _not_finite(self, value: float, what: str, stage: StageConfig, step: int) -> TrainingError:
        last = latest_checkpoint(self.run.checkpoints)
        return TrainingError(
            f"the {what} of step {step} ({stage.name}) is {value}; the weights were not changed",
            where=str(self.run.path),
            expected="finite numbers",
            hint=f"Lower the learning rate or raise the temperature; last checkpoint: "
            f"{last.name if last else 'none'}",
        )

    def _maybe_checkpoint(self, stage: _Stage, stopping: Callable[[], bool]) -> None:
        stop = stopping()
        if stop or self.position.step % self.config.checkpoint_every == 0:
            self._checkpoint(stage.optimizer)
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

    def _finish_stage(self, stage: _Stage) -> None:
        if stage.number + 1 < len(self.config.stages):
            folder = self.run.path / f"model-{stage.config.name}"
            save_model(self.embedder, self.config, folder)
        self.position = Position(self.position.step, stage.number + 1, 0, self.position.seconds)
        self._checkpoint(stage.optimizer)
        self.log(f"{stage.config.name} finished after step {self.position.step}")


def _describe(stage: StageConfig, feed: Feed) -> str:
    sizes = ", ".join(f"{source.name} {len(source):,}" for source in feed.mixture.sources)
    return (
        f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} queries; "
        f"in-batch negatives {'on' if stage.in_batch_negatives else 'off'}; "
        f"effective negatives per query {effective_negatives(feed.batch(0)):.1f}; data: {sizes}"
    )


def _metrics(
    stage: StageConfig,
    step: int,
    norm: float,
    share: float,
    result: StepResult,
    seconds: float,
) -> dict[str, Any]:
    statistics = result.statistics
    return {
        "step": step,
        "stage": stage.name,
        "loss": result.loss,
        "learning_rate": stage.learning_rate * share,
        "grad_norm": norm,
        "temperature": stage.temperature,
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
