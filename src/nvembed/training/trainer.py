"""The training loop: stages in order, one contrastive step after the other.

Every batch and all dropout are pure functions of (seed, stage, step), so the place in the run is
the whole state of data and randomness. What a run folder holds: ``core/runs.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nvembed.core.arguments import checked
from nvembed.core.reporting import progress
from nvembed.core.runs import RunFolder
from nvembed.core.seeding import derive_seed
from nvembed.data.mixture import Mixture
from nvembed.text.token_cache import TokenCache, default_cache_folder
from nvembed.training.checkpoint import (
    Position,
    check_recipe,
    latest_checkpoint,
    read_position,
    restore_weights,
    save_checkpoint,
    trained_parameters,
)
from nvembed.training.config import TrainConfig, training_inputs
from nvembed.training.distributed import DistributedContext, dead_peer_is_an_error, shard_backbone
from nvembed.training.metrics import (
    Best,
    describe,
    evaluate_step,
    evaluation_is_due,
    load_evaluation_tasks,
    metrics_row,
    put_back_best,
    should_stop,
    start_trackers,
    track,
    tracker_options,
)
from nvembed.training.model import (
    computing,
    save_adapters,
    save_model,
    settle_activation_budget,
    starting_model,
)
from nvembed.training.objective import bounded, new_temperature
from nvembed.training.optim import averaged_weights, set_learning_rate, stage_schedule
from nvembed.training.run_folder import (
    changed_kernels,
    check_finished,
    inputs_of,
    interrupted,
    is_finished,
    not_finite,
    out_of_memory,
    prepare_folder,
    settle_inputs,
    settle_mined,
    sigterm_is_an_error,
    stop_signals,
    with_settled_precision,
)
from nvembed.training.stages import (
    DataLoader,
    PreparedBatch,
    Stage,
    load_mixtures,
    mine_mixture,
    start_stage,
)
from nvembed.training.step import contrastive_step


@checked
def train(
    config: TrainConfig,
    *,
    base_dir: str | Path | None = None,
    fresh: bool = False,
    recipe: str | Path | None = None,
) -> Path:
    """Train all stages and save the model.

    A run that was stopped goes on from its last checkpoint when started again with the same
    configuration and inputs; a finished run does nothing.

    Args:
        config: the run.
        base_dir: folder that relative data and backbone paths start from; ``None`` is that of the
            recipe, or of the file that the configuration was loaded from, or the working folder.
        fresh: delete what an earlier run left in the output folder and start over.
        recipe: file of the configuration, which must not be among what the run writes.

    Returns:
        Folder of the trained model.

    Raises:
        UserError: data, model or output folder cannot be used, or are not those that the run was
            started with; the loss is not finite; interrupted.
    """
    if base_dir is None:
        base_dir = Path(recipe).parent if recipe else config.source_folder or Path()
    base_dir = Path(base_dir)
    run = RunFolder(Path(config.output))
    processes = DistributedContext.of_environment(
        shard=config.shard, timeout_minutes=config.peer_timeout_minutes
    )
    with dead_peer_is_an_error(str(run.checkpoints)), sigterm_is_an_error(str(run.path)):
        why: str | None = None
        if processes.is_main:  # settles it for all
            config, why = with_settled_precision(config, run, fresh=fresh)
        config = config.model_copy(update={"precision": processes.of_main(config.precision)})
        if processes.is_main:
            inputs = training_inputs(config, base_dir, None if recipe is None else Path(recipe))
            prepare_folder(run, config, fresh=fresh, inputs=inputs)
        processes.barrier()
        if is_finished(run):
            if processes.is_main:
                check_finished(run, config, base_dir)
            return run.model
        return _Run(config, run, base_dir, processes, why).train()


class _Run:
    """A run in progress: configuration, model, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        base_dir: Path,
        processes: DistributedContext,
        why: str | None,
    ) -> None:
        self.config = config
        self.run = run
        self.base_dir = base_dir
        self.processes = processes
        # All data are read first: a bad line is told before a large model is loaded.
        self.mixtures = load_mixtures(config, base_dir)
        self.tasks = load_evaluation_tasks(config.evaluation, base_dir) if config.evaluation else []
        inputs = inputs_of(config, base_dir, self.mixtures, self.tasks)
        settle_inputs(run, inputs, processes, self.log)
        self.accelerator = Accelerator(**tracker_options(config.trackers, run))
        # Of a model that is to be sharded only the shares go to the device.
        device = "cpu" if processes.sharded else str(processes.device)
        self.embedder = starting_model(config, base_dir, device=device)
        self.tokens = TokenCache(default_cache_folder(), self.embedder.backbone.text_tokenizer)
        self.recipe = config.model_dump(mode="json")
        self.checkpoint = latest_checkpoint(run.checkpoints, log=self.log)
        note = self.checkpoint and check_recipe(self.checkpoint, self.recipe, processes.count)
        self.position = read_position(self.checkpoint) if self.checkpoint else Position()
        self.best = Best.from_json(self.position.extra.get("best"))
        stage = config.stages[self.position.stage] if self.position.stage_step else None
        self.log_temperature = new_temperature(stage, processes.device)
        if processes.is_main:
            run.trim_metrics(self.position.step)
        if self.checkpoint is None:
            # All start from the same numbers, whatever the machines make of a seed.
            processes.broadcast_parameters(trained_parameters(self.embedder).values())
        else:
            restore_weights(self.checkpoint, self._trained())
            self.log(f"going on after step {self.position.step} ({self.checkpoint.name})")
        begun = () if self.checkpoint is None else (note, changed_kernels(run))
        for line in filter(None, (why, *begun)):
            self.log(line)
        if processes.sharded:
            half = torch.bfloat16 if config.precision == "bfloat16" else None
            shard_backbone(self.embedder, processes, compute_dtype=half)

    def train(self) -> Path:
        with computing(self.config, self.processes.device):
            self.embedder.train()
            self.memory = settle_activation_budget(
                self.run.graph_memory, self.embedder, self.config, self.processes
            )
        tokens, size = self.memory.tokens, self.memory.bytes_per_token / 1e3
        gigabytes = self.memory.budget_bytes / 1e9
        self.log(f"memory for graphs {gigabytes:.2f} GB: {tokens:,} tokens ({size:,.0f} kB each)")
        if self.processes.is_main and self.config.trackers:
            start_trackers(self.accelerator, self.run, self.recipe, step=self.position.step)
        for number in range(self.position.stage, len(self.config.stages)):
            self._stage(number)
        if (lora := self.config.lora) and lora.save_adapter and self.processes.is_main:
            save_adapters(self.embedder, self.run.adapter)
        self._save_model(self.run.model, final=True)
        self.log(f"model written to {self.run.model}")
        self.accelerator.end_training()  # parts with the other processes
        return self.run.model

    def _trained(self) -> dict[str, nn.Parameter]:
        """What is tuned now, by name."""
        learned = self.log_temperature
        extra = {} if learned is None else {"log_temperature": learned}
        return trained_parameters(self.embedder, **extra)

    def _save_model(self, folder: Path, *, final: bool) -> None:
        write = self.processes.is_main
        save_model(
            self.embedder, self.config, folder, base_dir=self.base_dir, final=final, write=write
        )
        self.processes.barrier()

    def log(self, line: str) -> None:  # to the terminal and to train.log
        if self.processes.is_main:
            print(line, flush=True)
            self.run.append_log(line)

    def _stage(self, number: int) -> None:
        config = self.config.stages[number]
        stage = self._start(number, self._mixture(number))
        self.log(describe(config, stage.loader))
        start = self.position.stage_step
        with stop_signals() as stopping:
            with (
                progress(config.steps - start, config.name, shown=self.processes.is_main) as bar,
                stage.loader.steps(start, prefetch=self.processes.device.type != "cpu") as batches,
            ):
                started = time.perf_counter()
                for stage_step, batch in enumerate(batches, start):
                    if self.config.evaluation and should_stop(self.config.evaluation, self.best):
                        self.log(f"{config.name}: no better in {self.best.since} evaluations")
                        break
                    row = self._step(stage, stage_step, batch, started)
                    bar.advance(1, loss=row["loss"], tokens_per_s=row["tokens_per_second"])
                    self.position = Position(
                        row["step"],
                        number,
                        stage_step + 1,
                        self.position.seconds + row["seconds"],
                        {"best": self.best.to_json()},
                    )
                    if row["step"] % self.config.log_every == 0:
                        self._report(row)
                    self._maybe_evaluate(stage)
                    self._maybe_checkpoint(stage, stopping)
                    started = time.perf_counter()
            self._finish_stage(stage)
            if self.processes.agree(stopping()):
                raise interrupted(self.run, self.position.step)

    def _report(self, row: dict[str, Any]) -> None:
        if self.processes.is_main:
            self.run.append_metrics(row)
        track(self.accelerator, row)

    def _maybe_evaluate(self, stage: Stage) -> None:
        """Score the model on the recipe's tasks when it is time, and keep the best weights."""
        evaluation, position = self.config.evaluation, self.position
        done, steps = position.stage_step, stage.config.steps
        if evaluation is None or not evaluation_is_due(evaluation, done, steps):
            return
        with computing(self.config, self.processes.device):
            self.best, scores = evaluate_step(
                self.embedder,
                stage.trained,
                stage.optimizer,
                self.tasks,
                evaluation,
                self.best,
                step=position.step,
                folder=self.run.checkpoints,
                processes=self.processes,
            )
        self._report({"step": position.step, "stage": stage.config.name, "evaluation": scores})
        self.position = replace(position, extra={"best": self.best.to_json()})

    def _mixture(self, number: int) -> Mixture:
        """The data of a stage, with negatives mined by the model as it is now where asked for."""
        config, processes = self.config.stages[number], self.processes
        if config.mine is None:
            return self.mixtures[number]
        # One process mines and the others read its files; with sharded weights all mine together,
        # forward by forward, and write the same files.
        mines = processes.is_main or processes.sharded
        if not mines:
            processes.barrier()
        with computing(self.config, self.processes.device):
            mixture = mine_mixture(
                self.config,
                number,
                config.mine,
                base_dir=self.base_dir,
                mined_dir=self.run.mined / config.name,
                teacher=self.embedder,
                log=self.log,
            )
        if processes.is_main:
            settle_mined(self.run, self.config, config.name, mixture)
        if mines:
            processes.barrier()
        return mixture

    def _start(self, number: int, mixture: Mixture) -> Stage:
        config = self.config.stages[number]
        going_on = self.position.stage_step > 0
        if not going_on:
            self.log_temperature = new_temperature(config, self.processes.device)
        return start_stage(
            self.config,
            number,
            DataLoader(mixture, config, seed=self.config.seed, tokens=self.tokens),
            self._trained(),
            head=self.embedder.pooling,
            activation_budget=self.memory.tokens,
            checkpoint=self.checkpoint if going_on else None,
        )

    def _step(
        self, stage: Stage, stage_step: int, prepared: PreparedBatch, started: float
    ) -> dict[str, Any]:
        """One update; returns its metrics. A number that is not finite changes nothing.

        Its time counts from ``started``, so that waiting for the batch is part of it.
        """
        config = stage.config
        share = stage_schedule(stage_step, config, self.config.optimizer)
        set_learning_rate(stage.optimizer, share)
        self.embedder.train()
        step = self.position.step + 1
        batch, texts = prepared
        try:
            with computing(self.config, self.processes.device):
                result = contrastive_step(
                    self.embedder,
                    batch,
                    texts,
                    stage.settings,
                    self.processes,
                    seed=derive_seed(self.config.seed, "dropout", config.name, stage_step),
                    log_temperature=self.log_temperature,
                )
        except FloatingPointError as error:
            raise not_finite(self.run, error.args[0], "loss", config, step) from error
        except torch.OutOfMemoryError as error:
            longest = max(len(text) for text in texts)
            raise out_of_memory(config, step, self.config.pack_tokens, longest) from error
        norm = self._summed_norm(stage)
        if not math.isfinite(norm):
            raise not_finite(self.run, norm, "gradient norm", config, step)
        stage.optimizer.step()
        stage.optimizer.zero_grad()
        temperature = bounded(self.log_temperature) or config.temperature
        seconds = time.perf_counter() - started
        return metrics_row(config, step, norm, share, temperature, result, seconds)

    def _summed_norm(self, stage: Stage) -> float:
        """Sum the gradients over the processes, clip them, return their norm."""
        trained, limit = stage.trained.values(), self.config.optimizer.max_grad_norm
        # The temperature's gradient is whole already: every process computes the whole loss.
        self.processes.sum_gradients(p for p in trained if p is not self.log_temperature)
        return self.processes.clip_gradients(trained, limit)

    def _maybe_checkpoint(self, stage: Stage, stopping: Callable[[], bool]) -> None:
        stop = self.processes.agree(stopping())
        if stop or self.position.step % self.config.checkpoint_every == 0:
            self._checkpoint(stage, stage.trained)
        if stop:
            raise interrupted(self.run, self.position.step)

    def _checkpoint(self, stage: Stage, trained: Mapping[str, nn.Parameter]) -> None:
        self.checkpoint = save_checkpoint(
            self.run.checkpoints,
            self.position,
            trained,
            stage.optimizer,
            recipe=self.recipe,
            processes=self.processes,
            keep=self.config.keep_checkpoints,
        )

    def _finish_stage(self, stage: Stage) -> None:
        # What the next stage, and the model, start from.
        averaged_weights(stage.optimizer)
        if self.config.evaluation and put_back_best(
            stage.trained,
            self.config.evaluation,
            self.best,
            step=self.position.step,
            folder=self.run.checkpoints,
        ):
            self.log(f"{stage.config.name}: back to the weights of step {self.best.step}")
        self.best = Best()
        if stage.number + 1 < len(self.config.stages):
            self._save_model(self.run.path / f"model-{stage.config.name}", final=False)
        self.position = Position(self.position.step, stage.number + 1, 0, self.position.seconds)
        self._checkpoint(stage, trained_parameters(self.embedder))
        self.log(f"{stage.config.name} finished after step {self.position.step}")
