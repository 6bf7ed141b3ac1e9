from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nvembed.core.errors import DataError
from nvembed.inference.reading import Document, Skipped, input_files, read_documents

ROWS = [
    {"_id": "a", "title": "T", "text": "one\u2028line", "year": 1999},
    {"_id": 2, "text": "two"},
]


def _pairs(*paths: str | Path, **options: object) -> list[tuple[str | None, str]]:
    return [(one.id, one.text) for one in read_documents(paths, **options)]  # type: ignore[arg-type]


def _jsonl(path: Path, rows: list[object]) -> Path:
    lines = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    content = lines.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_json_lines_give_id_text_metadata_and_place(tmp_path: Path, name: str) -> None:
    path = _jsonl(tmp_path / name, [*ROWS])
    assert list(read_documents([path])) == [
        Document("a", "T one\u2028line", {"title": "T", "year": 1999}, f"{path}:1"),
        Document("2", "two", {}, f"{path}:2"),
    ]


def test_tables_give_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('id,body,n\nx,"a, b",1\ny,c,2\n')
    pq.write_table(
        pa.table({"id": ["x", "y"], "body": ["a, b", "c"], "n": ["1", "2"]}),
        tmp_path / "in.parquet",
    )
    found = [
        [(d.id, d.text, d.metadata) for d in read_documents([tmp_path / name], text_key="body")]
        for name in ("in.csv", "in.parquet")
    ]
    assert found[0] == found[1] == [("x", "a, b", {"n": "1"}), ("y", "c", {"n": "2"})]
    assert _pairs(tmp_path / "in.csv", text_key="body", id_key="n") == [("1", "a, b"), ("2", "c")]


def test_text_is_lines_alone_and_whole_files_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("first\n\nsecond\n")
    (folder / "sub" / "a.md").write_text("# Title\ntext")
    (folder / ".hidden.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\x89")
    _jsonl(folder / "c.jsonl", [{"id": "j", "text": "row"}])
    assert _pairs(folder / "b.txt") == [(None, "first"), (None, "second")]
    assert _pairs(folder) == [
        ("b.txt", "first\n\nsecond\n"),
        ("j", "row"),
        ("sub/a.md", "# Title\ntext"),
    ]
    assert [path.name for path in input_files([folder])] == ["b.txt", "c.jsonl", "a.md"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"one\ntwo\n", [(None, "one"), (None, "two")]), (b'{"id": 1, "text": "x"}\n', [("1", "x")])],
)
def test_stdin_is_lines_or_json(
    monkeypatch: pytest.MonkeyPatch, content: bytes, expected: object
) -> None:
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stream))
    assert _pairs("-") == expected


BAD = [
    ("{not json\n", "not valid JSON"),
    ({"text": ""}, "empty"),
    ({"text": 3}, "not a text"),
    ({"body": "x"}, 'no key "text" (keys: "body")'),
    ({"text": "\ud800"}, "surrogate"),
    ({"text": "x", "id": 1.5}, "neither text nor integer"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, row: object, problem: str) -> None:
    path = _jsonl(tmp_path / "in.jsonl", [ROWS[0], row])
    with pytest.raises(DataError) as caught:
        list(read_documents([path]))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert problem in str(caught.value)
    assert "--keep-going" in str(caught.value)


def test_keep_going_leaves_bad_lines_out_and_counts_them(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "in.jsonl", [ROWS[0], *(row for row, _ in BAD), ROWS[1]])
    lines = tmp_path / "in.txt"
    lines.write_bytes(b"good\n\xff\xfe\n")
    skipped = Skipped()
    found = _pairs(path, lines, keep_going=True, skipped=skipped)
    assert [id for id, _ in found] == ["a", "2", None]
    assert skipped.count == len(BAD) + 1
    assert [bad.place for bad in skipped.first] == [f"{path}:{line}" for line in range(2, 7)]


def test_what_is_not_there_or_of_no_known_kind_is_an_error_even_so(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text\n" * 1000)[:-9])
    (tmp_path / "empty").mkdir()
    for name, problem in (
        ("none", "no such file"),
        ("x.png", "unknown kind"),
        ("cut.txt.gz", "cannot be read"),
        ("empty", "no documents"),
    ):
        with pytest.raises(DataError, match=problem):
            _pairs(tmp_path / name, keep_going=True)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps({"text": "x" * 1000}) + "\n") * 5000)
    tracemalloc.start()
    count = sum(1 for _ in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 1_000_000
