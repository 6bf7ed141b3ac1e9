from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

from nvembed.data import built_sets
from nvembed.data.built_sets import read_shards, write_shards
from nvembed.data.loading import read_records
from nvembed.data.records import (
    Converted,
    Kind,
    LabelRecord,
    PairRecord,
    Record,
    StsRecord,
    texts_of,
)

RECORDS: dict[Kind, list[Record]] = {
    "retrieval": [
        PairRecord("q", ("a", "b"), ("c",), (0.5, 1.0), (0.25,), "find"),
        PairRecord("é\u2028\n ", ("b",)),
        PairRecord("q3", ("a",), ("x", "y")),
    ],
    "sts": [StsRecord("one", "two", 4.25, ("n",)), StsRecord("one", "three", 0.0)],
    "clustering": [LabelRecord("a text", "7"), LabelRecord("a text", "x_y")],
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
def test_records_come_back(tmp_path: Path, kind: Kind, rows_per_shard: int) -> None:
    rows = [Converted(record, f"line {number}") for number, record in enumerate(RECORDS[kind])]
    with_places, without = tmp_path / "with", tmp_path / "without"
    for folder, places in ((with_places, True), (without, False)):
        folder.mkdir()
        shards = write_shards(folder, rows, kind, rows_per_shard=rows_per_shard, places=places)
        sizes = [shard.rows for shard in shards]
        assert sum(sizes) == len(rows)
        assert set(sizes[:-1]) <= {rows_per_shard}
        assert [shard.bytes for shard in shards] == [
            (folder / shard.file).stat().st_size for shard in shards
        ]
    assert list(read_shards(with_places, kind)) == rows
    assert [row.record for row in read_shards(without, kind)] == RECORDS[kind]
    if kind != "clustering":  # classes of one text
        assert read_records(without, kind) == RECORDS[kind]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [Converted(record, "") for record in RECORDS["retrieval"]]
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shards = write_shards(tmp_path / name, rows, "retrieval", rows_per_shard=2)
        hashes.append([shard.sha256 for shard in shards])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 2


def test_gigantic_texts_end_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_sets, "GROUP_CHARACTERS", 1000)
    monkeypatch.setattr(built_sets, "GROUP_ROWS", 10)
    lengths = [10] * 25 + [999, 5, 2000] + [10] * 5
    rows = [Converted(LabelRecord("x" * length, "y"), "") for length in lengths]
    write_shards(tmp_path, rows, "clustering", rows_per_shard=100)
    metadata = pyarrow.parquet.read_metadata(tmp_path / "part-00000.parquet")
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [10, 10, 6, 2, 5]


def test_all_texts_of_a_record() -> None:
    assert texts_of(RECORDS["retrieval"][0]) == ("q", "a", "b", "c")
    assert texts_of(RECORDS["sts"][0]) == ("one", "two", "n")
    assert texts_of(RECORDS["clustering"][0]) == ("a text",)


def test_a_folder_without_shards_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"no training file here; expected part-00000\.parquet"):
        read_records(tmp_path, "retrieval")
