"""Files of the user: every format, and what is broken in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvembed.core.errors import DataError, SourceError
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import load_records, load_source, open_dataset
from nvembed.data.records import Converted, PairRecord
from nvembed.data.sources import files as files_module

PAIRS = [("what is a?", "a, the first letter"), ('a "quoted" one\nover lines', "été \u2028 ok")]
EXPECTED = [PairRecord(query, (positive,)) for query, positive in PAIRS]
JSON_ROWS = [{"question": query, "answer": positive} for query, positive in PAIRS]
COLUMNS: dict[str, Any] = {"query": "question", "positive": "answer"}


def pairs(path: str, **keys: Any) -> DatasetConfig:
    values = {"name": "s", "path": path, "kind": "retrieval", "instruction": None}
    return DatasetConfig.model_validate(values | {"columns": COLUMNS} | keys)


def outcome(folder: Path, config: DatasetConfig) -> list[Any]:
    rows = open_dataset(config, base_dir=folder).rows
    return [row.record if isinstance(row, Converted) else (row.place, row.problem) for row in rows]


def delimited(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "question", "answer"])
    writer.writerows([str(n), *pair] for n, pair in enumerate(PAIRS))
    return out.getvalue().encode("utf-8-sig")


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CONTENT: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a.jsonl": (json_lines(JSON_ROWS), {}),
    "a.jsonl.gz": (gzip.compress(json_lines(JSON_ROWS)), {}),
    "list.json": (json.dumps(JSON_ROWS, indent=2).encode(), {}),
    "lines.json": (json_lines(JSON_ROWS), {}),
    "a.json.gz": (gzip.compress(json.dumps(JSON_ROWS).encode()), {}),
    "arrays.jsonl.gz": (
        gzip.compress(json_lines([list(pair) for pair in PAIRS])),
        {"columns": {"query": "0", "positive": "1"}},
    ),
    "a.csv": (delimited(","), {}),
    "a.csv.gz": (gzip.compress(delimited(",")), {}),
    "semicolons.csv": (delimited(";"), {}),
    "tabs.csv.gz": (gzip.compress(delimited("\t")), {}),
    "quoted.tsv": (delimited("\t"), {"quotes": True}),
}


@pytest.mark.parametrize("name", CONTENT)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    content, keys = CONTENT[name]
    (tmp_path / name).write_bytes(content)
    assert outcome(tmp_path, pairs(name, **keys)) == EXPECTED
    assert load_records(pairs(name, **keys), base_dir=tmp_path) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(JSON_ROWS), tmp_path / "a.parquet")
    assert outcome(tmp_path, pairs("a.parquet")) == EXPECTED
    assert load_records(pairs("a.parquet"), base_dir=tmp_path) == EXPECTED
    with pytest.raises(SourceError, match="columns found: question, answer"):
        open_dataset(pairs("a.parquet", columns={}), base_dir=tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SourceError, match=r"a\.parquet: not a readable Parquet file"):
        open_dataset(pairs("a.parquet"), base_dir=tmp_path)


def test_tsv_has_no_quotes_unless_said(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('question\tanswer\nsay "hi\t"open\n\nq\ta\n')
    assert outcome(tmp_path, pairs("a.tsv")) == [
        PairRecord('say "hi', ('"open',)),
        PairRecord("q", ("a",)),
    ]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("question;answer\n", ("question", "answer")),
        ('"question";"an, answer"\n', ("question", "an, answer")),
        ("question\tanswer\n", ("question", "answer")),
        ("a,b;c\n", ("a", "b;c")),  # commas come first, as the name says
        ('"a;b",c\n', ("a;b", "c")),
        ('"one; column"\n', ("one; column",)),
        ("one column\n", ("one column",)),
    ],
)
def test_what_separates_a_csv_file(tmp_path: Path, content: str, columns: tuple[str, ...]) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert files_module.open_file(tmp_path / "a.csv").columns == columns
    (tmp_path / "a.tsv").write_text(content)  # tabs alone, whatever is in it
    expected = len(content.split("\t"))
    assert len(files_module.open_file(tmp_path / "a.tsv").columns or ()) == expected


def test_separators_of_a_file_without_names(tmp_path: Path) -> None:
    keys = {"header": ["label", "text"], "kind": "classification", "columns": {}}
    (tmp_path / "a.csv").write_text("3;fears\n1;race, or so\n")
    texts = [one.text for one in outcome(tmp_path, pairs("a.csv", **keys))]
    assert texts == ["fears", "race, or so"]


def test_doubtful_separators_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a;b\tc\nx;y\tz\n")
    with pytest.raises(SourceError, match=r"a\.csv:1: the first line may be separated by semicol"):
        files_module.open_file(path)
    path.write_text("question;answer, if any\nq;a, b\n")
    told = r"found: question;answer, if any\. If semicolons separate them, save it with commas"
    with pytest.raises(SourceError, match=told):
        open_dataset(pairs("a.csv"), base_dir=tmp_path)
    (tmp_path / "a.tsv").write_text("question,answer\nq,a\n")
    told = r"found: question,answer\. If commas separate them, save it with commas \(\.csv\)"
    with pytest.raises(SourceError, match=told):
        open_dataset(pairs("a.tsv"), base_dir=tmp_path)


def test_numbers_of_csv(tmp_path: Path) -> None:
    """Scores are read from texts, labels by number find their names, empty negatives are none."""
    (tmp_path / "sts.csv").write_text("a,b,s\nx,y,0.5\nx,y,high\nx,y,nan\n")
    columns = {"sentence1": "a", "sentence2": "b", "score": "s"}
    found = outcome(tmp_path, pairs("sts.csv", kind="sts", columns=columns, max_score=1.0))
    assert found[0].score == 2.5
    assert [problem for _, problem in found[1:]] == [
        "\"score\" is 'high', expected a number",
        '"score" is nan, expected a number from 0 to 5',
    ]
    (tmp_path / "labels.csv").write_text("3,fears\n1,race\n")
    named = {"header": ["label", "text"], "label_names": ["-", "World", "Sports", "Business"]}
    found = outcome(tmp_path, pairs("labels.csv", kind="classification", columns={}, **named))
    assert [(record.text, record.label) for record in found] == [
        ("fears", "Business"),
        ("race", "World"),
    ]
    (tmp_path / "neg.csv").write_text("query,positive,negative\nq,p,\nq,p,n\n")
    assert outcome(tmp_path, pairs("neg.csv", columns={})) == [
        PairRecord("q", ("p",)),
        PairRecord("q", ("p",), ("n",)),
    ]


def test_broken_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"question": "q", "answer": "a"}\n'
    path.write_bytes(
        good + b'{"question": \n\n"text"\n{"question": "caf\xe9", "answer": "a"}\n'
        b'{"question": "q", "answer": 7}\n{"question": "\\ud83d", "answer": "a"}\n' + good[:-1]
    )
    assert outcome(tmp_path, pairs("a.jsonl")) == [
        PairRecord("q", ("a",)),
        (f"{path}:2", "not valid JSON (Expecting value at column 1)"),
        (f"{path}:4", "the line holds str, expected an object"),
        (f"{path}:5", "not UTF-8 text"),
        (f"{path}:6", '"positive" is 7, expected a text or a list of texts'),
        (f"{path}:7", '"query" holds half a character (a lone surrogate)'),
        PairRecord("q", ("a",)),
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON .*; line 4: the line holds"):
        load_records(pairs("a.jsonl"), base_dir=tmp_path)


def test_broken_lines_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'question,answer\r\nq,"two\r\nlines"\r\nq\r\nq,caf\xe9\r\nq,"x"y\r\n'
        b'q,a\r\nq,"never closed\r\nq,b\r\n'
    )
    assert outcome(tmp_path, pairs("a.csv")) == [
        PairRecord("q", ("two\r\nlines",)),
        (f"{path}:4", "1 fields, expected 2"),
        (f"{path}:5", "not UTF-8 text"),
        (f"{path}:6", "not a row of fields (',' expected after '\"')"),
        PairRecord("q", ("a",)),
        (f"{path}:8", "a quote is opened here and never closed"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_gigantic_lines_are_not_kept(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_LINE", 1000)
    text = "x" * 5000
    rows = [("q", "short"), ("q", text), ("q", "after")]
    if name == "a.csv":
        lines = "".join(f"{q},{a}\n" for q, a in [("question", "answer"), *rows])
    else:
        lines = json_lines([{"question": q, "answer": a} for q, a in rows]).decode()
    (tmp_path / name).write_text(lines)
    found = outcome(tmp_path, pairs(name))
    assert (found[0], found[2]) == (PairRecord("q", ("short",)), PairRecord("q", ("after",)))
    place = 3 if name == "a.csv" else 2
    assert found[1] == (f"{tmp_path / name}:{place}", "the line is longer than 0 MB")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines(JSON_ROWS * 999))[:-20])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz: broken gzip file"):
        list(open_dataset(pairs("cut.jsonl.gz"), base_dir=tmp_path).rows)
    (tmp_path / "no.csv.gz").write_bytes(b"question,answer\n")
    with pytest.raises(SourceError, match="broken gzip file"):
        open_dataset(pairs("no.csv.gz"), base_dir=tmp_path)
    (tmp_path / "cut.json").write_text('[{"question": "q"')
    with pytest.raises(SourceError, match="not valid JSON"):
        list(open_dataset(pairs("cut.json"), base_dir=tmp_path).rows)
    with pytest.raises(SourceError, match=r"none\.csv: no such file.*recipe start at its folder"):
        open_dataset(pairs("none.csv"), base_dir=tmp_path)
    with pytest.raises(SourceError, match=r"unknown kind of file 'a\.xlsx'; expected a name that"):
        open_dataset(pairs("a.xlsx"), base_dir=tmp_path)
    with pytest.raises(SourceError, match="header and quotes are of CSV and TSV files only"):
        open_dataset(pairs("cut.json", quotes=True), base_dir=tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match=r"a folder, not a file.*layout: beir"):
        open_dataset(pairs("folder"), base_dir=tmp_path)


def test_missing_columns_of_csv_are_named_before_any_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Question,reply\nq,a\n")
    with pytest.raises(SourceError) as caught:
        open_dataset(pairs("a.csv"), base_dir=tmp_path)
    assert str(caught.value) == (
        f'{tmp_path}/a.csv: no column "question" for "query" and no column "answer" for '
        '"positive"; expected one of the columns found: Question, reply. Say under `columns` what '
        "they are called there, as in `columns: {query: Question}` or --column query=Question"
    )
    (tmp_path / "a.csv").write_text("a,a\nq,a\n")
    with pytest.raises(SourceError, match=r"a\.csv:1: columns share a name: a, a"):
        open_dataset(pairs("a.csv"), base_dir=tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(SourceError, match=r"a\.csv:1: the file is empty"):
        open_dataset(pairs("a.csv"), base_dir=tmp_path)


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """Memory does not grow with the file: 20 MB of rows pass through less than 3."""
    row = json_lines([{"query": "q" * 500, "positive": "p" * 500}])
    (tmp_path / "a.jsonl").write_bytes(row * 20_000)
    opened = open_dataset(pairs("a.jsonl", columns={}), base_dir=tmp_path)
    tracemalloc.start()
    try:
        assert sum(isinstance(row, Converted) for row in opened.rows) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


# --- As training takes them -----------------------------------------------------------------------


def test_load_records_names_bad_rows_and_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "a,x\nb,x\nc,y\n")
    labels = {"kind": "classification", "columns": {}}
    with pytest.raises(DataError, match=r"a\.csv:4: label 'y' has one text only.*Add texts"):
        load_records(pairs("a.csv", **labels), base_dir=tmp_path)
    (tmp_path / "a.csv").write_text("question,answer\n" + "q\n" * 7)
    with pytest.raises(DataError, match=r"a\.csv:2: 1 fields, .* \(6 more like it: lines 3-8\);"):
        load_records(pairs("a.csv"), base_dir=tmp_path)
    (tmp_path / "a.csv").write_text("question,answer\n")
    with pytest.raises(DataError, match="the set holds no records"):
        load_records(pairs("a.csv"), base_dir=tmp_path)


def test_binary_classes_become_label_texts(tmp_path: Path) -> None:
    """The paper's rule: the name of the class is the positive, the other name the negative."""
    (tmp_path / "a.csv").write_text("review,label\nloved it,1\nawful,0\nfine,1\n")
    config = pairs(
        "a.csv",
        kind="classification",
        columns={"text": "review"},
        label_names=["negative", "positive"],
        conversion="label",
    )
    source = load_source(config, base_dir=tmp_path)
    examples = [source.example(n, np.random.default_rng(0), 7) for n in range(len(source))]
    assert [(one.query, one.positive, one.negatives) for one in examples] == [
        ("loved it", "positive", ("negative",)),
        ("awful", "negative", ("positive",)),
        ("fine", "positive", ("negative",)),
    ]


def test_a_set_on_the_hub_has_to_be_built(tmp_path: Path) -> None:
    config = pairs("x").model_copy(update={"path": None})
    with pytest.raises(SourceError, match="s: the set is on the hub and was not built yet"):
        load_records(config, base_dir=tmp_path)


def test_with_file_keeps_what_is_said_of_the_set() -> None:
    config = pairs("a.csv", weight=2.0, max_records=5, stages=[2], licence="MIT", max_positives=1)
    plain = config.with_file(Path("/built/s.parquet"))
    assert (plain.path, plain.columns, plain.max_positives) == ("/built/s.parquet", {}, None)
    assert (plain.weight, plain.max_records, plain.stages, plain.licence) == (2.0, 5, (2,), "MIT")
