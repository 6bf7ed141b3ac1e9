"""The data of a stage before its negatives are mined, with documents that stand in for them.

Which negatives a query will get is known only when the model of that moment has been asked; how
many, and about how long they are, is known before. So random documents of the set take their place:
the queries of every step are already those of the run, and the batches have its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from nvembed.core.runs import derive_seed
from nvembed.data.build_config import MiningConfig
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import POSITIVE_SCORE, ExampleSource, make_source, sample_where
from nvembed.data.loading import load_records, training_datasets
from nvembed.data.mixture import Mixture, load_source
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.mining.corpus import MemoryCorpus
from nvembed.mining.ranking import Query
from nvembed.training.config import TrainConfig
from nvembed.training.stage_mining import mined_dataset, mined_file, places_to_mine, with_mined


@dataclass(frozen=True, slots=True)
class PlannedMining:
    """What the teacher of a set will have to embed: its different queries, and all documents."""

    dataset: str
    instruction: str | None
    queries: Sequence[str]
    documents: Sequence[str]


def plan_mining(
    config: TrainConfig,
    stage: int,
    settings: MiningConfig,
    mixture: Mixture,
    *,
    base_dir: Path,
    mined_dir: Path,
) -> tuple[Mixture, list[PlannedMining]]:
    """Give the sets that will be mined negatives of the right number; nothing is written.

    Returns:
        The mixture, whose queries come in the order of the run, and what is left to be mined.
    """
    datasets = {
        dataset.name: dataset
        for dataset in training_datasets(config.datasets, config.build, base_dir)
    }
    sources: list[ExampleSource] = []
    planned: list[PlannedMining] = []
    for source in mixture.sources:
        dataset = datasets[source.name]
        if dataset.kind not in MINED_KINDS:
            sources.append(source)
        elif mined_file(dataset, mined_dir).is_file():
            sources.append(load_source(mined_dataset(dataset, mined_dir), base_dir=base_dir))
        else:
            records = load_records(dataset, base_dir=base_dir)
            places = places_to_mine(dataset, records)
            chosen = [records[place] for place in places]
            planned.append(_to_embed(dataset, chosen))
            if dataset.kind == "sts":  # draws other sentences as long as none are mined
                sources.append(source)
            else:
                pairs = cast(list[PairRecord], chosen)
                seed = derive_seed(config.seed, "stand-ins", dataset.name)
                stand_ins = _with_stand_ins(pairs, planned[-1].documents, settings, seed)
                sources.append(
                    make_source(
                        cast(list[PairRecord], with_mined(records, places, stand_ins)),
                        dataset.kind,
                        name=dataset.name,
                        instruction=dataset.instruction,
                        max_records=dataset.max_records,
                    )
                )
    return Mixture(sources, mixture.weights), planned


def _to_embed(dataset: DatasetConfig, records: Sequence[Record]) -> PlannedMining:
    """The texts that ``mining/miner.py`` embeds for these records."""
    queries: dict[Query, None] = {}
    pool = MemoryCorpus()
    for record in records:
        if isinstance(record, PairRecord):
            queries[record.query, record.instruction] = None
            documents = (*record.positives, *record.negatives)
        else:
            assert isinstance(record, StsRecord)
            sentences = (record.sentence1, record.sentence2)
            if record.score >= POSITIVE_SCORE:
                queries.update(dict.fromkeys((text, None) for text in sentences))
            documents = (*sentences, *record.negatives)
        for text in documents:
            pool.add(text)
    texts = tuple(text for text, _ in queries)
    return PlannedMining(dataset.name, dataset.instruction, texts, pool.texts)


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
