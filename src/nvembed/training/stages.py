"""What a stage works with: its data, its batches, its optimizer and learning rate.

A batch is a pure function of (seed, stage, step). A run settles the learning rates that its recipe
leaves open when its model is loaded; they then stand in its ``config.yaml``. ``schedule_free`` is
AdamW that trains at one point and is evaluated at an average of its steps (Defazio et al., 2024).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nvembed.core import background
from nvembed.core.errors import ConfigError
from nvembed.core.reporting import progress
from nvembed.core.runs import derive_seed
from nvembed.data.batch import (
    ContrastiveBatch,
    GivenText,
    Mixture,
    build_batch,
    effective_negatives,
    given_texts,
)
from nvembed.data.examples import Example
from nvembed.data.instructions import PromptedText
from nvembed.data.loading import load_mixture, training_datasets
from nvembed.model.embedder import NVEmbed
from nvembed.model.settings import TunedPart, fitting_rate, shown_rate
from nvembed.model.tokens import TextTokenizer, TokenizedText
from nvembed.training.checkpoint import Parameters, restore_optimizer
from nvembed.training.config import OptimizerConfig, ScheduleKind, StageConfig, TrainConfig
from nvembed.training.contrastive_loss import Objective
from nvembed.training.metrics import WINDOW, movement
from nvembed.training.step import StepSettings
from nvembed.training.teacher import PROJECTION, Teacher, TeacherStandIn
from nvembed.training.teacher_states import TeacherStates

# What torch's fused kernels, and bitsandbytes' 8-bit ones, exist for.
_FUSED_DEVICES = {"cpu", "cuda"}
_EIGHT_BIT_DEVICES = {"cpu", "cuda", "xpu"}

LATER_SHARE = 0.75  # of the first stage's rate, as the paper has it: 1.5e-5 after 2e-5

_GOOD = 0.9  # accuracy from which on a loss that stands still is no fault of the learning rate

PreparedBatch = tuple[ContrastiveBatch, Sequence[TokenizedText]]


def load_mixtures(config: TrainConfig, base_dir: Path) -> list[Mixture]:
    """Read the data of all stages as the files hold them."""
    datasets = training_datasets(config.datasets, config.build, base_dir)
    kinds = {dataset.name: dataset.kind for dataset in config.datasets}
    mixtures = [
        load_mixture(
            datasets,
            stage=n,
            base_dir=base_dir,
            temperature=stage.mixture_temperature,
            graded=stage.cosent is not None,
        )
        for n, stage in enumerate(config.stages, start=1)
    ]
    for number, (stage, mixture) in enumerate(zip(config.stages, mixtures, strict=True)):
        # Mining gives new scores or takes those away that were there.
        mined = {} if stage.mine is None else dict.fromkeys(("retrieval", "nli"), stage.mine)
        scored = [
            mine.write_scores if (mine := mined.get(kinds[source.name])) else source.scored
            for source in mixture.sources
        ]
        if stage.distillation is not None and not any(scored):
            names = ", ".join(source.name for source in mixture.sources)
            raise ConfigError(
                f"no record of {names} has a teacher's scores",
                where=f"stages.{number}.distillation",
                expected='records with "positive_scores" and "negative_scores"',
                hint="Set mine.write_scores of the stage, or leave distillation out",
            )
    return mixtures


class DataLoader:
    """Batches of a stage."""

    def __init__(
        self, mixture: Mixture, stage: StageConfig, *, seed: int, tokenizer: TextTokenizer
    ) -> None:
        self.mixture = mixture
        self.stage = stage
        self.tokenizer = tokenizer
        self.teacher: Teacher | TeacherStandIn | None = None  # which has the vectors of all texts
        self.states: TeacherStates | None = None
        self._seed = derive_seed(seed, "data", stage.name)
        self._order = mixture.order(
            self._seed,
            stage.steps * stage.batch_size,
            run_length=stage.batch_size if stage.batches == "homogeneous" else 1,
        )

    def describe(self) -> str:
        """One line that says what the stage will do."""
        stage = self.stage
        sizes = ", ".join(f"{source.name} {len(source):,}" for source in self.mixture.sources)
        return (
            f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} queries; "
            f"loss {' + '.join(f'{weight:g} {name}' for name, weight in stage.losses.items())}; "
            f"in-batch negatives {'on' if stage.in_batch_negatives else 'off'}; "
            f"effective negatives per query {effective_negatives(self.batch(0)):.1f}; data: {sizes}"
        )

    def queries_used(self) -> list[int]:
        """How many slots of the stage each source fills, in the order of the mixture."""
        used = self._order[:, 0]
        return [int((used == source).sum()) for source in range(len(self.mixture.sources))]

    def batch(self, step: int) -> ContrastiveBatch:
        """The batch of a step of the stage, counted from 0."""
        examples = self._examples(step)
        return build_batch(examples, in_batch_negatives=self.stage.in_batch_negatives)

    def given(self, start: int) -> Iterator[GivenText]:
        """All texts of the stage from a step on, as the data sets give them."""
        with progress(self.stage.steps - start, f"{self.stage.name}: texts") as bar:
            for step in range(start, self.stage.steps):
                yield from given_texts(self._examples(step)).values()
                bar.advance(1)

    def _examples(self, step: int) -> list[Example]:
        first = step * self.stage.batch_size
        return self.mixture.examples(
            self._order,
            first,
            first + self.stage.batch_size,
            seed=self._seed,
            num_negatives=self.stage.num_negatives,
            num_positives=self.stage.num_positives,
        )

    def step(self, step: int) -> PreparedBatch:
        """The batch of a step with its teacher's vectors, and the tokens of its texts."""
        batch = self.batch(step)
        if self.teacher is not None:
            batch = replace(batch, teacher_UE=self.teacher.vectors(batch.given_U))
        return batch, tokenized(self.tokenizer, batch.texts)

    @contextmanager
    def steps(self, start: int, *, prefetch: bool) -> Iterator[Iterator[PreparedBatch]]:
        """Give an iterator over the steps from ``start`` to the last."""
        prepared = (self.step(step) for step in range(start, self.stage.steps))
        if prefetch:
            prepared = cast("Generator[PreparedBatch]", background.prefetch(prepared))
        with closing(prepared):  # where the block ends early, a step may still be in preparation
            yield prepared


