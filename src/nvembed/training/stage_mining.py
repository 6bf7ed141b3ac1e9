"""The data of a stage with hard negatives mined anew, by the model as it is by then.

Mined files are kept; those that are there already (a resumed run) are used as they are, so mining
never happens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nvembed.core.files import write_json, write_jsonl
from nvembed.core.runs import TRAIN
from nvembed.data.built_sets import MINED_KINDS
from nvembed.data.config import DatasetConfig, MiningConfig
from nvembed.data.loading import load_records, training_datasets
from nvembed.data.mixture import Mixture, load_mixture
from nvembed.data.records import Record
from nvembed.encoding.encoder import Encoder
from nvembed.mining.miner import mine_negatives, mine_sts_negatives
from nvembed.training.config import TrainConfig


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
    datasets = []
    for dataset in training_datasets(config.datasets, config.build, base_dir):
        if stage + 1 in dataset.stages and dataset.kind in MINED_KINDS:
            if not mined_file(dataset, mined_dir).is_file():
                log(f"mining {settings.num_negatives} negatives per query of {dataset.name}")
                _mine(dataset, settings, base_dir=base_dir, folder=mined_dir, teacher=teacher)
            dataset = mined_dataset(dataset, mined_dir)
        datasets.append(dataset)
    temperature = config.stages[stage].mixture_temperature
    return load_mixture(datasets, stage=stage + 1, base_dir=base_dir, temperature=temperature)


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
    mine: Any = mine_sts_negatives  # of the records' kind, which mypy cannot tell
    if dataset.kind != "sts":
        mine = partial(mine_negatives, further=records)
    chosen = [records[place] for place in places]
    mined, report = mine(chosen, None, teacher, settings, instruction=dataset.instruction)
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
