"""Hard negatives for a set in the making; the miner works on files and may be killed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError
from nvembed.core.files import read_json_object, read_jsonl, tidy, write_jsonl
from nvembed.data.built_sets import Rows
from nvembed.data.config import BuildMining, DatasetConfig
from nvembed.data.records import Converted, PairRecord, record_of
from nvembed.mining.miner import mine_file
from nvembed.mining.ranking import BM25_NAME
from nvembed.mining.selection import MiningReport


def teacher_name(name: str, base_dir: Path) -> str:
    """The folder or file of a teacher where one lies beside the recipe, else what it is called."""
    local = base_dir / name
    return str(local) if name != BM25_NAME and local.exists() else name


def mined(
    dataset: DatasetConfig,
    config: BuildMining,
    rows: Rows,
    pool: Rows | None,
    *,
    work: Path,
    base_dir: Path,
) -> tuple[Iterator[Converted], dict[str, Any]]:
    """Give records negatives from all documents of their set; return them with the miner's report.

    ``pool`` is all records of the set, where there are more: their documents may be negatives too,
    but not those that answer the same query. ``work`` holds what is computed of these records and
    settings.
    """
    names = ("in", "documents", "further", "out")
    records, documents, further, output = (work / f"{name}.jsonl" for name in names)
    tidy(work, "*")
    report = _report(work)
    if report is None:  # the last that the miner writes
        write_jsonl(records, (row.record.to_json() for row in rows()))
        if pool is not None:
            write_jsonl(documents, ({"text": text} for text in _documents(pool)))
            write_jsonl(further, (row.record.to_json() for row in pool()))
        mine_file(
            records,
            output,
            teacher_name(config.teacher, base_dir),
            config.model_copy(update={"write_scores": False}) if dataset.kind == "sts" else config,
            kind=dataset.kind,
            instruction=dataset.instruction,
            documents=None if pool is None else documents,
            further=None if pool is None else further,
            dtype=config.dtype,
            teacher_model=config.teacher_model,
            work=work,
        )
        report = _report(work)
        assert report is not None
    found = (Converted(record_of(row, dataset.kind), "") for _, row in read_jsonl(output))
    return found, report


def _report(work: Path) -> dict[str, Any] | None:
    """Read the numbers of a report; ``None`` where it is not there, or damaged."""
    try:
        report = read_json_object(work / "out.jsonl.report.json", "a report")
        # The others name files of this machine.
        names = [*(field.name for field in fields(MiningReport)), "computing"]
        return {name: report[name] for name in names}
    except (DataError, KeyError):
        return None


def _documents(rows: Rows) -> Iterator[str]:
    for row in rows():
        assert isinstance(row.record, PairRecord)
        yield from row.record.positives
        yield from row.record.negatives