def tokenized(tokenizer: TextTokenizer, texts: Sequence[PromptedText]) -> list[TokenizedText]:
    """Tokenise (prompt, text) pairs, one call per prompt; a cache would save only 1 % of time."""
    rows_by_prompt: dict[str, list[int]] = {}
    for row, (prompt, _) in enumerate(texts):
        rows_by_prompt.setdefault(prompt, []).append(row)
    found: dict[int, TokenizedText] = {}
    for prompt, rows in rows_by_prompt.items():
        found |= zip(rows, tokenizer([texts[row][1] for row in rows], prompt), strict=True)
    return [found[row] for row in range(len(texts))]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage (its number counts from 0) that is ready to start, or to go on."""

    number: int
    config: StageConfig
    loader: DataLoader
    settings: StepSettings
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def start_stage(
    config: TrainConfig,
    number: int,
    loader: DataLoader,
    trained: dict[str, nn.Parameter],
    *,
    head: nn.Module,
    activation_budget: int,
    checkpoint: Path | None,
) -> Stage:
    """Build the optimizer of a stage, or put it back as it was."""
    stage = config.stages[number]
    optimizer = build_optimizer(trained, head, stage, config.optimizer)
    training_weights(optimizer)
    if checkpoint is not None:
        restore_optimizer(checkpoint, trained, optimizer)
    objective = Objective.of_stage(stage)
    coupled = stage.in_batch_negatives or objective.coupled
    room = (config.pack_tokens, activation_budget)
    settings = StepSettings(objective, coupled, *room, states=loader.states)
    return Stage(number, stage, loader, settings, trained, optimizer)


def schedule(step: int, *, steps: int, warmup_steps: int, kind: ScheduleKind = "linear") -> float:
    """Share of the peak rate at an update, from 0: a linear rise, then a fall by ``kind``."""
    warmup_steps = min(warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (steps - step) / max(1, steps - warmup_steps)
    match kind:
        case "linear":
            return left
        case "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        case "constant":
            return 1.0


def stage_schedule(step: int, stage: StageConfig, config: OptimizerConfig) -> float:
    """``schedule`` at an update of a stage, of the kind that stage and optimizer ask for."""
    default: ScheduleKind = "constant" if config.kind == "schedule_free" else "linear"
    kind = stage.schedule or default
    return schedule(step, steps=stage.steps, warmup_steps=stage.warmup_steps, kind=kind)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def build_optimizer(
    trained: Parameters, head: nn.Module, stage: StageConfig, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer of a stage; no decay on vectors and latents, peak rates as ``peak``."""
    in_head = {id(parameter) for parameter in head.parameters()}
    backbone_rate = peak_rate(stage)
    head_rate = stage.head_learning_rate or backbone_rate
    split: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        of_head = id(parameter) in in_head or name == PROJECTION
        rate = head_rate if of_head else backbone_rate
        decays = parameter.ndim > 1 and "latents" not in name and "embed_tokens" not in name
        # No kernel takes sharded and other parameters together.
        kind = (rate, config.weight_decay if decays else 0.0, isinstance(parameter, DTensor))
        split.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay, _), parameters in split.items()
    ]
    devices = {parameter.device.type for parameter in trained.values()}
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw":
        fused = devices <= _FUSED_DEVICES and all(p.is_floating_point() for p in trained.values())
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    if config.kind == "adamw_8bit" and (unfit := sorted(devices - _EIGHT_BIT_DEVICES)):
        raise ConfigError(
            f"adamw_8bit cannot run on {unfit[0]}",
            where="optimizer.kind",
            expected=f"parameters on {', '.join(sorted(_EIGHT_BIT_DEVICES))}",
            hint="Use adamw",
        )
    try:
        if config.kind == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            made: torch.optim.Optimizer = AdamW8bit(groups, betas=betas)
        else:
            from schedulefree import AdamWScheduleFree

            # On a CPU, going over all tensors operation by operation only costs cache misses.
            made = AdamWScheduleFree(groups, betas=betas, foreach=devices == {"cuda"})
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{config.kind} needs the package {error.name!r}",
            where="optimizer.kind",
            hint="Install it with: pip install 'nvembed[optimizers]'",
        ) from error
    return made


