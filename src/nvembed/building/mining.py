"""Hard negatives for a set in the making."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from nvembed.building.tools import Tools
from nvembed.data.record_shards import Rows
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.data.sources import Converted, DatasetConfig
from nvembed.mining.miner import mine_negatives, mine_sts_negatives
from nvembed.training.build_config import BuildMining


def mined(
    dataset: DatasetConfig, config: BuildMining, rows: Rows, pool: Rows, tools: Tools
) -> tuple[Iterator[Converted], dict[str, Any]]:
    """Give records negatives from all documents of their set.

    Args:
        dataset: of kind retrieval, nli or sts.
        config: how.
        rows: the records.
        pool: all records of the set; their documents may be negatives, whether or not they are
            among ``rows``.
        tools: has the teacher.

    Returns:
        The records with negatives, in order, and the miner's report.
    """
    placed = list(rows())
    found: Sequence[PairRecord | StsRecord]
    if dataset.kind == "sts":
        found, report = mine_sts_negatives(
            cast(list[StsRecord], [row.record for row in placed]),
            None,
            tools.teacher,
            config,
            instruction=dataset.instruction,
        )
    else:
        found, report = mine_negatives(
            cast(list[PairRecord], [row.record for row in placed]),
            list(_documents(pool)),
            tools.teacher,
            config,
            instruction=dataset.instruction,
        )
    pairs = zip(cast(Sequence[Record], found), placed, strict=True)
    return (Converted(record, row.place) for record, row in pairs), report.to_json()


def _documents(rows: Rows) -> Iterator[str]:
    for row in rows():
        assert isinstance(row.record, PairRecord)
        yield from row.record.positives
        yield from row.record.negatives
