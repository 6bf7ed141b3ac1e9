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

from nvembed.core.errors import ConfigError, DataError
from nvembed.data.reading import Document, Skipped, input_files, read_documents

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
        [
            (d.id, d.text, d.metadata)
            for d in read_documents([tmp_path / name], columns={"text": "body"})
        ]
        for name in ("in.csv", "in.parquet")
    ]
    assert found[0] == found[1] == [("x", "a, b", {"n": "1"}), ("y", "c", {"n": "2"})]
    assert _pairs(tmp_path / "in.csv", columns={"text": "body", "id": "n"}) == [
        ("1", "a, b"),
        ("2", "c"),
    ]


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


BOTH = [("a", "one"), (None, "two")]
JSON_TEXTS = {
    "lines": '{"docid": "a", "text": "one"}\n{"text": "two"}\n',
    "list": '[{"docid": "a", "text": "one"}, {"text": "two"}]',
    "list over lines": '[\n  {"docid": "a",\n "text": "one"},\n  {"text": "two"}\n]\n',
    "list after blank lines": "\n" * 9000 + '[{"docid": "a", "text": "one"}, {"text": "two"}]',
}
PACKED = {
    "plain": bytes,
    "mark": lambda content: b"\xef\xbb\xbf" + content,
    "gzip": gzip.compress,
    "mark in gzip": lambda content: gzip.compress(b"\xef\xbb\xbf" + content),
}


def _give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stream))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", ["lines", "list", "list over lines"])
def test_json_is_json_however_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packed: str
) -> None:
    content = PACKED[packed](JSON_TEXTS[form].encode())
    _give_stdin(monkeypatch, content)
    assert _pairs("-") == BOTH
    end = ".GZ" if "gzip" in packed else ""
    for name in ("in.json", "IN.Json", "in.jsonl", "IN.JSONL"):
        path = tmp_path / f"{name}{end}"
        path.write_bytes(content)
        assert _pairs(path) == BOTH
        assert _pairs(tmp_path) == BOTH
        path.unlink()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["A.CSV", "a.tsv", "A.TXT", "notes.MD"])
def test_tables_and_text_in_any_packing(tmp_path: Path, name: str, packed: str) -> None:
    content = {
        "A.CSV": b"text,docid\r\none,a\r\ntwo,\r\n",
        "a.tsv": b"text\tdocid\none\ta\ntwo\t\n",
        "A.TXT": b"one\r\n\r\ntwo\r\n",
        "notes.MD": b"one",
    }[name]
    path = tmp_path / (name + (".Gz" if "gzip" in packed else ""))
    path.write_bytes(PACKED[packed](content))
    expected = {"A.TXT": [(None, "one"), (None, "two")], "notes.MD": [(path.name, "one")]}
    assert _pairs(path) == expected.get(name, BOTH)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", [(None, "one"), (None, "two")]),
        (b"", []),
        (b'["one", "two [x]"]', [(None, "one"), (None, "two [x]")]),
        (b'{\n "id": 1,\n "text": "x"\n}\n', [("1", "x")]),
        (b'{"id": 1, "text": "x"}', [("1", "x")]),
        (b"[]", []),
        (b"\n\n {}\n".replace(b"{}", b'{"text": "x"}'), [(None, "x")]),
    ],
)
def test_stdin_is_lines_or_json(
    monkeypatch: pytest.MonkeyPatch, content: bytes, expected: object, packed: str
) -> None:
    _give_stdin(monkeypatch, PACKED[packed](content))
    assert _pairs("-") == expected


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (b'{"text": "x"}\n{"txt": "y"}', {}, 'standard input:2: no column "text"; found: txt'),
        (b'[{"text": "x"}, 7]', {}, "standard input:item 2: the line holds int"),
        (b"[1] a footnote\n", {}, "standard input: not valid JSON .* go into a .txt file"),
        (b"PAR1\x15\x04", {}, "standard input: Parquet cannot be read from a stream"),
        ("{}".encode("utf-16"), {}, "standard input: the text is UTF-16"),
        (b"text,id\n", {"text": "text"}, "standard input: --column is given, and .* expected JSON"),
        (b"one\n", {"id": "key"}, "standard input: --column is given, and .* expected JSON"),
        (b"good\n\xff\xfb\n", {}, "standard input:2: not UTF-8"),
    ],
)
def test_what_is_wrong_on_stdin_is_named(
    monkeypatch: pytest.MonkeyPatch, content: bytes, columns: dict[str, str], message: str
) -> None:
    _give_stdin(monkeypatch, content)
    with pytest.raises(DataError, match=message):
        _pairs("-", columns=columns)


def test_a_jsonl_file_with_a_broken_beginning_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('\n{"text": \nno\n{"text": "good"}\n["a", "b"]\n')
    skipped = Skipped()
    assert _pairs(path, keep_going=True, skipped=skipped) == [(None, "good")]
    assert [bad.place for bad in skipped.first] == [f"{path}:{line}" for line in (2, 3, 5)]


def test_columns_may_be_parts_and_joins(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"q": {"en": "one"}, "t": "A", "b": "two", "key": 7.0}\n')
    columns = {"text": ("t", "q.en"), "id": "key"}
    (found,) = read_documents([path], columns=columns)
    assert (found.id, found.text) == ("7", "A one")
    assert found.metadata == {"q": {"en": "one"}, "t": "A", "b": "two"}
    with pytest.raises(ConfigError, match="documents have no 'query'; expected text=COLUMN"):
        _pairs(path, columns={"query": "q"})


def test_missing_columns_are_told_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("body,key\nx,1\n")
    pq.write_table(pa.table({"body": ["x"], "key": [1]}), tmp_path / "in.parquet")
    for name in ("in.csv", "in.parquet"):
        with pytest.raises(DataError, match=r"found: body, key.*--column text=body"):
            _pairs(tmp_path / name)
        with pytest.raises(DataError, match=r'no column "kee" for "id".*found: body, key'):
            _pairs(tmp_path / name, columns={"text": "body", "id": "kee"})


def test_an_empty_id_is_no_id(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("_id,id,text\n,7,x\n,,y\n")
    assert _pairs(tmp_path / "in.csv") == [("7", "x"), (None, "y")]
    with pytest.raises(DataError, match=r'in\.csv:3: no id under "id"'):
        _pairs(tmp_path / "in.csv", columns={"id": "id"})


BAD = [
    ("{not json\n", "not valid JSON"),
    ({"text": ""}, "empty"),
    ({"text": 3}, "not a text"),
    ({"body": "x"}, 'no column "text"; found: body (--column text=NAME'),
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
        ("cut.txt.gz", "broken gzip file"),
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
