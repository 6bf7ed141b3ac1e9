from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nvembed.core.errors import DataError
from nvembed.core.files import write_jsonl
from nvembed.data.loading import read_records
from nvembed.data.records import Kind, LabelRecord, PairRecord, StsRecord, label_text

PAIR = {"query": "q", "positive": "p"}
SCORED = {"query": "q", "positive": ["p", "o"], "positive_scores": [0.5, 0.1]}
SCORED |= {"negative": ["n", "m"], "negative_scores": [-1, 0.3]}
STS = {"sentence1": "a", "sentence2": "b", "score": 3}
LABELS = [{"text": str(n), "label": label} for n, label in enumerate(["x", "y", "x", "y"])]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_pairs(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "positive": "p1", "query_id": 7},
        {"query": "q2", "positive": ["p2", "p3", "p2"], "negative": ["n1", "n2"]},
        {"query": "q3", "positive": ["p"], "negative": None},
    ]
    expected = [
        PairRecord("q1", ("p1",)),
        PairRecord("q2", ("p2", "p3"), ("n1", "n2")),
        PairRecord("q3", ("p",)),
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert read_records(path, "retrieval") == expected
    assert read_records(str(path), "nli") == expected


def test_reads_the_scores_of_a_teacher(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "p", "positive_scores": 0.5},
        {"query": "q", "positive": "p", "positive_scores": [1], "negative": []},
        {
            "query": "q",
            "positive": ["p", "o", "p"],
            "positive_scores": [0.5, 7, 0.5],
            "negative": ["n", "m"],
            "negative_scores": [-1.5, 0.25],
        },
        {"query": "q", "positive": "p", "negative": "n"}
        | {"positive_scores": None, "negative_scores": None},
    ]
    assert read_records(write(tmp_path / "x.jsonl", rows), "retrieval") == [
        PairRecord("q", ("p",), (), (0.5,)),
        PairRecord("q", ("p",), (), (1.0,)),
        PairRecord("q", ("p", "o"), ("n", "m"), (0.5, 7.0), (-1.5, 0.25)),
        PairRecord("q", ("p",), ("n",)),
    ]


def test_reads_the_instruction_of_a_record(tmp_path: Path) -> None:
    rows = [PAIR | {"instruction": "Find it"}, PAIR, PAIR | {"instruction": None}]
    records = read_records(write(tmp_path / "x.jsonl", rows), "retrieval")
    assert [record.instruction for record in records] == ["Find it", None, None]
    assert [record.to_json().get("instruction", 0) for record in records] == ["Find it", 0, 0]


