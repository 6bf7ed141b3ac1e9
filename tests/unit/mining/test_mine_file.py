from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import read_jsonl, write_jsonl, write_text
from nvembed.core.ownership import MARK
from nvembed.data.records import PairRecord, read_records
from nvembed.inference.fake import HashEncoder
from nvembed.mining.config import MiningConfig
from nvembed.mining.miner import mine_file, mine_negatives

CONFIG = MiningConfig(num_negatives=2)
ROWS = [
    {"id": 7, "query": "sort a list", "positive": "list sort in place", "source": "docs"},
    {"query": "read a file", "positive": ["open a file to read it"], "negative": ["close a file"]},
    {"query": "sum of numbers", "positive": ["sum adds numbers"]},
]


def test_rows_keep_their_keys_and_get_negatives(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    write_jsonl(tmp_path / "docs.jsonl", [{"title": "List", "text": "list of file numbers"}])
    output = tmp_path / "out.jsonl.gz"
    report = mine_file(
        tmp_path / "in.jsonl",
        output,
        HashEncoder(),
        CONFIG,
        instruction="Find it",
        documents=tmp_path / "docs.jsonl",
    )
    expected, _ = mine_negatives(
        read_records(tmp_path / "in.jsonl", "retrieval"),
        ["List list of file numbers"],
        HashEncoder(),
        CONFIG,
        instruction="Find it",
    )
    assert read_records(output, "retrieval") == expected
    assert any("List list of file numbers" in record.negatives for record in expected)
    first = next(iter(read_jsonl(output)))[1]
    assert (first["id"], first["source"], first["positive"]) == (7, "docs", "list sort in place")
    saved = json.loads((tmp_path / "out.jsonl.gz.report.json").read_text(encoding="utf-8"))
    assert saved["records"] == report.records == 3
    assert saved["config"]["threshold"] == 0.95
    assert (saved["teacher"], saved["documents"]) == ("HashEncoder", 5)
    assert saved["corpus"].endswith("docs.jsonl")
    assert saved["samples"][0]["query"] == "sort a list"


def test_scores_are_the_cosines_of_the_teacher(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"positive": ["open a file to read it", "read"]}, ROWS[2]]
    write_jsonl(tmp_path / "in.jsonl", rows)
    config = MiningConfig(num_negatives=2, write_scores=True)
    teacher = HashEncoder()
    mine_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", teacher, config, instruction="Find")
    records = read_records(tmp_path / "out.jsonl", "retrieval")
    assert any(record.negatives for record in records)
    for record in records:
        (query_D,) = teacher.encode_query([record.query], task="Find")
        texts = (*record.positives, *record.negatives)
        cosines = teacher.encode_document(list(texts)) @ query_D
        got = (*record.positive_scores, *record.negative_scores)
        assert len(record.positive_scores) == len(record.positives)
        np.testing.assert_allclose(got, cosines, atol=1e-6)
    # The same negatives as without, and mining without takes the scores away.
    mine_file(tmp_path / "out.jsonl", tmp_path / "again.jsonl", teacher, CONFIG)
    bare = [row for _, row in read_jsonl(tmp_path / "again.jsonl")]
    assert all(not key.endswith("_scores") for row in bare for key in row)
    with pytest.raises(ConfigError, match="write_scores: records of kind sts"):
        mine_file(tmp_path / "in.jsonl", tmp_path / "o.jsonl", teacher, config, kind="sts")


def test_sts_pairs(tmp_path: Path) -> None:
    rows = [
        {"sentence1": "a man eats", "sentence2": "a man eats food", "score": 4.8},
        {"sentence1": "a dog runs", "sentence2": "the sky is blue", "score": 0.2},
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    mine_file(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", HashEncoder(), MiningConfig(), kind="sts"
    )
    first, second = read_records(tmp_path / "out.jsonl", "sts")
    assert set(first.negatives) == {"a dog runs", "the sky is blue"}
    assert second.negatives == ()


def test_parquet_input(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(
        [{"query": r["query"], "positive": r["positive"][0]} for r in ROWS]
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    mine_file(tmp_path / "in.parquet", tmp_path / "out.jsonl", HashEncoder(), CONFIG)
    mined = read_records(tmp_path / "out.jsonl", "retrieval")
    assert [record.query for record in mined] == [row["query"] for row in ROWS]
    with pytest.raises(ConfigError, match="written as JSONL"):
        mine_file(tmp_path / "in.parquet", tmp_path / "out.parquet", HashEncoder(), CONFIG)


def test_bad_input_leaves_the_old_output(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_text(output, "old\n", "mine")
    source.write_text('{"query": "a", "positive": "b"}\n{"query": "a"}\n', encoding="utf-8")
    # The teacher does not exist: data are checked first.
    with pytest.raises(DataError, match=r"in\.jsonl:2: missing \"positive\""):
        mine_file(source, output, "./no-such-model", CONFIG)
    with pytest.raises(ConfigError, match="no negatives to mine"):
        mine_file(source, output, "./no-such-model", CONFIG, kind="clustering")
    with pytest.raises(ConfigError, match="same file"):
        mine_file(source, source, HashEncoder(), CONFIG)
    assert output.read_text(encoding="utf-8") == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "in.jsonl", "out.jsonl"]


def test_old_negatives_go_where_no_new_ones_are_found(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    nothing_passes = MiningConfig(strategy="absolute", threshold=-1.0, given="replace")
    mine_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", HashEncoder(), nothing_passes)
    assert all("negative" not in row for _, row in read_jsonl(tmp_path / "out.jsonl"))


def test_a_mined_file_can_be_mined_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "0.jsonl", ROWS)
    again = CONFIG.model_copy(update={"given": "replace"})
    mine_file(tmp_path / "0.jsonl", tmp_path / "1.jsonl", HashEncoder(), again)
    mine_file(tmp_path / "1.jsonl", tmp_path / "2.jsonl", HashEncoder(), again)
    first: list[PairRecord] = read_records(tmp_path / "1.jsonl", "retrieval")
    assert all(len(record.negatives) <= 2 for record in first)
    second = read_records(tmp_path / "2.jsonl", "retrieval")
    assert [r.positives for r in second] == [r.positives for r in first]
    assert any(record.negatives for record in second)
