"""The stages of a run: their data, mined anew where the recipe asks for it, batches and optimizer.

A batch is a pure function of (seed, stage, step); the thread that prepares the next one while the
model works on this one changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from nvembed.core.errors import ConfigError
from nvembed.core.files import write_json, write_jsonl
from nvembed.core.runs import TRAIN
from nvembed.core.seeding import derive_seed
from nvembed.data.batch import ContrastiveBatch, build_batch
from nvembed.data.build_config import MiningConfig
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import load_records, training_datasets
from nvembed.data.mixture import Mixture, load_mixture
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.encoding.encoder import Encoder
from nvembed.mining.miner import mine_negatives, mine_sts_negatives
from nvembed.text.token_cache import TokenCache
from nvembed.text.tokens import TokenizedText
from nvembed.training.checkpoint import restore_optimizer
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.objective import stage_objective
from nvembed.training.optim import build_optimizer, training_weights
from nvembed.training.step import StepSettings


def check_distillation(config: TrainConfig, mixtures: Sequence[Mixture]) -> None:
    """Make sure that a stage that learns from a teacher's scores has some."""
    kinds = {dataset.name: dataset.kind for dataset in config.datasets}
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


def load_mixtures(config: TrainConfig, base_dir: Path) -> list[Mixture]:
    """Read the data of all stages as the files hold them.

    Raises:
        DataError: a file cannot be used.
        ConfigError: they lack what an option of the recipe needs.
    """
    datasets = training_datasets(config.datasets, config.build, base_dir)
    mixtures = [
        load_mixture(
            datasets,
            stage=number,
            base_dir=base_dir,
            temperature=stage.mixture_temperature,
        )
        for number, stage in enumerate(config.stages, start=1)
    ]
    check_distillation(config, mixtures)
    return mixtures


def mine_mixture(
    config: TrainConfig,
    stage: int,
    settings: MiningConfig,
    *,
    base_dir: Path,
    mined_dir: Path,
    teacher: Encoder,
    log: Callable[[str], None],
) -> Mixture:
    """Load the data of a stage with negatives mined for its pairs.

    Mined files are kept in ``mined_dir``; those that are there already (a resumed run) are used as
    they are, so mining never happens twice.
    """
    datasets = [
        _mined(dataset, settings, base_dir=base_dir, folder=mined_dir, teacher=teacher, log=log)
        if dataset.kind in MINED_KINDS
        else dataset
        for dataset in training_datasets(config.datasets, config.build, base_dir)
        if stage + 1 in dataset.stages
    ]
    temperature = config.stages[stage].mixture_temperature
    return load_mixture(datasets, stage=stage + 1, base_dir=base_dir, temperature=temperature)


def _mined(
    dataset: DatasetConfig,
    settings: MiningConfig,
    *,
    base_dir: Path,
    folder: Path,
    teacher: Encoder,
    log: Callable[[str], None],
) -> DatasetConfig:
    """The data set with its mined file in place of its own, which is made where it is missing."""
    target = mined_file(dataset, folder)
    if not target.is_file():
        log(f"mining {settings.num_negatives} negatives per query of {dataset.name}")
        records = load_records(dataset, base_dir=base_dir)
        places = places_to_mine(dataset, records)
        chosen = [records[place] for place in places]
        mined: Sequence[PairRecord | StsRecord]
        if dataset.kind == "sts":
            mined, report = mine_sts_negatives(
                cast(list[StsRecord], chosen),
                None,
                teacher,
                settings,
                instruction=dataset.instruction,
            )
        else:
            mined, report = mine_negatives(
                cast(list[PairRecord], chosen),
                None,
                teacher,
                settings,
                instruction=dataset.instruction,
                further=cast(list[PairRecord], records),
            )
        write_json(folder / f"{dataset.name}.report.json", report.to_json(), TRAIN)
        rows = with_mined(records, places, mined)
        write_jsonl(target, (record.to_json() for record in rows), TRAIN)
    return mined_dataset(dataset, folder)


def mined_file(dataset: DatasetConfig, folder: Path) -> Path:
    """Where the mined records of a data set lie in the folder of a stage."""
    return folder.absolute() / f"{dataset.name}.jsonl"