def test_reads_sts_and_labels(tmp_path: Path) -> None:
    rows = [STS, {"sentence1": "c", "sentence2": "d", "score": 4.5, "negative": ["e"]}]
    assert read_records(write(tmp_path / "s.jsonl", rows), "sts") == [
        StsRecord("a", "b", 3.0),
        StsRecord("c", "d", 4.5, ("e",)),
    ]
    rows = [*LABELS, {"text": "t", "label": 5}, {"text": "u", "label": "5"}]
    for kind in ("classification", "clustering"):
        records = read_records(write(tmp_path / "l.jsonl", rows), kind)
        assert records[:2] == [LabelRecord("0", "x"), LabelRecord("1", "y")]
        assert records[-2:] == [LabelRecord("t", "5"), LabelRecord("u", "5")]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    text = "one\u2028two\x85three"
    line = json.dumps({"query": text, "positive": "p"}, ensure_ascii=False)
    path.write_bytes(gzip.compress(f"{line}\n\n{line}\n".encode()))
    assert [record.query for record in read_records(path, "retrieval")] == [text, text]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("retrieval", [PAIR, {"query": "q", "positive": ["a", "b"], "negative": ["c"]}]),
        ("nli", [PAIR | {"positive_scores": 0.25}, SCORED]),
        ("retrieval", [PAIR, PAIR | {"instruction": "Find it"}]),
        ("sts", [STS, STS | {"negative": ["é\u2028"]}]),
        ("clustering", LABELS),
    ],
)
def test_json_round_trip_and_parquet(tmp_path: Path, kind: Kind, rows: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    records = read_records(write(tmp_path / "x.jsonl", rows), kind)
    assert len(records) == len(rows)
    write_jsonl(tmp_path / "again.jsonl.gz", [record.to_json() for record in records])
    assert read_records(tmp_path / "again.jsonl.gz", kind) == records
    # Arrow takes its columns from the first row.
    table = pyarrow.Table.from_pylist([record.to_json() for record in reversed(records)])
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read_records(tmp_path / "x.parquet", kind) == records[::-1]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("retrieval", {"positive": "p"}, 'missing "query"'),
        ("retrieval", {"text": "p"}, 'missing "query" and "positive"'),
        ("nli", {"query": "q"}, 'missing "positive"'),
        ("retrieval", {"query": "", "positive": "p"}, '"query" is empty'),
        ("retrieval", {"query": " \n\t", "positive": "p"}, '"query" is empty'),
        ("retrieval", {"query": 3, "positive": "p"}, '"query" is 3, expected a text'),
        ("retrieval", {"query": None, "positive": "p"}, '"query" is null, expected a text'),
        ("retrieval", {"query": "q", "positive": []}, '"positive" is an empty list'),
        ("retrieval", {"query": "q", "positive": {"a": 1}}, '"positive" is an object'),
        ("retrieval", {"query": "q", "positive": ["p", ""]}, '"positive[1]" is empty'),
        ("retrieval", PAIR | {"instruction": " "}, '"instruction" is empty'),
        ("retrieval", PAIR | {"instruction": ["x"]}, '"instruction" is a list, expected a text'),
        ("retrieval", PAIR | {"negative": ["n", False]}, '"negative[1]" is false'),
        ("retrieval", {"query": "q\ud800", "positive": "p"}, '"query" holds half a character'),
        (
            "retrieval",
            SCORED | {"positive_scores": [0.5]},
            '"positive_scores" and "positive" differ in length: 1, 2',
        ),
        (
            "retrieval",
            SCORED | {"negative_scores": [1, 2, 3]},
            '"negative_scores" and "negative" differ in length: 3, 2',
        ),
        ("nli", PAIR | {"negative_scores": [1]}, '"negative_scores" and "negative" differ'),
        (
            "nli",
            SCORED | {"negative_scores": None},
            '"positive_scores" is there and "negative_scores" is missing',
        ),
        (
            "nli",
            SCORED | {"positive_scores": None},
            '"negative_scores" is there and "positive_scores" is missing',
        ),
        ("nli", SCORED | {"positive_scores": 0.5}, '"positive_scores" is 0.5, expected a list'),
        (
            "nli",
            SCORED | {"positive_scores": [0.5, "1"]},
            '"positive_scores[1]" is a text, expected a number',
        ),
        ("nli", SCORED | {"positive_scores": [True, 1]}, '"positive_scores[0]" is true'),
        (
            "nli",
            SCORED | {"negative_scores": [0, float("nan")]},
            '"negative_scores[1]" is nan, expected a finite number',
        ),
        ("nli", SCORED | {"negative_scores": [10**400, 0]}, '"negative_scores[0]" is inf'),
        (
            "nli",
            SCORED | {"negative": ["n", "n"]},
            '"negative_scores[1]" is another score of the same text',
        ),
        ("sts", {"sentence1": "a", "score": 1}, 'missing "sentence2"'),
        ("sts", STS | {"sentence2": ""}, '"sentence2" is empty'),
        ("sts", STS | {"score": "4"}, '"score" is a text, expected a number from 0 to 5'),
        ("sts", STS | {"score": True}, '"score" is true, expected a number from 0 to 5'),
        ("sts", STS | {"score": 5.1}, '"score" is 5.1, expected a number from 0 to 5'),
        ("sts", STS | {"score": -1}, '"score" is -1'),
        ("sts", STS | {"score": float("nan")}, '"score" is nan'),
        ("sts", STS | {"score": float("inf")}, '"score" is inf'),
        ("classification", {"text": "t"}, 'missing "label"'),
        (
            "clustering",
            {"text": "t", "label": 1.5},
            '"label" is 1.5, expected a text or an integer',
        ),
        ("clustering", {"text": "t", "label": " "}, '"label" is empty'),
        ("classification", {"text": ["t"], "label": "x"}, '"text" is a list, expected a text'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, kind: Kind, row: Any, message: str) -> None:
    good = {"retrieval": [PAIR], "nli": [PAIR], "sts": [STS]}.get(kind, LABELS)
    path = write(tmp_path / "x.jsonl", [*good, row])
    with pytest.raises(DataError) as caught:
        read_records(path, kind)
    assert caught.value.where == f"{path}:{len(good) + 1}"
    assert caught.value.message.startswith(message)
    assert caught.value.expected is not None
    assert caught.value.expected.startswith("{")
    assert "\n" not in str(caught.value)


def test_all_kinds_of_bad_lines_are_reported_up_to_five(tmp_path: Path) -> None:
    rows: list[Any] = [PAIR, {"query": "q"}, PAIR, {"positive": "p"}]
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path / "two.jsonl", rows), "retrieval")
    assert caught.value.where == f"{tmp_path}/two.jsonl:2"
    assert caught.value.message == 'missing "positive"; line 4: missing "query"'
    rows = [PAIR] + [{"query": "q", "positive": [{}]}] * 8 + [{"query": "q"}]
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path / "x.jsonl", rows), "retrieval")
    assert caught.value.where == f"{tmp_path}/x.jsonl:2"
    assert caught.value.message == (
        '"positive[0]" is an object, expected a text (7 more like it: lines 3-9); '
        'line 10: missing "positive"'
    )


