"""A dry run: the first minute of a run, with its own parts, and nothing written.

A few steps of every stage that is left are taken in memory, updates included; time and peak memory
are measured, and the rest is counted on a sample of the batches. Which negatives a query will get
is known only when the model of that moment has been asked, so random documents stand in for them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from nvembed.core.errors import ConfigError, TrainingError, UserError
from nvembed.core.reporting import ProgressBar, progress
from nvembed.core.runs import RunFolder
from nvembed.data.batch import Mixture, effective_negatives
from nvembed.kernels.machine import watched_threads
from nvembed.model.backbone import free_bytes
from nvembed.model.bulk import encode_texts
from nvembed.training import checkpoint, metrics, model, run_folder, stages
from nvembed.training.checkpoint import (
    Position,
    trained_parameters,
)
from nvembed.training.config import TrainConfig, training_inputs
from nvembed.training.distributed import DistributedContext
from nvembed.training.forecast import (
    BatchForecast,
    DataForecast,
    DryRun,
    StageForecast,
    TrainingMemory,
)
from nvembed.training.loss_config import TeacherConfig
from nvembed.training.model import peak_bytes
from nvembed.training.stage_mining import PlannedMining, plan_mining
from nvembed.training.step import plan_step, recomputed_share
from nvembed.training.teacher import Teacher, TeacherStandIn, teacher_fingerprint
from nvembed.training.teacher_states import teacher_states
from nvembed.training.trial import TriedStage

SAMPLED_STEPS = 20  # batches of a stage that are counted, spread over it
TIMED_STEPS = 4  # of them taken, the largest first, to warm up; fewer where they take long
_MOST_SECONDS = 60.0
_SAMPLED_QUERIES = 2000
_SAMPLED_TEXTS = 256

Found = TypeVar("Found")


class SeveralError(UserError):
    """Several mistakes at once, each with a line of its own in ``problems``."""

    def __init__(self, problems: Sequence[UserError]) -> None:
        super().__init__(" | ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def dry_run(config: TrainConfig, *, base_dir: Path, fresh: bool = False) -> DryRun:
    """Find out what ``train`` with the same arguments would do."""
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            f"{launched} processes were started",
            where="--dry-run",
            expected="one: it forecasts one process that does all the work",
        )
    run = RunFolder(Path(config.output))
    config, _ = run_folder.with_settled_choices(config, run, fresh=fresh)
    problems: list[UserError] = []

    def noted(find: Callable[[], Found]) -> Found | None:
        """Keep an error of ``find``, so that the next question can be asked too."""
        try:
            return find()
        except UserError as error:
            problems.append(error)
            return None

    evaluation = config.evaluation
    resumed = noted(lambda: _checkpoint(run, config, base_dir, fresh=fresh))
    mixtures = noted(lambda: stages.load_mixtures(config, base_dir))
    tasks = noted(lambda: metrics.load_evaluation_tasks(evaluation, base_dir) if evaluation else [])
    noted(lambda: metrics.tracker_options(config.trackers, run))
    for teacher in filter(None, (stage.teacher for stage in config.stages)):
        noted(partial(teacher_fingerprint, teacher, base_dir))
    begun = not fresh and run.exists and run.has_results and run.inputs.exists()
    if mixtures is not None and tasks is not None and begun:
        noted(
            lambda: run_folder.check_inputs(
                run, run_folder.inputs_of(config, base_dir, mixtures, tasks)
            )
        )
    if problems or mixtures is None or tasks is None:
        raise SeveralError(problems)
    device = DistributedContext.of_environment().device
    found = DryRun(
        config,
        checkpoint.read_position(resumed) if resumed else Position(),
        resumed,
        finished=not fresh and run_folder.is_finished(run),
        replaces=fresh and run.exists,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        tasks=tuple(task.name for task in tasks),
    )
    return found if found.finished else _Rehearsal(found, run, base_dir, mixtures, fresh).play()


def _checkpoint(run: RunFolder, config: TrainConfig, base_dir: Path, *, fresh: bool) -> Path | None:
    """Find what the run would go on from; refuse a folder that the run would refuse."""
    inputs = training_inputs(config, base_dir)
    run_folder.check_folder(run, config, fresh=fresh, inputs=inputs)
    found = None if fresh or not run.exists else checkpoint.latest_checkpoint(run.checkpoints)
    if found is not None:
        checkpoint.check_recipe(found, config.model_dump(mode="json"))
    return found


class _Rehearsal:
    """The model of a run, and a few steps of each stage that is left."""

    def __init__(
        self, found: DryRun, run: RunFolder, base_dir: Path, mixtures: list[Mixture], fresh: bool
    ) -> None:
        self.run, self.base_dir, self.mixtures, self.fresh = run, base_dir, mixtures, fresh
        self.processes = DistributedContext.of_environment()
        device = self.processes.device
        self.free, self.peak_before = free_bytes(device), peak_bytes(device)
        self.embedder = model.starting_model(found.config, base_dir, device=str(device))
        self.config, rates = stages.with_fitting_rates(found.config, self.embedder)
        self.found = replace(found, config=self.config, rates=rates)

    def play(self) -> DryRun:
        config, device = self.config, self.processes.device
        numbers = range(self.found.position.stage, len(config.stages))
        steps = sum(min(TIMED_STEPS, config.stages[number].steps) for number in numbers)
        with (
            watched_threads(config.threads),
            model.computing(config, device),
            progress(steps, "dry run") as bar,
        ):
            self.embedder.train()
            known = None if self.fresh else model.read_activation_budget(self.run.graph_memory)
            self.budget = known or model.measure_activation_budget(self.embedder, config)
            found = tuple(self._stage(number, bar) for number in numbers)
        memory = TrainingMemory(
            elements=sum(parameter.numel() for parameter in self.embedder.parameters()),
            trained=sum(each.numel() for each in trained_parameters(self.embedder).values()),
            graph=self.budget,
            peak=peak_bytes(device) - self.peak_before,
            free=self.free,
        )
        return replace(self.found, stages=found, memory=memory)

    def _stage(self, number: int, bar: ProgressBar) -> StageForecast:
        config, position = self.config.stages[number], self.found.position
        start = position.stage_step if number == position.stage else 0
        mixture, planned = self.mixtures[number], list[PlannedMining]()
        if config.mine is not None:
            # Of a run that is to be replaced nothing counts.
            folder = self.run.mined / config.name / ("none" if self.fresh else "")
            mixture, planned = plan_mining(self.config, config, mixture, self.base_dir, folder)
        mining_seconds = sum(map(self._mining_seconds, planned))
        tokenizer = self.embedder.backbone.text_tokenizer
        loader = stages.DataLoader(mixture, config, seed=self.config.seed, tokenizer=tokenizer)
        standing = self._standing_in(config.teacher, loader, start)
        loader.teacher = standing
        tried = TriedStage(
            self.embedder,
            self.config,
            number,
            loader,
            self.processes,
            activation_budget=self.budget.tokens,
        )
        stage = tried.stage
        left, evaluation = config.steps - start, self.config.evaluation
        chosen = np.linspace(start, config.steps - 1, min(SAMPLED_STEPS, left)).astype(int)
        sampled = [stage.loader.step(int(step)) for step in chosen]
        batches = _count(sampled, stage, self.embedder.backbone.max_tokens)
        return StageForecast(
            config,
            left,
            self._data(stage, {each.dataset for each in planned}),
            tuple(planned),
            mining_seconds,
            standing,
            batches,
            sum(
                evaluation is not None
                and metrics.evaluation_is_due(evaluation, step + 1, config.steps)
                for step in range(start, config.steps)
            )
            + (evaluation is not None and evaluation.before and position.step == number == 0),
            self._seconds_per_token(sampled, tried, bar) * batches.tokens,
        )

    def _data(self, stage: stages.Stage, to_mine: set[str]) -> tuple[DataForecast, ...]:
        kinds = {dataset.name: dataset.kind for dataset in self.config.datasets}
        mixture, rows = stage.loader.mixture, []
        weights, used = mixture.weights, stage.loader.queries_used()
        for source, weight, slots in zip(mixture.sources, weights, used, strict=True):
            name, rng = source.name, np.random.default_rng(0)
            chosen = range(0, len(source), max(1, len(source) // _SAMPLED_QUERIES))
            most = stage.config.num_negatives
            examples = [source.example(index, rng, most) for index in chosen]
            counts = [len(one.negatives) for one in examples if one.positive is not None] or [-1]
            share, mean = weight / sum(weights), max(0.0, statistics.fmean(counts))
            without, mined = counts.count(0) / len(counts), name in to_mine
            rows.append(
                DataForecast(name, kinds[name], len(source), share, slots, mean, without, mined)
            )
        return tuple(rows)

    def _seconds_per_token(
        self,
        sampled: Sequence[stages.PreparedBatch],
        tried: TriedStage,
        bar: ProgressBar,
    ) -> float:
        """Take a few steps, the largest first, so that memory is that of the largest."""
        found: list[float] = []
        began = time.perf_counter()
        largest_first = sorted(sampled, key=lambda prepared: -sum(map(len, prepared[1])))
        timed = itertools.islice(itertools.cycle(largest_first), TIMED_STEPS)
        stage = tried.stage
        rate = stages.stage_schedule(0, stage.config, self.config.optimizer)
        stages.set_learning_rate(stage.optimizer, rate)
        for number, prepared in enumerate(timed):
            started = time.perf_counter()
            try:
                result = tried.step(number, prepared)
            except FloatingPointError as error:
                raise TrainingError(
                    f"the loss of a step is {error.args[0]}",
                    where=stage.config.name,
                    expected="a finite number",
                    hint="Raise the temperature, or compute in float32",
                ) from error
            if number:
                found.append((time.perf_counter() - started) / result.num_tokens)
            bar.advance(1)
            if found and time.perf_counter() - began > _MOST_SECONDS:
                break
        return statistics.median(found)

    def _standing_in(
        self, settings: TeacherConfig | None, loader: stages.DataLoader, start: int
    ) -> TeacherStandIn | None:
        """Something in the place of the teacher's vectors, and how long those will take."""
        if settings is None:
            return None
        loader.states = teacher_states(loader.stage, self.base_dir, self.embedder)
        if not settings.of_texts:
            return None
        with torch.autocast(self.processes.device.type, enabled=False):
            teacher = Teacher(settings, self.base_dir)
            return teacher.rehearse(loader.given(start), _SAMPLED_TEXTS)

    def _mining_seconds(self, planned: PlannedMining) -> float:
        """Embed a sample of the texts, and take the others to need as much per character."""
        seconds = 0.0
        for texts, task in ((planned.documents, None), (planned.queries, planned.instruction)):
            sample = texts[:: max(1, len(texts) // _SAMPLED_TEXTS)]
            started = time.perf_counter()
            side: Literal["query", "document"] = "document" if task is None else "query"
            encode_texts(self.embedder, sample, side=side, task=task)
            took = time.perf_counter() - started
            seconds += took * sum(map(len, texts)) / sum(map(len, sample))
        self.embedder.train()
        return seconds


def _count(
    sampled: Sequence[stages.PreparedBatch], stage: stages.Stage, max_tokens: int
) -> BatchForecast:
    lengths = [[len(text) for text in texts] for _, texts in sampled]
    every = [length for own in lengths for length in own]
    mean = statistics.fmean
    return BatchForecast(
        sampled=len(sampled),
        texts=mean(map(len, lengths)),
        most_texts=max(map(len, lengths)),
        tokens=mean(map(sum, lengths)),
        most_tokens=max(map(sum, lengths)),
        full=sum(length >= max_tokens for length in every) / len(every),
        duplicates=mean(1 - len(batch.texts) / batch.mentioned for batch, _ in sampled),
        negatives=mean(effective_negatives(batch) for batch, _ in sampled),
        recomputed=mean(
            recomputed_share(plan_step(batch, own, stage.settings, 1), 0)
            for (batch, _), own in zip(sampled, lengths, strict=True)
        ),
    )
