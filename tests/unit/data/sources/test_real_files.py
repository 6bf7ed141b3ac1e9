"""Layouts on real files of public sets, as they were published."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nvembed.data.config import DatasetConfig
from nvembed.data.loading import open_dataset
from nvembed.data.records import BadRow, Converted, LabelRecord, PairRecord, StsRecord

BESIDE = Path(__file__).resolve().parents[5] / "shared"
SHARED = Path(os.environ.get("NVEMBED_SHARED", BESIDE)) / "data"
RAW = SHARED / "raw"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not RAW.is_dir(), reason="no shared/data/raw beside the checkout"),
]


def read(path: Path, **keys: Any) -> tuple[list[Any], list[BadRow]]:
    values = {"name": "s", "path": str(path), "kind": "retrieval", "instruction": None}
    config = DatasetConfig.model_validate(values | keys)
    rows = list(open_dataset(config, base_dir=Path()).rows)
    return (
        [row.record for row in rows if isinstance(row, Converted)],
        [row for row in rows if isinstance(row, BadRow)],
    )


def lines(path: Path) -> list[dict[str, Any]]:
    content = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with content:
        return [json.loads(line) for line in content]


@pytest.mark.parametrize("file", sorted(RAW.glob("bge_example_train/*/*.jsonl")), ids=str)
def test_flagembedding_examples(file: Path) -> None:
    rows = lines(file)
    records, bad = read(file, layout="lists")
    assert not bad
    assert len(records) == len(rows) > 0
    for record, row in zip(records, rows, strict=True):
        assert record.query == row["query"]
        assert record.positives == tuple(dict.fromkeys(row["pos"]))
        assert record.negatives == tuple(dict.fromkeys(row["neg"]))
        assert len(record.positive_scores) == len(row.get("pos_scores", ()))


def test_banking77_csv() -> None:
    records, bad = read(
        RAW / "banking77/test.csv", kind="classification", columns={"label": "category"}
    )
    assert not bad
    assert len(records) == 3080
    names = set(json.loads((RAW / "banking77/categories.json").read_text()))
    assert {record.label for record in records} == names
    published = lines(SHARED / "tasks/banking77/test.jsonl")
    assert Counter(record.label for record in records) == Counter(row["label"] for row in published)


def test_amazon_counterfactual_tsv() -> None:
    records, bad = read(
        RAW / "amazon_counterfactual_en/EN_train.tsv",
        kind="classification",
        quotes=True,
        columns={"text": "sentence", "label": "is_counterfactual"},
        label_names=["not-counterfactual", "counterfactual"],
    )
    assert not bad
    # as many as datasets.md says of each class
    assert Counter(record.label for record in records) == {
        "not-counterfactual": 3253,
        "counterfactual": 765,
    }


def test_mrpc_tsv_without_quotes() -> None:
    records, bad = read(
        RAW / "mrpc/msr-para-train.tsv",
        columns={"query": "#1 String", "positive": "#2 String"},
        where={"Quality": ["1"]},
    )
    assert not bad
    content = (RAW / "mrpc/msr-para-train.tsv").read_text(encoding="utf-8-sig")
    expected = [line.split("\t")[3:] for line in content.split("\n") if line.startswith("1\t")]
    assert [[record.query, *record.positives] for record in records] == expected
    assert records[0].query.startswith('Amrozi accused his brother, whom he called "the witness"')


def test_ag_news_csv_without_header() -> None:
    records, bad = read(
        RAW / "ag_news_test/test.csv.gz",
        kind="clustering",
        header=["class", "title", "description"],
        columns={"text": ["title", "description"], "label": "class"},
        label_names=["none", "World", "Sports", "Business", "Sci/Tech"],
    )
    assert not bad
    assert set(Counter(record.label for record in records).values()) == {1900}
    assert records[0].text.startswith("Fears for T N pension after talks Unions representing")


def test_covid_q_csv() -> None:
    records, bad = read(
        RAW / "covid_q/final_master_dataset.csv",
        kind="clustering",
        columns={"text": "Question", "label": "Category"},
    )
    with open(RAW / "covid_q/final_master_dataset.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    whole = [row for row in rows if row["Question"].strip() and row["Category"].strip()]
    assert [(record.text, record.label) for record in records] == [
        (row["Question"], row["Category"]) for row in whole
    ]
    assert len(bad) == len(rows) - len(whole) > 0
    assert {row.problem for row in bad} <= {
        '"text" is empty, expected a text',
        '"label" is empty, expected a text',
    }


def test_snli_by_premise(tmp_path: Path) -> None:
    """The same records as another converter made of the same files."""
    rows = []
    for part in ("dev", "test"):
        folder = RAW / "snli_devtest"
        first = gzip.decompress((folder / f"s1.{part}.gz").read_bytes()).decode().split("\n")
        second = gzip.decompress((folder / f"s2.{part}.gz").read_bytes()).decode().split("\n")
        labels = (folder / f"labels.{part}").read_text().split("\n")
        for premise, hypothesis, label in zip(first, second, labels, strict=True):
            if label:
                texts = {"premise": premise.strip(), "hypothesis": hypothesis.strip()}
                rows.append(texts | {"label": label})
    (tmp_path / "snli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, bad = read(tmp_path / "snli.jsonl", kind="nli", layout="entailment")
    assert not bad

    # The other converter took the spaces before punctuation away, and kept one text per side.
    def letters(text: str) -> str:
        return text.replace(" ", "")

    found = {letters(record.query): record for record in records}
    published = lines(SHARED / "train/snli_devtest.jsonl.gz")
    assert len(published) > 5000
    for row in published:
        record = found[letters(row["query"])]
        assert {*map(letters, row["positive"])} <= {*map(letters, record.positives)}
        assert {*map(letters, row["negative"])} <= {*map(letters, record.negatives)}


def test_squad_and_pubmedqa_after_flattening(tmp_path: Path) -> None:
    with gzip.open(RAW / "squad_v1.1_dev/squad_v1.1_dev.json.gz") as file:
        data = json.load(file)["data"]
    rows = [
        {"context": paragraph["context"]} | question
        for article in data
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    (tmp_path / "squad.json").write_text(json.dumps(rows))
    records, bad = read(
        tmp_path / "squad.json", columns={"query": "question", "positive": "context"}
    )
    assert not bad
    assert len(records) == len(rows) > 10_000
    answers, bad = read(
        tmp_path / "squad.json", columns={"query": "question", "positive": "answers.0"}
    )
    assert not bad
    assert answers[0] == PairRecord(rows[0]["question"], (rows[0]["answers"][0],))
    with gzip.open(RAW / "pubmedqa/ori_pqal.json.gz") as file:
        abstracts = list(json.load(file).values())
    (tmp_path / "pubmedqa.json").write_text(json.dumps(abstracts))
    records, bad = read(
        tmp_path / "pubmedqa.json",
        columns={"query": "QUESTION", "positive": ["CONTEXTS.0", "LONG_ANSWER"]},
    )
    assert not bad
    assert len(records) == 1000
    first = abstracts[0]
    assert records[0].positives == (f"{first['CONTEXTS'][0]} {first['LONG_ANSWER']}",)


def test_clinc150_of_bare_arrays(tmp_path: Path) -> None:
    with gzip.open(RAW / "clinc150/data_full.json.gz") as file:
        pairs = json.load(file)["train"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    records, bad = read(
        tmp_path / "train.jsonl", kind="classification", columns={"text": "0", "label": "1"}
    )
    assert not bad
    assert records == [LabelRecord(*pair) for pair in pairs]
    assert len(records) == 15_000


@pytest.mark.parametrize("task", ["nfcorpus", "squad_test", "cranfield"])
def test_beir_folders(task: str) -> None:
    folder = SHARED / "tasks" / task
    records, bad = read(folder, layout="beir", split="test")
    assert not bad
    judged: dict[str, list[tuple[int, str]]] = {}
    for line in (folder / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            judged.setdefault(query, []).append((-int(score), document))
    texts = {row["_id"]: row["text"] for row in lines(folder / "queries.jsonl")}
    corpus = {
        row["_id"]: f"{row['title'].strip()} {row['text'].strip()}".strip()
        for row in lines(folder / "corpus.jsonl")
    }
    expected = [
        (
            texts[query],
            tuple(
                dict.fromkeys(corpus[document] for _, document in sorted(found, key=lambda e: e[0]))
            ),
        )
        for query, found in judged.items()
    ]
    assert [(record.query.strip(), record.positives) for record in records] == expected


def test_msmarco_judgements_without_header() -> None:
    folder = RAW / "msmarco_dl19_small"
    records, bad = read(
        folder / "qrels_test.tsv",
        layout="beir",
        header=["query-id", "corpus-id", "score"],
        corpus={"path": str(folder / "corpus.jsonl.gz")},
        queries={"path": str(folder / "queries.jsonl")},
        max_positives=3,
        judged_negatives=True,
    )
    assert not bad
    assert len(records) == 43
    assert all(1 <= len(record.positives) <= 3 for record in records)


def test_stsb_to_our_scale(tmp_path: Path) -> None:
    rows = lines(SHARED / "train/stsb.jsonl.gz")
    small = [row | {"score": row["score"] / 5} for row in rows]
    (tmp_path / "stsb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in small))
    records, bad = read(tmp_path / "stsb.jsonl", kind="sts", max_score=1)
    assert not bad
    for record, row in zip(records, rows, strict=True):
        assert isinstance(record, StsRecord)
        assert record.score == pytest.approx(row["score"])
    whole, _ = read(SHARED / "train/stsb.jsonl.gz", kind="sts", max_score=5)
    assert [record.score for record in whole] == [row["score"] for row in rows]