def test_bad_lines_before_broken_json_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "q"}\n{"query": \n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r'x.jsonl:1: missing "positive".*x.jsonl:2: not valid JSON'
    ):
        read_records(path, "retrieval")


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.jsonl", "sts")
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.parquet", "sts")
    with pytest.raises(DataError, match="the file holds no records"):
        read_records(write(tmp_path / "empty.jsonl", []), "clustering")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_records(tmp_path / "bad.parquet", "sts")


def test_parquet_rows_are_counted_like_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    table = pyarrow.table({"query": ["q", "q", ""], "positive": ["p", None, "p"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        DataError, match=r'x.parquet:2: "positive" is null.*; line 3: "query" is empty'
    ):
        read_records(tmp_path / "x.parquet", "retrieval")


def test_labels_with_one_text_are_refused_by_example(tmp_path: Path) -> None:
    rows = [*LABELS, {"text": "alone", "label": "z"}, {"text": "w", "label": "w"}]
    path = write(tmp_path / "x.jsonl", [*rows, {"text": "w", "label": "w"}])
    with pytest.raises(DataError) as caught:
        read_records(path, "classification")
    assert caught.value.where == f"{path}:5"
    assert "label 'z' has one text only" in caught.value.message
    assert "line 6: label 'w' has one text only" in caught.value.message  # twice the same text
    assert caught.value.hint is not None
    assert "conversion: label" in caught.value.hint
    assert len(read_records(path, "classification", conversion="label")) == 7


@pytest.mark.parametrize("conversion", ["example", "label"])
def test_a_single_label_is_refused(tmp_path: Path, conversion: Any) -> None:
    rows = [{"text": text, "label": "x"} for text in "abc"]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x.jsonl:1: 'x' is the only label of the set"):
        read_records(path, "clustering", conversion=conversion)


def test_labels_that_are_no_words_are_refused_as_texts(tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": label} for text, label in zip("abcd", [1, 2, 1, 2], strict=True)
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert len(read_records(path, "clustering")) == 4
    with pytest.raises(DataError, match=r"x.jsonl:1: label '1' says nothing.*example"):
        read_records(path, "clustering", conversion="label")


def test_labels_that_become_one_text_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": "a_b"}, {"text": "u", "label": "a b"}]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x.jsonl:2: labels 'a_b' and 'a b' give the same text"):
        read_records(path, "classification", conversion="label")


def test_label_text() -> None:
    assert label_text("card_arrival") == "card arrival"
    assert label_text("Refund not_showing__up") == "Refund not showing up"
    assert label_text("C#  (lang)") == "C#  (lang)"


def test_every_shared_training_set_reads(shared: Any) -> None:
    folder = shared("data/train")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("covid_faq", "stsb", "emotion", "mediqa_train"):
        entry = manifest[name]
        records = read_records(folder / f"{name}.jsonl.gz", entry["kind"])
        assert len(records) == entry["records"]
    with pytest.raises(DataError, match="label 'cheapest' has one text only"):
        read_records(folder / "atis.jsonl.gz", "classification")
