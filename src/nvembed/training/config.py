"""The configuration of a training run, as a recipe gives it.

Counts carry their unit: steps are optimizer updates, batch sizes are queries per step, lengths are
tokens. ``None`` means off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nvembed.core.arguments import FloatPrecision
from nvembed.core.config import StrictModel
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.config import BuildConfig, DatasetConfig, MiningConfig
from nvembed.data.loading import local_sources
from nvembed.model.settings import LoraSettings, ModelSettings
from nvembed.training.loss_config import (
    CosentConfig,
    DistillationConfig,
    SpreadConfig,
    TeacherConfig,
)

ScheduleKind = Literal["linear", "cosine", "constant"]
OptimizerKind = Literal["adamw", "adamw_8bit", "schedule_free"]
TrackerKind = Literal["tensorboard", "trackio", "wandb"]


class OptimizerConfig(StrictModel):
    """How weights are updated.

    Args:
        kind: ``adamw``; ``adamw_8bit``, with moments in 8 bits (bitsandbytes); or
            ``schedule_free``, which averages its steps instead of lowering the rate (schedulefree).
        weight_decay: the paper's is 0.03 (recalled, medium certainty).
        beta1: decay of the mean of gradients; of ``schedule_free``, how near to the average
            gradients are taken.
        beta2: decay of the mean of their squares.
        max_grad_norm: longer gradients are scaled down to it; ``None`` is off.
    """

    kind: OptimizerKind = "adamw"
    weight_decay: float = Field(default=0.03, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)


class StageConfig(StrictModel):
    """One stage of contrastive training.

    Args:
        name: part of file names and metrics.
        steps: optimizer updates.
        batch_size: queries per step.
        learning_rate: peak rate of adapters, or of all weights without LoRA. ``None`` fits it to
            the size of the backbone and to what is trained of it (``fitting_rate`` in
            model/settings.py); later stages then have three quarters of the first one's, as in the
            paper. The run says what it takes.
        head_learning_rate: peak rate of the pooling head; ``None`` is the same (as NVIDIA did).
        warmup_steps: linear rise.
        schedule: after the warm-up: a ``linear`` or ``cosine`` fall to zero, or ``constant``.
            ``None`` is linear, and constant under the optimizer ``schedule_free``.
        in_batch_negatives: use the documents of the other queries of the step as negatives (paper:
            on in stage 1, off in stage 2).
        num_negatives: most own negatives drawn per query (paper: 7).
        num_positives: most positives drawn per query; each gives a row of the loss of its own, and
            the rows of a query together weigh as much as one. Only retrieval and NLI records list
            several positives.
        batches: ``mixed`` blends the data sets in every step (paper), ``homogeneous`` takes all
            queries of a step from one set; over the stage the shares are the same.
        mixture_temperature: T of the weights of data sets without a weight of their own, which are
            in proportion to ``size ** (1 / T)``; 1 is by size, more is more even.
        temperature: divides the scores in the softmax (not published; 0.01–0.05 is usual).
        learn_temperature: tune the temperature with the weights, from ``temperature`` on and never
            below 0.005.
        hardness: harder negatives count more: a negative's share in the sum is multiplied by
            exp(hardness · cosine); ``None`` is off.
        matryoshka: widths; the loss is the mean over embeddings cut to each of them, so that short
            embeddings are good too. Name the full width as well; ``None`` is the full width alone.
        rounded: ``int8`` and ``binary``: at each width the loss is also taken of the vectors as
            ``encode(precision=…)`` rounds them (int8 by the ranges of the step's texts), and the
            mean of all counts; gradients pass straight through. ``None`` is plain vectors alone.
        contrastive: factor of the contrastive loss; ``None`` is off, and the stage learns from its
            teacher alone.
        teacher: learn from the vectors of another model; ``None`` is off.
        cosent: order all pairs of the STS sets by their scores, in place of taking those of 4 and
            more as positives (the paper's way); ``None`` is off.
        spread: a regulariser that keeps different texts apart (GOR); ``None`` is off.
        distillation: draw the ranking of a query's own candidates to the teacher's scores that the
            records hold; ``None`` is off.
        mine: mine hard negatives for the retrieval and NLI sets before the stage, with the model as
            it is by then; ``None`` uses the negatives that the files hold.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    steps: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float | None = Field(default=None, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    schedule: ScheduleKind | None = None
    in_batch_negatives: bool
    num_negatives: int = Field(default=7, ge=0)
    num_positives: int = Field(default=1, ge=1)
    batches: Literal["mixed", "homogeneous"] = "mixed"
    mixture_temperature: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    temperature: float = Field(default=0.02, gt=0)
    learn_temperature: bool = False
    hardness: float | None = Field(default=None, gt=0)
    matryoshka: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    rounded: tuple[Literal["int8", "binary"], ...] | None = Field(default=None, min_length=1)
    contrastive: float | None = Field(default=1.0, gt=0)
    teacher: TeacherConfig | None = None
    cosent: CosentConfig | None = None
    spread: SpreadConfig | None = None
    distillation: DistillationConfig | None = None
    mine: MiningConfig | None = None

    @property
    def mined_kinds(self) -> tuple[str, ...]:
        """Kinds of sets that ``mine`` gives negatives; graded pairs have no use for them."""
        return tuple(kind for kind in MINED_KINDS if kind != "sts" or self.cosent is None)

    @property
    def losses(self) -> dict[str, float]:
        """The weights of the parts of the loss, by name."""
        scores, teacher, spread = self.distillation, self.teacher, self.spread
        weights = {
            "contrastive": self.contrastive,
            "distillation": scores.weight if scores else None,
            "similarities": teacher.similarities if teacher else None,
            "vectors": teacher.vectors if teacher else None,
            "states": teacher.states if teacher else None,
            "cosent": self.cosent.weight if self.cosent else None,
            "spread_mean": spread.mean if spread else None,
            "spread_second_moment": spread.second_moment if spread else None,
        }
        return {name: weight for name, weight in weights.items() if weight is not None}

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        contrasts = self.in_batch_negatives or self.num_negatives > 0
        if self.contrastive is not None and self.teacher is None and not contrasts:
            raise ValueError(
                "in_batch_negatives is off and num_negatives is 0: nothing to contrast with"
            )
        if not self.losses.keys() - {"spread_mean", "spread_second_moment"}:
            raise ValueError("contrastive is off, and there is no teacher: nothing to learn")
        return self


class EvaluationConfig(StrictModel):
    """Evaluation during training.

    Args:
        tasks: folders of local tasks, or of several; relative to the recipe.
        every: steps of a stage between two evaluations; the last step is evaluated in any case.
        patience: a stage ends after so many evaluations in a row that were not better than its
            best; ``None`` is never.
        keep_best: a stage ends with the weights of its best evaluation, by the mean of main scores.
        before: evaluate the model that the run starts from too, before its first step.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    every: int = Field(ge=1)
    patience: int | None = Field(default=None, ge=1)
    keep_best: bool = True
    before: bool = False


class TrainConfig(StrictModel):
    """A complete run.

    Args:
        output: run folder; relative to the working directory.
        seed: every random choice derives from it.
        model: what to start from.
        lora: adapters on the backbone; ``None`` trains all weights.
        backbone: ``train`` tunes its adapters, or all weights without LoRA; ``freeze`` leaves it as
            it was loaded, without gradient, graph and dropout, and tunes the pooling head alone.
        pooling_head: ``train`` tunes all weights of the pooling head; ``freeze`` leaves them as
            they were loaded, without gradient and out of the checkpoints.
        datasets: the training data; paths are relative to the recipe.
        build: how ``nvembed data build`` makes them into training files, which the run then reads;
            ``None`` reads the files of the sets as they are.
        stages: in order.
        optimizer: shared by the stages; each stage starts it afresh.
        shard: the backbone's weights are shared out over the processes (FSDP2), for a model that
            one device cannot hold; ``accelerate launch --use_fsdp --fsdp_version 2`` asks for it
            too.
        precision: ``bfloat16`` computes under autocast, ``auto`` takes what the machine is fastest
            in, measured when the run starts and kept to its end. What is trained is held in float32
            in any case and saved in the type that it was loaded in (``model.dtype``).
        pack_tokens: tokens per forward pass.
        memory_gb: memory (10⁹ bytes per process) for what a step keeps between forward and
            backward; texts beyond are embedded twice in a stage with in-batch negatives, and go
            group by group in one without. The loss and the gradients are the same. ``None`` takes
            half of what is free when the run starts.
        activation_checkpointing: keep only the inputs of layers for the backward pass and compute
            the rest again: several times as many tokens fit into memory, for a third more time. The
            gradients are the same.
        threads: how many compute on a CPU; ``None`` is one per core, ``auto`` as many as other
            processes leave free, which is looked at between steps of a run of one process. Another
            number of threads may change the last bits of all numbers.
        peer_timeout_minutes: how long a process waits for another within a step before it gives up;
            one that died is noticed at once.
        compile: fuse norms and gated activations with ``torch.compile`` (a few per cent on a CPU,
            which needs a C++ compiler there).
        log_every: steps between two rows of ``metrics.jsonl``.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the latest to keep.
        evaluation: on local tasks, with early stopping; ``None`` is off.
        trackers: where the numbers of ``metrics.jsonl`` go besides.
    """

    output: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    model: ModelSettings
    lora: LoraSettings | None = LoraSettings()
    backbone: Literal["train", "freeze"] = "train"
    pooling_head: Literal["train", "freeze"] = "train"
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    build: BuildConfig | None = None
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    shard: bool = False
    precision: Literal["auto"] | FloatPrecision = "auto"
    pack_tokens: int = Field(default=4096, ge=16)
    memory_gb: float | None = Field(default=None, gt=0)
    activation_checkpointing: bool = False
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    peer_timeout_minutes: float = Field(default=30, gt=0)
    compile: bool = False
    log_every: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    evaluation: EvaluationConfig | None = None
    trackers: tuple[TrackerKind, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for contradiction in self._contradictions():
            raise ValueError(contradiction)
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.model.quantization is not None and self.lora is None:
            yield (
                f"model.quantization is {self.model.quantization} and lora is off: quantised "
                "weights cannot be trained; give lora, or leave quantization out"
            )
        if self.model.quantization is not None and self.lora is not None and self.lora.dora:
            yield (
                f"lora.dora is on and model.quantization is {self.model.quantization}: the lengths "
                "of quantised rows are not those of the base that is saved; leave one of them out"
            )
        if self.model.quantization is not None and self.lora and self.lora.from_backbone:
            yield (
                f"lora.from_backbone is on and model.quantization is {self.model.quantization}: "
                "the base of saved adapters is not quantised; leave one of them out"
            )
        if self.lora and self.lora.from_backbone and self.lora.targets != "all-linear":
            yield (
                "lora.from_backbone is on and lora.targets is given: saved adapters have their own "
                "targets; leave one of them out"
            )
        if self.backbone == "freeze":
            yield from self._of_a_frozen_backbone()
        for stage in self.stages:
            unfit = stage.schedule not in (None, "constant")
            if unfit and self.optimizer.kind == "schedule_free":
                yield (
                    f"stage {stage.name}: the optimizer schedule_free has no use for a "
                    f"{stage.schedule} schedule; leave schedule out, or say constant"
                )
        yield from self._of_texts_without_labels()
        names = [dataset.name for dataset in self.datasets]
        for what, given in (("datasets", names), ("stages", [s.name for s in self.stages])):
            if repeated := sorted({name for name in given if given.count(name) > 1}):
                yield f"{what} share the name {', '.join(repeated)}; names must differ"
        if (build := self.build) is not None:
            mined = () if build.mine is None else build.mine.datasets or ()
            for key, named in (("build.bm25", build.bm25), ("build.mine.datasets", mined)):
                if unknown := sorted({*named} - {*names}):
                    yield f"{key} names {', '.join(unknown)}, which is no data set"
            if build.bm25 and not build.tasks:
                yield "build.bm25 is given without build.tasks to compare with"
        used = {number for dataset in self.datasets for number in dataset.stages}
        known = {*range(1, len(self.stages) + 1)}
        if missing := sorted(known - used):
            yield f"no data set is used in stage {', '.join(map(str, missing))}"
        if extra := sorted(used - known):
            stages = f"there are {len(known)} stages"
            yield f"data sets name stage {', '.join(map(str, extra))}, but {stages}"

    def _of_texts_without_labels(self) -> Iterator[str]:
        for number, stage in enumerate(self.stages, start=1):
            used = [dataset for dataset in self.datasets if number in dataset.stages]
            bare = [dataset.name for dataset in used if dataset.kind == "text"]
            if stage.cosent is not None and "sts" not in {dataset.kind for dataset in used}:
                yield f"stage {stage.name} has cosent, and no data set of kind sts"
            if bare and stage.teacher is None:
                yield (
                    f"stage {stage.name} has no teacher, and {', '.join(bare)} has texts without "
                    "labels: give the stage a teacher, or the set other stages"
                )

    def _of_a_frozen_backbone(self) -> Iterator[str]:
        kind = self.model.pooling.kind if self.model.pooling else None
        if self.lora is not None:
            yield (
                "backbone is freeze and lora is on: adapters would change the backbone; set "
                "lora to null"
            )
        if self.pooling_head == "freeze":
            yield "backbone and pooling_head are both freeze: nothing to train"
        if kind in ("mean", "last"):
            yield (
                f"backbone is freeze and {kind} pooling has no weights: nothing to train; take "
                "latent or self_attention"
            )
        if self.activation_checkpointing:
            yield (
                "backbone is freeze and activation_checkpointing is on: a frozen backbone keeps "
                "nothing for the backward pass; leave it out"
            )

    def input_paths(self, base_dir: Path, recipe: Path | None = None) -> list[Path]:
        """The files and folders that building and training read; names of the hub lead nowhere."""
        build_mine = self.build.mine if self.build else None
        mining = [build_mine, *(stage.mine for stage in self.stages)]
        names = [self.model.backbone]
        names += self.evaluation.tasks if self.evaluation else ()
        names += self.build.tasks if self.build else ()
        names += [build_mine.teacher] if build_mine else ()
        for teacher in filter(None, (stage.teacher for stage in self.stages)):
            names += [teacher.name, *([teacher.file.texts] if teacher.file else [])]
        names += [mine.rerank for mine in mining if mine is not None and mine.rerank is not None]
        found = [path for dataset in self.datasets for path in local_sources(dataset, base_dir)]
        # Some of them are looked for beside the recipe, some where the command runs.
        read = [*found, *(base_dir / name for name in names), *map(Path, names)]
        return read if recipe is None else [recipe, *read]


FREE_KEYS = {
    "output",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "threads",
    "peer_timeout_minutes",
}
"""Keys of a recipe that may change while a run is stopped: no weight depends on them, but for the
last bits on ``threads``, as on the machine."""


def recipe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old → new`` for every key that differs and is not one of ``FREE_KEYS``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {before.get(key, 'not there')} → {after.get(key, 'not there')}"
        for key in before | after
        if before.get(key) != after.get(key) and key.split(".")[0] not in FREE_KEYS
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Values of nested data, as JSON, by dotted path."""
    if isinstance(value, Mapping):
        inside = [*value.items()]
    elif isinstance(value, list | tuple):
        inside = [*enumerate(value)]
    else:
        yield path.removeprefix("."), json.dumps(value, ensure_ascii=False)
        return
    for key, item in inside:
        yield from _leaves(item, f"{path}.{key}")


def training_inputs(config: TrainConfig, base_dir: Path, recipe: Path | None = None) -> list[Path]:
    """What training reads: as ``input_paths``, and the built sets where there are some."""
    found = config.input_paths(base_dir, recipe)
    if config.build is not None:
        folder = base_dir / config.build.folder
        found += [folder / dataset.name for dataset in config.datasets]
    return found
