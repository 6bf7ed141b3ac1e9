"""The training loop: stages in order, one contrastive step after the other.

Every batch and all dropout are pure functions of (seed, stage, step), so the place in the run is
the whole state of data and randomness. What a run folder holds: ``core/runs.py``.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nvembed.core.arguments import checked
from nvembed.core.errors import TrainingError
from nvembed.core.reporting import progress
from nvembed.core.runs import RunFolder, derive_seed
from nvembed.data.batch import Mixture
from nvembed.data.config import MiningConfig
from nvembed.kernels.machine import ThreadWatch, watched_threads
from nvembed.training import checkpoint, metrics, model, run_folder, stages, teacher
from nvembed.training.checkpoint import Position, trained_parameters
from nvembed.training.config import TrainConfig, training_inputs
from nvembed.training.contrastive_loss import bounded, new_temperature
from nvembed.training.distributed import DistributedContext, dead_peer_is_an_error, shard_backbone
from nvembed.training.loss_config import TeacherConfig
from nvembed.training.stage_mining import mine_mixture
from nvembed.training.stages import LossWatch, peak_rate
from nvembed.training.step import StepResult, contrastive_step
from nvembed.training.teacher_states import teacher_states


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
    remedy = "set threads=auto" if processes.count == 1 else "set threads={}"
    with (
        dead_peer_is_an_error(str(run.checkpoints)),
        run_folder.sigterm_is_an_error(str(run.path)),
        watched_threads(config.threads, remedy, processes.device.type) as threads,
    ):
        config, why = run_folder.settle_choices(config, run, processes, fresh=fresh)
        if processes.is_main:
            inputs = training_inputs(config, base_dir, None if recipe is None else Path(recipe))
            run_folder.prepare_folder(run, config, fresh=fresh, inputs=inputs)
        processes.barrier()
        if run_folder.is_finished(run):
            if processes.is_main and run.inputs.exists():
                run_folder.check_inputs(run, run_folder.read_inputs_of(config, base_dir))
            return run.model
        with run_folder.held(run, is_main=processes.is_main):
            return _Run(config, run, base_dir, processes, why).train(threads)


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
        self.run, self.base_dir, self.processes = run, base_dir, processes
        self.computing = partial(model.computing, config, processes.device)
        # All data are read first: a bad line is told before a large model is loaded.
        self.mixtures = stages.load_mixtures(config, base_dir)
        given = config.evaluation
        tasks = metrics.load_evaluation_tasks(given, base_dir) if given else []
        self.evaluation = given and metrics.Evaluation(given, tasks, run.checkpoints, processes)
        inputs = run_folder.inputs_of(config, base_dir, self.mixtures, tasks)
        run_folder.settle_inputs(run, inputs, processes, self.log)
        options = metrics.tracker_options(config.trackers, run) if config.trackers else {}
        self.accelerator = Accelerator(**options)
        # Of a model that is to be sharded only the shares go to the device.
        device = "cpu" if processes.sharded else str(processes.device)
        self.embedder = model.starting_model(config, base_dir, device=device)
        self.config = run_folder.settle_rates(run, config, self.embedder, processes, self.log)
        self.recipe = self.config.model_dump(mode="json")
        self._save = partial(
            checkpoint.save_checkpoint,
            run.checkpoints,
            recipe=self.recipe,
            processes=processes,
            keep=config.keep_checkpoints,
        )
        self.position, self.best, lines = Position(), metrics.Best(), [why]
        self.log_temperature: nn.Parameter | None = None  # both are of the stage's loss
        self.projection: nn.Parameter | None = None
        self.begun = checkpoint.latest_checkpoint(run.checkpoints, log=self.log)
        if self.begun is not None:
            lines += [
                checkpoint.check_recipe(self.begun, self.recipe, processes.count),
                run_folder.changed_kernels(run),
            ]
            self.position = checkpoint.read_position(self.begun)
            self.best = metrics.Best.from_json(self.position.extra.get("best"))
            if self.position.stage_step:
                stage = config.stages[self.position.stage]
                self.log_temperature = new_temperature(stage, processes.device)
            self.projection = teacher.saved_projection(self.begun, processes.device)
        if processes.is_main:
            run.trim_metrics(self.position.step or -1)  # a start writes its scores anew
        trained = self._trained()
        if self.begun is None:
            # All start from the same numbers, whatever the machines make of a seed.
            processes.broadcast_parameters(trained.values())
        else:
            checkpoint.restore_weights(self.begun, trained)
            self.log(f"going on after step {self.position.step} ({self.begun.name})")
        for line in filter(None, lines):
            self.log(line)
        if processes.sharded:
            half = torch.bfloat16 if config.precision == "bfloat16" else None
            shard_backbone(self.embedder, processes, compute_dtype=half)

    def train(self, threads: ThreadWatch) -> Path:
        with self.computing():
            self.embedder.train()
            budget = model.settle_activation_budget(
                self.run.graph_memory, self.embedder, self.config, self.processes
            )
        self.log(
            f"memory for graphs {budget.budget_bytes / 1e9:.2f} GB: {budget.tokens:,} tokens "
            f"({budget.bytes_per_token / 1e3:,.0f} kB each)"
        )
        if self.processes.is_main and self.config.trackers:
            metrics.start_trackers(self.accelerator, self.run, self.recipe, step=self.position.step)
        if self.evaluation and self.evaluation.config.before and not self.position.step:
            with self.computing():
                scores = self.evaluation.scores(self.embedder)
            self._report({"step": 0, "stage": None, "evaluation": scores})
        for number in range(self.position.stage, len(self.config.stages)):
            self._stage(self._start(number, budget.tokens), threads)
        if (lora := self.config.lora) and lora.save_adapter and self.processes.is_main:
            model.save_adapters(self.embedder, self.config, self.run.adapter)
        self._save_model(self.run.model, final=True)
        self.log(f"model written to {self.run.model}")
        self.accelerator.end_training()  # parts with the other processes
        return self.run.model

    def log(self, line: str) -> None:  # to the terminal and to train.log
        if self.processes.is_main:
            print(line, flush=True)
            self.run.append_log(line)

    def _start(self, number: int, activation_budget: int) -> stages.Stage:
        """A stage with its data and its optimizer, as new or where the run stands."""
        config = self.config.stages[number]
        mixture = self.mixtures[number] if config.mine is None else self._mined(number, config.mine)
        going_on = self.position.stage_step > 0
        tokenizer = self.embedder.backbone.text_tokenizer
        loader = stages.DataLoader(mixture, config, seed=self.config.seed, tokenizer=tokenizer)
        if config.teacher is not None:
            self._prepare(loader, config.teacher)
        if not going_on:
            self.log_temperature = new_temperature(config, self.processes.device)
            if self.projection is None and loader.teacher is not None:
                self.projection = self._projection(loader, number)
        return stages.start_stage(
            self.config,
            number,
            loader,
            self._trained(),
            head=self.embedder.pooling,
            activation_budget=activation_budget,
            checkpoint=self.begun if going_on else None,
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the stage trains; the model alone is what is left after it."""
        of_loss = {"log_temperature": self.log_temperature, teacher.PROJECTION: self.projection}
        return trained_parameters(self.embedder, **of_loss)

    def _prepare(self, loader: stages.DataLoader, settings: TeacherConfig) -> None:
        """Have the teacher's vectors of all texts that the loader will give, or itself."""
        given = loader.given(self.position.stage_step)
        loader.states = teacher_states(loader.stage, self.base_dir, self.embedder)
        loader.teacher = teacher.prepared(settings, self.base_dir, given, self.processes, self.log)

    def _projection(self, loader: stages.DataLoader, number: int) -> nn.Parameter | None:
        model, first = self.embedder, map(loader.step, range(loader.stage.steps))
        found = teacher.new_projection(loader.teacher, model, seed=self.config.seed, stage=number)
        if found is not None:
            teacher.fit_projection(found, model, first, self.config.pack_tokens, self.computing)
        return found

    def _mined(self, number: int, settings: MiningConfig) -> Mixture:
        """The data of a stage, with negatives mined by the model as it is now."""
        config, processes = self.config.stages[number], self.processes
        # One process mines and the others read its files; with sharded weights all mine together,
        # forward by forward, and write the same files.
        mines = processes.is_main or processes.sharded
        if not mines:
            processes.barrier()
        with self.computing():
            mixture = mine_mixture(
                self.config,
                number,
                settings,
                base_dir=self.base_dir,
                mined_dir=self.run.mined / config.name,
                teacher=self.embedder,
                log=self.log,
            )
        if processes.is_main:
            run_folder.settle_mined(self.run, self.config, config.name, mixture)
        if mines:
            processes.barrier()
        return mixture

    def _stage(self, stage: stages.Stage, threads: ThreadWatch) -> None:
        config, evaluation, processes = stage.config, self.evaluation, self.processes
        for line in filter(None, (stage.loader.describe(), threads.look())):
            self.log(line)
        start = self.position.stage_step
        watch = LossWatch(config, start)
        with run_folder.stop_signals() as stopping:
            with (
                progress(config.steps - start, config.name, shown=processes.is_main) as bar,
                stage.loader.steps(start, prefetch=processes.device.type != "cpu") as batches,
            ):
                started = time.perf_counter()
                for stage_step, batch in enumerate(batches, start):
                    if evaluation and metrics.should_stop(evaluation.config, self.best):
                        self.log(f"{config.name}: no better in {self.best.since} evaluations")
                        break
                    row = self._step(stage, stage_step, batch, started)
                    bar.advance(1, loss=row["loss"], tokens_per_s=row["tokens_per_second"])
                    self.position = Position(
                        row["step"],
                        stage.number,
                        stage_step + 1,
                        self.position.seconds + row["seconds"],
                        {"best": asdict(self.best)},
                    )
                    for line in filter(None, (watch.after(row), threads.look())):
                        self.log(line)
                    if row["step"] % self.config.log_every == 0:
                        self._report(row)
                    if evaluation:
                        self._maybe_evaluate(stage, evaluation)
                    stop = processes.agree(stopping())
                    if stop or row["step"] % self.config.checkpoint_every == 0:
                        self._save(self.position, stage.trained, stage.optimizer)
                    if stop:
                        raise run_folder.interrupted(self.run, self.position.step)
                    started = time.perf_counter()
            self._finish_stage(stage)
            if processes.agree(stopping()):
                raise run_folder.interrupted(self.run, self.position.step)

    def _step(
        self, stage: stages.Stage, stage_step: int, prepared: stages.PreparedBatch, started: float
    ) -> dict[str, Any]:
        """One update, timed from ``started``; one that is not finite changes nothing."""
        config, optimizer, trained = stage.config, stage.optimizer, stage.trained.values()
        share = stages.stage_schedule(stage_step, config, self.config.optimizer)
        stages.set_learning_rate(optimizer, share)
        result = self._gradients(stage, stage_step, prepared)
        # Those of the loss are whole already: every process computes the whole loss.
        self.processes.sum_gradients(self.embedder.parameters())
        norm = self.processes.clip_gradients(trained, self.config.optimizer.max_grad_norm)
        if not math.isfinite(norm):
            raise self._not_finite(norm, "gradient norm", config.name)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "step": self.position.step + 1,
            "stage": config.name,
            **result.to_row(),
            "learning_rate": peak_rate(config) * share,
            "grad_norm": norm,
            "temperature": bounded(self.log_temperature) or config.temperature,
            "seconds": seconds,
            "tokens_per_second": result.num_tokens / seconds,
        }

    def _gradients(
        self, stage: stages.Stage, stage_step: int, prepared: stages.PreparedBatch
    ) -> StepResult:
        config, (batch, texts) = stage.config, prepared
        self.embedder.train()
        try:
            with self.computing():
                return contrastive_step(
                    self.embedder,
                    batch,
                    texts,
                    stage.settings,
                    self.processes,
                    seed=derive_seed(self.config.seed, "dropout", config.name, stage_step),
                    log_temperature=self.log_temperature,
                    projection=self.projection,
                )
        except FloatingPointError as error:
            raise self._not_finite(error.args[0], "loss", config.name) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the device ran out of memory in step {self.position.step + 1} ({config.name}): "
                f"packs of {self.config.pack_tokens:,} tokens, longest text "
                f"{max(map(len, texts)):,}",
                where="memory_gb, pack_tokens",
                hint="Lower pack_tokens, memory_gb or model.max_tokens, or set "
                "activation_checkpointing=true; the run goes on from its last checkpoint",
            ) from error

    def _maybe_evaluate(self, stage: stages.Stage, evaluation: metrics.Evaluation) -> None:
        """Score the model on the recipe's tasks when it is time, and keep the best weights."""
        name, position = stage.config.name, self.position
        if not metrics.evaluation_is_due(
            evaluation.config, position.stage_step, stage.config.steps
        ):
            return
        with self.computing():
            self.best, scores = evaluation.step(
                self.embedder, stage.trained, stage.optimizer, self.best, position.step
            )
        self._report({"step": position.step, "stage": name, "evaluation": scores})
        self.position = replace(position, extra={"best": asdict(self.best)})

    def _report(self, row: dict[str, Any]) -> None:
        if self.processes.is_main:
            self.run.append_metrics(row)
        if self.config.trackers:
            metrics.track(self.accelerator, row)

    def _finish_stage(self, stage: stages.Stage) -> None:
        # What the next stage, and the model, start from.
        name, step = stage.config.name, self.position.step
        stages.averaged_weights(stage.optimizer)
        if self.evaluation and self.evaluation.put_back(stage.trained, self.best, step):
            self.log(f"{name}: back to the weights of step {self.best.step}")
        self.best = metrics.Best()
        following = self.config.stages[stage.number + 1 :]
        if following:
            self._save_model(self.run.path / f"model-{name}", final=False)
        if not following or not teacher.is_continued(stage.config.teacher, following[0].teacher):
            self.projection = None
        self.position = Position(step, stage.number + 1, 0, self.position.seconds)
        self.log_temperature = None
        self._save(self.position, self._trained(), stage.optimizer)
        self.log(f"{name} finished after step {step}")

    def _save_model(self, folder: Path, *, final: bool) -> None:
        write = self.processes.is_main
        model.save_model(
            self.embedder, self.config, folder, base_dir=self.base_dir, final=final, write=write
        )
        self.processes.barrier()

    def _not_finite(self, value: float, what: str, stage: str) -> TrainingError:
        last = checkpoint.latest_checkpoint(self.run.checkpoints)
        return TrainingError(
            f"the {what} of step {self.position.step + 1} ({stage}) is {value}; no weight changed",
            where=str(self.run.path),
            expected="finite numbers",
            hint="Lower the learning rate or raise the temperature; last checkpoint: "
            f"{last.name if last else 'none'}",
        )
