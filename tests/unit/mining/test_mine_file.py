from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import read_jsonl, write_jsonl, write_text
from nvembed.core.ownership import MARK
from nvembed.data.config import MiningConfig
from nvembed.data.loading import read_records
from nvembed.data.records import PairRecord
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
    with pytest.raises(ConfigError, match=r"ends in \.jsonl"):
        mine_file(tmp_path / "in.parquet", tmp_path / "out.parquet", HashEncoder(), CONFIG)


def test_bad_input_leaves_the_old_output(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_text(output, "old\n", "mine")
    source.write_text('{"query": "a", "positive": "b"}\n{"query": "a"}\n', encoding="utf-8")
    # The teacher does not exist: data are checked first.
    with pytest.raises(DataError, match=r"in\.jsonl:2: missing \"positive\""):
        mine_file(source, output, "no-such/model", CONFIG)
    with pytest.raises(ConfigError, match="no negatives to mine"):
        mine_file(source, output, "no-such/model", CONFIG, kind="clustering")
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


# --- Everything that training reads ---------------------------------------------------------------

QUESTIONS = {
    "sort a list": "list sort in place",
    "read a file": "open a file to read it",
    "sum of numbers": "sum adds numbers",
}
FAQ: list[dict[str, Any]] = [
    {"nr": number, "question": question, "answer": answer, "source": "a, b"}
    for number, (question, answer) in enumerate(QUESTIONS.items())
]
NAMES = {"query": "question", "positive": "answer"}


def _delimited(rows: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(
    "name", ["in.csv", "in.csv.gz", "in.tsv", "in.json", "in.json.gz", "in.jsonl", "in.jsonl.gz"]
)
def test_every_kind_of_file_is_mined(name: str, tmp_path: Path) -> None:
    text = json.dumps(FAQ)
    if ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in FAQ)
    elif ".csv" in name or ".tsv" in name:
        text = _delimited(FAQ, "," if ".csv" in name else "\t")
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    output = tmp_path / "out.jsonl"
    report = mine_file(tmp_path / name, output, HashEncoder(), CONFIG, columns=NAMES)
    assert report.records == 3
    rows = [row for _, row in read_jsonl(output)]
    for row, before in zip(rows, FAQ, strict=True):
        assert list(row)[:2] == ["nr", "source"]
        assert (int(row["nr"]), row["source"]) == (before["nr"], "a, b")
        assert (row["query"], row["positive"]) == (before["question"], [before["answer"]])
        assert len(row["negative"]) == 2
    pairs = [PairRecord(row["question"], (row["answer"],)) for row in FAQ]
    assert read_records(output, "retrieval") == mine_negatives(pairs, (), HashEncoder(), CONFIG)[0]


def test_layouts_are_mined(tmp_path: Path) -> None:
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    corpus = [{"_id": number, "text": row["answer"]} for number, row in enumerate(FAQ)]
    write_jsonl(tmp_path / "set" / "corpus.jsonl", corpus)
    queries = [{"_id": f"q{row['nr']}", "text": row["question"]} for row in FAQ]
    write_jsonl(tmp_path / "set" / "queries.jsonl.gz", queries)
    lines = "".join(f"q{number} 0 {number} 1\n" for number in range(3))
    (tmp_path / "set" / "qrels" / "train.tsv").write_text(lines)
    output = tmp_path / "out.jsonl"
    mine_file(tmp_path / "set", output, HashEncoder(), CONFIG, layout="beir")
    rows = [row for _, row in read_jsonl(output)]
    assert [(row["query"], row["positive"]) for row in rows] == [
        (row["question"], [row["answer"]]) for row in FAQ
    ]
    assert all(len(row["negative"]) == 2 for row in rows)
    with pytest.raises(ConfigError, match="layout tuples gives records of kind retrieval or nli"):
        mine_file(tmp_path / "set", output, HashEncoder(), CONFIG, kind="sts", layout="tuples")


def test_a_built_set_is_mined(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from nvembed.data.built_sets import write_shards
    from nvembed.data.records import Converted

    (tmp_path / "built").mkdir()
    records = [PairRecord(row["question"], (row["answer"],)) for row in FAQ]
    rows = (Converted(record, "") for record in records)
    write_shards(tmp_path / "built", rows, "retrieval", rows_per_shard=2)
    mine_file(tmp_path / "built", tmp_path / "out.jsonl", HashEncoder(), CONFIG)
    mined = read_records(tmp_path / "out.jsonl", "retrieval")
    assert mined == mine_negatives(records, (), HashEncoder(), CONFIG)[0]


def test_empty_cells_of_a_table_do_not_come_back(tmp_path: Path) -> None:
    """An optional value that is empty in a table is none, in what is written as well."""
    rows = [{"query": row["question"], "positive": row["answer"], "instruction": ""} for row in FAQ]
    rows[1]["instruction"] = "Find it"
    (tmp_path / "in.csv").write_text(_delimited(rows, ","))
    mine_file(tmp_path / "in.csv", tmp_path / "out.jsonl", HashEncoder(), CONFIG)
    mined = read_records(tmp_path / "out.jsonl", "retrieval")
    assert [record.instruction for record in mined] == [None, "Find it", None]


def test_the_command_takes_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed.cli.main import run

    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text(_delimited(FAQ, ","))
    words = ["mine", "in.csv", "out.jsonl", "--teacher", "bm25"]
    assert run(words) == 2
    assert 'in.csv: no column "query" and no column "positive"' in capsys.readouterr().err
    words += ["--column", "query=question", "--column", "positive=answer"]
    assert run(words) == 0
    mined = read_records(Path("out.jsonl"), "retrieval")
    assert [record.query for record in mined] == [row["question"] for row in FAQ]
    assert any(record.negatives for record in mined)


def test_columns_of_further_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvembed.cli.main import run

    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text(_delimited(FAQ, ","))
    write_jsonl(Path("docs.jsonl"), [{"body": f"how a thing number {n} is done"} for n in range(9)])
    words = ["mine", "in.csv", "out.jsonl", "--teacher", "bm25", "--documents", "docs.jsonl"]
    words += ["--column", "query=question", "--column", "positive=answer"]
    assert run(words) == 2  # no text in the documents
    assert run([*words, "--column", "text=body"]) == 0
    mined = read_records(Path("out.jsonl"), "retrieval")
    assert any("a thing number" in text for record in mined for text in record.negatives)
