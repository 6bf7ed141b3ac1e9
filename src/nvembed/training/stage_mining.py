"""The data of a stage with hard negatives mined anew, by the model as it is by then.

Mined files are kept; those that are there already (a resumed run) are used as they are, so mining
never happens twice. In a dry run random documents stand in for negatives that are not mined yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from nvembed.core.files import write_json, write_jsonl
from nvembed.core.runs import TRAIN, derive_seed
from nvembed.data.batch import Mixture
from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.data.examples import ExampleSource, make_source, sample_where
from nvembed.data.loading import load_mixture, load_records, load_source, training_datasets
from nvembed.data.records import PairRecord, Record
from nvembed.mining.corpus import MemoryCorpus
from nvembed.mining.miner import mine_negatives
from nvembed.mining.run import plan_records
from nvembed.model.encoder import Encoder
from nvembed.training.config import StageConfig, TrainConfig


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
    """Load the data of a stage (counted from 0) with negatives mined for its pairs."""
    datasets, kinds = [], config.stages[stage].mined_kinds
    for dataset in training_datasets(config.datasets, config.build, base_dir):
        if stage + 1 in dataset.stages and dataset.kind in kinds:
            if not mined_file(dataset, mined_dir).is_file():
                log(f"mining {settings.num_negatives} negatives per query of {dataset.name}")
                _mine(dataset, settings, base_dir=base_dir, folder=mined_dir, teacher=teacher)
            dataset = mined_dataset(dataset, mined_dir)
        datasets.append(dataset)
    return load_mixture(
        datasets,
        stage=stage + 1,
        base_dir=base_dir,
        temperature=config.stages[stage].mixture_temperature,
        graded=config.stages[stage].cosent is not None,
    )


def _mine(
    dataset: DatasetConfig,
    settings: MiningConfig,
    *,
    base_dir: Path,
    folder: Path,
    teacher: Encoder,
) -> None:
    """Write the mined records of a data set, and the report, into the folder of a stage."""
    records = load_records(dataset, base_dir=base_dir)
    places = places_to_mine(dataset, records)
    chosen = [records[place] for place in places]
    mined, report = mine_negatives(
        chosen, None, teacher, settings, instruction=dataset.instruction, further=records
    )
    write_json(folder / f"{dataset.name}.report.json", report.to_json(), TRAIN)
    rows = with_mined(records, places, mined)
    write_jsonl(mined_file(dataset, folder), (record.to_json() for record in rows), TRAIN)


def mined_file(dataset: DatasetConfig, folder: Path) -> Path:
    """Where the mined records of a data set lie in the folder of a stage."""
    return folder.absolute() / f"{dataset.name}.jsonl"


def mined_dataset(dataset: DatasetConfig, folder: Path) -> DatasetConfig:
    """The data set with its mined file in place of its own."""
    return dataset.with_file(mined_file(dataset, folder))


def places_to_mine(dataset: DatasetConfig, records: Sequence[Record]) -> Sequence[int]:
    """Which records training will see; of sts all, since it counts other things."""
    most = dataset.max_records
    if most is None or most >= len(records) or dataset.kind == "sts":
        return range(len(records))
    return [number * len(records) // most for number in range(most)]


def with_mined(
    records: Sequence[Record], places: Sequence[int], mined: Sequence[Record]
) -> list[Record]:
    """All records of a set, those that were mined for with their negatives."""
    found = dict(zip(places, mined, strict=True))
    return [found.get(place, record) for place, record in enumerate(records)]


@dataclass(frozen=True, slots=True)
class PlannedMining:
    """What the teacher of a set will have to embed: its different queries, and all documents."""

    dataset: str
    instruction: str | None
    queries: Sequence[str]
    documents: Sequence[str]


def plan_mining(
    config: TrainConfig, stage: StageConfig, mixture: Mixture, base_dir: Path, mined_dir: Path
) -> tuple[Mixture, list[PlannedMining]]:
    """Give the sets that will be mined stand-ins, and say what is to mine; write nothing."""
    datasets = {d.name: d for d in training_datasets(config.datasets, config.build, base_dir)}
    sources: list[ExampleSource] = []
    planned: list[PlannedMining] = []
    kinds, settings = stage.mined_kinds, stage.mine
    assert settings is not None
    for source in mixture.sources:
        dataset = datasets[source.name]
        if dataset.kind in kinds and mined_file(dataset, mined_dir).is_file():
            mined = mined_dataset(dataset, mined_dir)
            source = load_source(mined, base_dir=base_dir)
        elif dataset.kind in kinds:
            records = load_records(dataset, base_dir=base_dir)
            places = places_to_mine(dataset, records)
            chosen = [records[place] for place in places]
            plan = plan_records(chosen)
            queries, documents = [q for q, _ in plan.queries], MemoryCorpus(plan.corpus_texts(()))
            planned.append(
                PlannedMining(dataset.name, dataset.instruction, queries, documents.texts)
            )
            if dataset.kind != "sts":  # which draws other sentences as long as none are mined
                seed = derive_seed(config.seed, "stand-ins", dataset.name)
                pairs = cast(list[PairRecord], chosen)
                stand_ins = _with_stand_ins(pairs, documents.texts, settings, seed)
                source = make_source(
                    cast(list[PairRecord], with_mined(records, places, stand_ins)),
                    dataset.kind,
                    name=dataset.name,
                    instruction=dataset.instruction,
                    max_records=dataset.max_records,
                )
        sources.append(source)
    return Mixture(sources, mixture.weights), planned


def _with_stand_ins(
    records: Sequence[PairRecord], documents: Sequence[str], settings: MiningConfig, seed: int
) -> list[PairRecord]:
    rng = np.random.default_rng(seed)
    made = []
    for record in records:
        given = record.negatives if settings.given == "keep" else ()
        refused = {record.query, *record.positives, *given}
        drawn = sample_where(
            lambda text, refused=refused: text not in refused,  # type: ignore[misc]
            documents,
            max(0, settings.num_negatives - len(given)),
            num_refused=len(refused),
            rng=rng,
        )
        made.append(
            replace(record, negatives=(*given, *drawn), positive_scores=(), negative_scores=())
        )
    return made