def training_weights(optimizer: Any) -> None:
    """Bring the parameters to where gradients are taken, which must precede the first step."""
    if hasattr(optimizer, "train"):  # others evaluate where they train
        optimizer.train()


def averaged_weights(optimizer: Any) -> None:
    """Bring the parameters to where the model is evaluated, for good: the way back rounds."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


# --- Learning rates -------------------------------------------------------------------------------


def backbone_elements(model: NVEmbed) -> int:
    """Number of the backbone's weights, without those of adapters."""
    return sum(
        # Of 4 bits two lie in a byte.
        parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)
        for name, parameter in model.backbone.named_parameters()
        if "lora_" not in name
    )


def with_fitting_rates(config: TrainConfig, model: NVEmbed) -> tuple[TrainConfig, str | None]:
    """Give the stages without a learning rate one that fits; and a line that says so."""
    first, *later = config.stages
    if all(stage.learning_rate is not None for stage in config.stages):
        return config, None
    count = backbone_elements(model)
    part: TunedPart = "all" if config.lora is None else "adapters"
    if config.backbone == "freeze":
        part = "head"
    rate = first.learning_rate or fitting_rate(count, part)
    after = float(f"{rate * LATER_SHARE:.1e}")
    rates = [rate, *(stage.learning_rate or after for stage in later)]
    named = [
        f"{shown_rate(rate)} in {stage.name}"
        for stage, rate in zip(config.stages, rates, strict=True)
        if stage.learning_rate is None
    ]
    what = {"adapters": "LoRA on", "all": "all of", "head": "the head on"}[part]
    why = f"{what} {count / 1e6:.1f} M parameters"
    if first.learning_rate is not None:
        why = f"{LATER_SHARE} of that of {first.name}"
    line = f"learning rate {', '.join(named)}: {why}; fix with stages.NAME.learning_rate"
    return with_rates(config, rates), line


def with_rates(config: TrainConfig, rates: Sequence[float | None]) -> TrainConfig:
    """The run with these rates in those of its stages that have none."""
    given = [*rates, *[None] * len(config.stages)]
    stages = tuple(
        stage.model_copy(update={"learning_rate": stage.learning_rate or rate})
        for stage, rate in zip(config.stages, given, strict=False)
    )
    return config.model_copy(update={"stages": stages})


def peak_rate(stage: StageConfig) -> float:
    """The learning rate of a stage of a run that has settled it."""
    if stage.learning_rate is None:
        raise ConfigError(
            "the learning rate is not settled",
            where=f"stages.{stage.name}.learning_rate",
            expected="a number",
        )
    return stage.learning_rate


class LossWatch:
    """Tells once, some steps after the warm-up, of a loss that has not moved, or has risen.

    A stage that ends before, or goes on in the middle, is not judged.
    """

    def __init__(self, stage: StageConfig, start: int) -> None:
        self.stage = stage
        self.due = None if start else max(stage.warmup_steps, WINDOW) + WINDOW
        self.losses: list[float] = []
        self.right: list[float] = []  # share of the queries that were answered rightly

    def after(self, row: Mapping[str, Any]) -> str | None:
        """Take the numbers of the next step; a line where there is something to tell."""
        if self.due is None or len(self.losses) == self.due:
            return None
        self.losses.append(row["loss"])
        self.right.append(row["accuracy"] or 0.0)
        if len(self.losses) < self.due:
            return None
        direction = movement(self.losses)
        if direction < 0:
            return None
        first, last = self.losses[:WINDOW], self.losses[-WINDOW:]
        means = " → ".join(
            f"{statistics.fmean(part):.3f} ± {statistics.stdev(part):.3f}" for part in (first, last)
        )
        right = min(statistics.fmean(part) for part in (self.right[:WINDOW], self.right[-WINDOW:]))
        if not direction and right >= _GOOD:
            return (
                f"{self.stage.name}: the loss was low from the start and stays so ({means}, "
                f"{WINDOW} steps each): {right:.0%} of the queries find their answer among "
                "those of a step; hard negatives leave more to learn (nvembed mine)"
            )
        what, why = ("has risen", "high") if direction else ("has not moved", "low")
        return (
            f"{self.stage.name}: the loss {what} in {self.due} steps ({means}, {WINDOW} steps "
            f"each): the learning rate of {shown_rate(peak_rate(self.stage))} may be too {why}; "
            "nvembed train RECIPE --find-rate tries others"
        )
