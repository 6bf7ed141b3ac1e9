from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path

import pytest

from nvembed.core.errors import DataError, UserError
from nvembed.core.files import (
    atomic_folder,
    atomic_path,
    read_jsonl,
    write_json,
    write_json_values,
    write_jsonl,
    write_text,
)

ROWS = [{"text": "a\u2028b\u0085c"}, {"n": 1}, {"deep": {"x": [1, None]}}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_round_trip_splits_on_newline_only(tmp_path, name):
    path = tmp_path / "new" / name
    assert write_jsonl(path, ROWS) == 3
    assert list(read_jsonl(path)) == list(enumerate(ROWS, start=1))
    assert names(path.parent) == [name]


def test_gzip_output_is_reproducible_and_really_gzip(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    with gzip.open(tmp_path / "a.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
        assert json.loads(lines.readline()) == ROWS[0]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', r"rows\.jsonl:3: a line holds list; expected one JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"rows\.jsonl:\d+: not UTF-8 text"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_jsonl(path))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("cut", [1, 12])
def test_broken_gzip(tmp_path, cut):
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, ROWS * 50)
    path.write_bytes(path.read_bytes()[:-cut] if cut > 1 else b"no gzip at all")
    with pytest.raises(DataError, match="broken gzip file"):
        list(read_jsonl(path))


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def rows():
        yield {"a": 1}
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_jsonl(path, rows())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with (
        pytest.raises(UserError, match=r"x\.txt: cannot write: No space left") as caught,
        atomic_path(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 2
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        assert names(target) == ["a"]
    assert names(target) == ["b"]
    assert names(tmp_path) == ["model"]


def test_failed_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")

    def fail():
        with atomic_folder(target) as folder:
            (folder / "b").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(target) == ["a"]
    assert names(tmp_path) == ["model"]


def test_json_is_indented_utf8(tmp_path):
    write_json(tmp_path / "x.json", {"ü": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'


def test_line_of_bad_utf8_is_exact_in_a_long_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 999 + b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1000: not UTF-8 text"):
        list(read_jsonl(path))


def test_damaged_middle_of_a_gzip_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, [{"a": i} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[60:200] = b"\xff" * 140
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="broken gzip file"):
        list(read_jsonl(path))


@pytest.mark.parametrize("opener", [atomic_path, atomic_folder])
def test_place_that_cannot_be_made_is_a_user_error(tmp_path, opener):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), opener(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("line", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_the_parser_gives_up_on_is_told_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2: "):
        list(read_jsonl(path))


@pytest.mark.parametrize("values", [[], ["ü"], ["a", {"b": 1}, None]])
def test_a_list_is_written_as_if_it_were_whole(tmp_path: Path, values: list[object]) -> None:
    write_json_values(tmp_path / "parts.json", iter(values))
    assert json.loads((tmp_path / "parts.json").read_text("utf-8")) == values
    flat = [value for value in values if not isinstance(value, dict)]
    write_json(tmp_path / "whole.json", flat)
    write_json_values(tmp_path / "flat.json", iter(flat))
    assert (tmp_path / "flat.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
