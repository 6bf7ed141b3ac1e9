"""Opening and decoding: the same bytes come out however they are packed."""

from __future__ import annotations

import gzip
import io
import os
import threading
from pathlib import Path

import pytest

from nvembed.core.errors import DataError
from nvembed.core.files import (
    STDIN_NAME,
    ending_of,
    numbered_lines,
    open_bytes,
    open_text_file,
    peeked,
    read_jsonl,
)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSONL", ".jsonl"),
        ("a.b.Csv.GZ", ".csv"),
        ("a.gz", ""),
        ("folder.csv/a", ""),
        (".jsonl", ""),
    ],
)
def test_endings_in_any_case(name: str, ending: str) -> None:
    assert ending_of(name) == ending


@pytest.mark.parametrize("content", [b"", b"a", b"ab\n\xc3\xa9\n", b"x" * 200_000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "A.TXT.GZ", STDIN_NAME])
@pytest.mark.parametrize("packed", [False, True])
def test_bytes_come_out_decompressed_and_without_a_mark(
    content: bytes, mark: bytes, name: str, packed: bool
) -> None:
    if packed is (name == "a.txt") or (not packed and name == "A.TXT.GZ"):
        return
    stored = gzip.compress(mark + content) if packed else mark + content
    with open_bytes(lambda: io.BytesIO(stored), name) as file:
        assert file.read() == content


def test_a_mark_that_comes_in_pieces_through_a_pipe() -> None:
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb", buffering=0) as out:
            for piece in (b"\xef", b"\xbb", b'\xbf{"a"', b": 1}\n"):
                out.write(piece)

    thread = threading.Thread(target=write)
    thread.start()
    with open_bytes(lambda: open(reader, "rb"), STDIN_NAME) as file:
        beginning, whole = peeked(file, 3)
        assert (beginning, whole.read()) == (b'{"a', b'{"a": 1}\n')
    thread.join()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_one_clear_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "x"}\n'.encode(encoding))
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    assert str(caught.value) == (
        f"{path}: the text is UTF-16 or UTF-32; expected UTF-8. "
        "Convert it: iconv -f UTF-16 -t UTF-8 FILE"
    )


def test_lines_are_numbered_and_gigantic_ones_not_kept() -> None:
    stream = io.BytesIO(b"a\n\n" + b"x" * 25 + b"\nlast")
    assert list(numbered_lines(stream, 10)) == [(1, b"a\n"), (2, b"\n"), (3, None), (4, b"last")]


def test_jsonl_with_a_mark_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL.GZ"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n'))
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none.txt", "no such file"),
        (tmp_path, "no such file"),
        (tmp_path / "no.txt.gz", "broken gzip file"),
    ):
        if path.suffix == ".gz":
            path.write_bytes(b"plain")
        with pytest.raises(DataError, match=problem), open_text_file(path) as file:
            file.read()
