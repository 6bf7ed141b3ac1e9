"""The data of the stages; before one that wants it, hard negatives are mined for its pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from nvembed.core.files import write_json, write_jsonl
from nvembed.core.runs import TRAIN
from nvembed.data.built_sets import MINED_KINDS, training_datasets
from nvembed.data.mining_config import MiningConfig
from nvembed.data.mixture import Mixture, load_mixture
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.data.sources import DatasetConfig, load_records
from nvembed.encoding.protocol import Encoder
from nvembed.mining.miner import mine_negatives, mine_sts_negatives
from nvembed.training.config import TrainConfig
from nvembed.training.fitting import check_distillation


def load_mixtures(config: TrainConfig, base_dir: Path) -> list[Mixture]:
    """Read the data of all stages as the files hold them.

    Raises:
        DataError: a file cannot be used.
        ConfigError: they lack what an option of the recipe needs.
    """
    datasets = training_datasets(config, base_dir)
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

    Args:
        config: the run.
        stage: index of the stage, from 0.
        settings: how to mine.
        base_dir: folder of the recipe.
        mined_dir: where this stage's mined files go.
        teacher: model that scores the candidates: the one in training, as it is now.
        log: told one line per mined set.
    """
    datasets = [
        _mined(dataset, settings, base_dir=base_dir, folder=mined_dir, teacher=teacher, log=log)
        if dataset.kind in MINED_KINDS
        else dataset
        for dataset in training_datasets(config, base_dir)
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
