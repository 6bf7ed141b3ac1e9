"""The model and a few steps of every stage, up to the gradients."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nvembed.core.errors import TrainingError
from nvembed.core.progress import ProgressBar, progress
from nvembed.core.runs import RunFolder
from nvembed.core.seeding import derive_seed
from nvembed.data.batch import effective_negatives
from nvembed.data.examples import ExampleSource
from nvembed.data.mixture import Mixture
from nvembed.encoding.embed import encode_texts
from nvembed.model.embedder import NVEmbed
from nvembed.model.memory import free_bytes
from nvembed.text.token_cache import TokenCache, default_cache_folder
from nvembed.training.checkpoint import trained_parameters
from nvembed.training.dry_run.findings import (
    BatchForecast,
    DataForecast,
    DryRun,
    MiningForecast,
    StageForecast,
)
from nvembed.training.dry_run.memory import forecast_memory
from nvembed.training.dry_run.stand_ins import PlannedMining, plan_mining
from nvembed.training.evaluating import evaluation_is_due
from nvembed.training.feed import Fed, Feed
from nvembed.training.graph_memory import (
    GraphMemory,
    measure_graph_memory,
    peak_bytes,
    read_graph_memory,
)
from nvembed.training.model import computing, starting_model
from nvembed.training.plan import plan_step, recomputed_share
from nvembed.training.processes import Processes
from nvembed.training.stage import StageAtWork, start_stage
from nvembed.training.step import contrastive_step
from nvembed.training.temperature import new_temperature

SAMPLED_STEPS = 20
"""Batches of a stage that are looked at, spread over it; all of a shorter stage."""

TIMED_STEPS = 4
"""Of them so many are computed, the first one to warm up; fewer where they take long."""

_MOST_SECONDS = 60.0
_SAMPLED_QUERIES = 2000
_SAMPLED_TEXTS = 256


class Rehearsal:
    """The model and a few steps of each stage."""

    def __init__(
        self,
        found: DryRun,
        run: RunFolder,
        base_dir: Path,
        mixtures: list[Mixture],
        processes: Processes,
        *,
        fresh: bool,
    ) -> None:
        self.found = found
        self.config = found.config
        self.run = run
        self.base_dir = base_dir
        self.mixtures = mixtures
        self.processes = processes
        self.fresh = fresh
        self.free = free_bytes(processes.device)
        self.peak_before = peak_bytes(processes.device)
        self.embedder = starting_model(self.config, base_dir, device=str(processes.device))
        self.tokens = TokenCache(default_cache_folder(), self.embedder.backbone.text_tokenizer)

    def play(self) -> DryRun:
        """All stages that are left."""
        config, position = self.config, self.found.position
        numbers = range(position.stage, len(config.stages))
        steps = sum(min(TIMED_STEPS, config.stages[number].steps) for number in numbers)
        with (
            computing(config, self.processes.device),
            progress(steps, "dry run") as bar,
        ):
            self.embedder.train()
            graph = self._graph_memory()
            try:
                stages = tuple(self._stage(number, graph, bar) for number in numbers)
            finally:
                self.tokens.flush()
        memory = forecast_memory(
            config,
            self.embedder,
            trained_parameters(self.embedder).values(),
            graph,
            kept_tokens=max((stage.batches.most_kept for stage in stages), default=0),
            pack_tokens=max((stage.batches.most_pack for stage in stages), default=0),
            scores=max((stage.batches.most_scores for stage in stages), default=0),
            measured=peak_bytes(self.processes.device) - self.peak_before,
            free=self.free,
        )
        return replace(self.found, stages=stages, memory=memory)

    def _graph_memory(self) -> GraphMemory:
        known = None if self.fresh else read_graph_memory(self.run.graph_memory)
        return known or measure_graph_memory(
            self.embedder, memory_gb=self.config.memory_gb, pack_tokens=self.config.pack_tokens
        )

    def _stage(self, number: int, graph: GraphMemory, bar: ProgressBar) -> StageForecast:
        config = self.config.stages[number]
        position = self.found.position
        start = position.stage_step if number == position.stage else 0
        mixture, planned = self._mixture(number)
        log_temperature = new_temperature(config, self.processes.device)
        extra = {} if log_temperature is None else {"log_temperature": log_temperature}
        stage = start_stage(
            self.config,
            number,
            Feed(mixture, config, seed=self.config.seed, tokens=self.tokens),
            trained_parameters(self.embedder, **extra),
            head=self.embedder.pooling,
            graph_tokens=graph.tokens,
            checkpoint=None,
        )
        left = config.steps - start
        chosen = np.linspace(start, config.steps - 1, min(SAMPLED_STEPS, left)).astype(int)
        sampled = [stage.feed.step(int(step)) for step in chosen]
        batches = _look_at(sampled, stage, self.embedder.backbone.max_tokens)
        per_token = self._seconds_per_token(sampled, stage, log_temperature, bar)
        to_mine = {each.dataset for each in planned}
        evaluation = self.config.evaluation
        return StageForecast(
            config,
            left,
            self._data(stage, to_mine),
            tuple(self._mining(each) for each in planned),
            batches,
            sum(
                evaluation is not None and evaluation_is_due(evaluation, step + 1, config.steps)
                for step in range(start, config.steps)
            ),
            per_token * batches.tokens,
        )

    def _mixture(self, number: int) -> tuple[Mixture, list[PlannedMining]]:
        stage = self.config.stages[number]
        if stage.mine is None:
            return self.mixtures[number], []
        # Of a run that is to be replaced nothing counts.
        folder = self.run.mined / stage.name
        return plan_mining(
            self.config,
            number,
            stage.mine,
            self.mixtures[number],
            base_dir=self.base_dir,
            mined_dir=folder / "none" if self.fresh else folder,
        )

    def _data(self, stage: StageAtWork, to_mine: set[str]) -> tuple[DataForecast, ...]:
        kinds = {dataset.name: dataset.kind for dataset in self.config.datasets}
        mixture, used = stage.feed.mixture, stage.feed.queries_used()
        rows = []
        for source, weight, slots in zip(mixture.sources, mixture.weights, used, strict=True):
            counts = _own_negatives(source, stage.config.num_negatives)
            rows.append(
                DataForecast(
                    source.name,
                    kinds[source.name],
                    len(source),
                    weight / sum(mixture.weights),
                    slots,
                    statistics.fmean(counts),
                    counts.count(0) / len(counts),
                    source.name in to_mine,
                )
            )
        return tuple(rows)

    def _seconds_per_token(
        self,
        sampled: Sequence[Fed],
        stage: StageAtWork,
        log_temperature: torch.nn.Parameter | None,
        bar: ProgressBar,
    ) -> float:
        """Compute a few steps up to the gradients, which are thrown away; the median of them."""
        timed = list(itertools.islice(itertools.cycle(sampled), TIMED_STEPS))
        found: list[float] = []
        began = time.perf_counter()
        for number, (batch, texts) in enumerate(timed):
            started = time.perf_counter()
            try:
                result = contrastive_step(
                    self.embedder,
                    batch,
                    texts,
                    stage.settings,
                    self.processes,
                    seed=derive_seed(self.config.seed, "dropout", stage.config.name, number),
                    log_temperature=log_temperature,
                )
            except FloatingPointError as error:
                raise TrainingError(
                    f"the loss of a step is {error.args[0]}",
                    where=stage.config.name,
                    expected="a finite number",
                    hint="Raise the temperature, or compute in float32",
                ) from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    "a step does not fit into memory",
                    where=stage.config.name,
                    hint="Lower memory_gb, pack_tokens or batch_size",
                ) from error
            self.processes.clip_gradients(stage.trained.values(), None)  # waits for the device
            if number:
                found.append((time.perf_counter() - started) / result.num_tokens)
            stage.optimizer.zero_grad()
            bar.advance(1)
            if found and time.perf_counter() - began > _MOST_SECONDS:
                break
        return statistics.median(found)

    def _mining(self, planned: PlannedMining) -> MiningForecast:
        """Embed a sample of the texts, and take the others to need as much per character."""
        seconds = _scaled_seconds(self.embedder, planned.documents, None)
        seconds += _scaled_seconds(self.embedder, planned.queries, planned.instruction)
        self.embedder.train()
        return MiningForecast(
            planned.dataset, len(planned.queries), len(planned.documents), seconds
        )


def _scaled_seconds(model: NVEmbed, texts: Sequence[str], task: str | None) -> float:
    step = max(1, len(texts) // _SAMPLED_TEXTS)
    sample = texts[::step]
    started = time.perf_counter()
    encode_texts(model, sample, side="document" if task is None else "query", task=task)
    seconds = time.perf_counter() - started
    return seconds * sum(map(len, texts)) / sum(map(len, sample))


def _own_negatives(source: ExampleSource, most: int) -> list[int]:
    """How many negatives the queries of a set have, of a sample spread over a large one."""
    rng = np.random.default_rng(0)
    step = max(1, len(source) // _SAMPLED_QUERIES)
    return [
        len(source.example(index, rng, most).negatives) for index in range(0, len(source), step)
    ]


def _look_at(sampled: Sequence[Fed], stage: StageAtWork, max_tokens: int) -> BatchForecast:
    """Count batches as they would be computed."""
    lengths = [[len(text) for text in texts] for _, texts in sampled]
    plans = [
        plan_step(batch, own, stage.settings, 1)
        for (batch, _), own in zip(sampled, lengths, strict=True)
    ]
    packs = [size for plan in plans for each in plan for size in each.sizes[0]]
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
        packs=len(packs) / len(sampled),
        fill=mean(packs) / stage.settings.pack_tokens,
        passes=mean(map(len, plans)),
        recomputed=mean(recomputed_share(plan, 0) for plan in plans),
        most_kept=max(each.kept_tokens(0) for plan in plans for each in plan),
        most_pack=max(packs),
        most_scores=max(each.part.negative_BN.size for plan in plans for each in plan),
    )