def mined_dataset(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    """The data set with its mined file in place of its own."""
    return dataset.with_file(mined_file(dataset, folder))


def places_to_mine(dataset: DatasetConfig, records: Sequence[Record]) -> Sequence[int]:
    """Which records training will see: mining the others would be work for nothing.

    Of sts, ``max_records`` counts directions of pairs scored 4 or more, so all records are needed.
    """
    most = dataset.max_records
    if most is None or most >= len(records) or dataset.kind == "sts":
        return range(len(records))
    return [number * len(records) // most for number in range(most)]


def with_mined(
    records: Sequence[Record], places: Sequence[int], mined: Sequence[Record]
) -> list[Record]:
    """All records of a set, those that were mined for with their negatives.

    The others stay, since training must know what answers a query in any of them.
    """
    found = dict(zip(places, mined, strict=True))
    return [found.get(place, record) for place, record in enumerate(records)]


# New tokens wait in memory until they are written; this bounds how many, and what a kill costs.
FLUSH_STEPS = 200


PreparedBatch = tuple[ContrastiveBatch, Sequence[TokenizedText]]


class DataLoader:
    """Batches of a stage."""

    def __init__(
        self, mixture: Mixture, stage: StageConfig, *, seed: int, tokens: TokenCache
    ) -> None:
        self.mixture = mixture
        self.stage = stage
        self.tokens = tokens
        self._seed = derive_seed(seed, "data", stage.name)
        self._order = mixture.order(
            self._seed,
            stage.steps * stage.batch_size,
            run_length=stage.batch_size if stage.batches == "homogeneous" else 1,
        )

    def queries_used(self) -> list[int]:
        """How many slots of the stage each source fills, in the order of the mixture."""
        counts = np.bincount(self._order[:, 0], minlength=len(self.mixture.sources))
        return [int(count) for count in counts]

    def batch(self, step: int) -> ContrastiveBatch:
        """The batch of a step of the stage, counted from 0."""
        first = step * self.stage.batch_size
        examples = self.mixture.examples(
            self._order,
            first,
            first + self.stage.batch_size,
            seed=self._seed,
            num_negatives=self.stage.num_negatives,
            num_positives=self.stage.num_positives,
        )
        return build_batch(examples, in_batch_negatives=self.stage.in_batch_negatives)

    def step(self, step: int) -> PreparedBatch:
        """The batch of a step and the tokens of its texts."""
        batch = self.batch(step)
        return batch, self.tokens(batch.texts)

    @contextmanager
    def steps(self, start: int, *, prefetch: bool) -> Iterator[Iterator[PreparedBatch]]:
        """Give an iterator over the steps from ``start`` to the last.

        New tokens are kept for the next run when the block ends, however it ends.
        """
        prepared = self._prefetched(start) if prefetch else self._one_by_one(start)
        try:
            yield prepared
        finally:
            prepared.close()  # where the block ends early, a step may still be in preparation
            self.tokens.flush()

    def _one_by_one(self, start: int) -> Generator[PreparedBatch]:
        for step in range(start, self.stage.steps):
            yield self._prepared(step)

    def _prefetched(self, start: int) -> Generator[PreparedBatch]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data-loader") as pool:
            coming: Future[PreparedBatch] | None = None
            for step in range(start, self.stage.steps):
                coming = coming or pool.submit(self._prepared, step)
                ready = coming.result()
                more = step + 1 < self.stage.steps
                coming = pool.submit(self._prepared, step + 1) if more else None
                yield ready

    def _prepared(self, step: int) -> PreparedBatch:
        prepared = self.step(step)
        if (step + 1) % FLUSH_STEPS == 0:
            self.tokens.flush()
        return prepared


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage works with.

    Args:
        number: from 0.
        config: its part of the recipe.
        loader: its batches.
        settings: of its steps.
        trained: parameters by name.
        optimizer: of all of them.
    """

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
    settings = StepSettings(
        objective=stage_objective(stage),
        coupled=stage.in_batch_negatives,
        pack_tokens=config.pack_tokens,
        activation_budget=activation_budget,
    )
    return Stage(number, stage, loader, settings, trained, optimizer)
