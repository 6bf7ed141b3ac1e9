"""Names of columns and of outputs on the command line: one spelling, and no format by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from hash_encoder import HashEncoder
from nvembed.cli.main import run
from nvembed.cli.options import read_columns
from nvembed.core.errors import ConfigError
from nvembed.core.files import write_jsonl
from nvembed.core.outputs import check_ending, check_folder_name, check_new_folder
from nvembed.encoding.file_search import search_file
from nvembed.encoding.files import encode_file
from task_folders import write_task


@pytest.mark.parametrize(
    ("option", "now"),
    [
        ("--field", "--column text=NAME"),
        ("--text-key", "--column text=NAME"),
        ("--id-field", "--column id=NAME"),
        ("--id-key", "--column id=NAME"),
        ("--columns", "--column NAME=COLUMN"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["encode", "m", "--input", "a.csv", "--output", "a.npy"],
        ["index", "a.csv", "--to", "db"],
        ["search", "m", "q", "--documents", "a.csv"],
        ["data", "check", "a.csv", "--kind", "retrieval"],
    ],
    ids=lambda command: command[0],
)
def test_another_spelling_is_told_the_one_that_there_is(
    capsys: pytest.CaptureFixture[str], command: list[str], option: str, now: str
) -> None:
    assert run([*command, option, "body"]) == 2
    assert capsys.readouterr().err == f"error: No such option: {option}. It is {now} now\n"
    assert run([*command, "--column", "body"]) == 2
    assert "--column: 'body'; expected NAME=COLUMN" in capsys.readouterr().err


def test_columns_of_the_command_line_are_those_of_a_recipe() -> None:
    assert read_columns(["text=title", "id=key=1", "text=body", "text=a.b"]) == {
        "text": ("title", "body", "a.b"),
        "id": "key=1",
    }
    for wrong in ("text", "=x", "text=", "="):
        with pytest.raises(ConfigError, match="expected NAME=COLUMN"):
            read_columns([wrong])


def test_columns_reach_encoding_and_search(
    tmp_path: Path, tiny_decoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "A.CSV"
    rows.write_bytes(b"\xef\xbb\xbfbody,key\nthe moon,m\na cat,c\n")
    columns = ["--column", "text=body", "--column", "id=key"]
    search = ["search", str(tiny_decoder_dir), "x", "--documents", str(rows), "--dtype", "float32"]
    assert run([*search, *columns, "--json"]) == 0
    assert '"id": "m", "text": "the moon"' in capsys.readouterr().out
    assert run(search) == 2
    assert 'no column "text"; expected one of the columns found: body, key' in (
        capsys.readouterr().err
    )
    output = tmp_path / "v.NPY"
    command = ["encode", str(tiny_decoder_dir), "--input", str(rows), "--output", str(output)]
    assert run([*command, "--dtype", "float32", *columns]) == 0
    assert (tmp_path / "v.NPY.ids.json").read_text() == '[\n  "m",\n  "c"\n]\n'
    with pytest.raises(ConfigError, match="documents have no 'query'"):
        search_file(HashEncoder(8), rows, "x", task=None, top_k=1, columns={"query": "body"})


@pytest.mark.parametrize("name", ["x.csv", "x", "x.npz", "x.npy.gz", "x.txt", "x.parquet.gz"])
def test_encode_refuses_an_ending_that_says_no_format(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError) as caught:
        encode_file(HashEncoder(8), tmp_path / "in.jsonl", tmp_path / name, task=None)
    assert str(caught.value) == (
        f"{tmp_path / name}: unknown kind of output {name!r}; "
        "expected a name that ends in .npy or .parquet or .lance"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["encode", "MODEL", "--input", "in.jsonl", "--output", "out.csv"], ".npy or .parquet"),
        (["evaluate", "MODEL", "--tasks", "task", "--output", "out.csv"], "ends in .json"),
        (["evaluate", "MODEL", "--tasks", "task", "--output", "out"], "ends in .json"),
        (["mine", "in.jsonl", "out.csv", "--teacher", "bm25"], "ends in .jsonl (also with .gz)"),
        (["mine", "in.jsonl", "out.json", "--teacher", "bm25"], "ends in .jsonl (also with .gz)"),
        (["index", "in.jsonl", "--to", "out.parquet", "--model", "MODEL"], "expected a folder"),
        (["export", "MODEL", "--to", "out.onnx", "--format", "onnx"], "expected a folder"),
        (
            ["data", "synthesize", "out.jsonl", "--endpoint", "http://x/v1", "--model", "m"],
            "expected a folder",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_command_refuses_an_output_of_another_kind(
    tmp_path: Path,
    tiny_decoder_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [{"text": "a", "query": "q", "positive": "p"}])
    write_task(tmp_path / "task", "STS")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run([word.replace("MODEL", str(tiny_decoder_dir)) for word in command]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "out" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_endings_and_folders(tmp_path: Path) -> None:
    for name in ("a.json", "A.JSON"):
        check_ending(name, (".json",))
    check_ending("a.JSONL.GZ", (".jsonl",), packed=True)
    for name in ("a.json.gz", "a", "json", ".json"):
        with pytest.raises(ConfigError, match="unknown kind of output"):
            check_ending(name, (".json",))
    for name in ("runs/one", "docs.db", "v1.2", "."):
        check_folder_name(name)
    (tmp_path / "old.json").mkdir()
    check_folder_name(tmp_path / "old.json")
    for name in ("a.csv", "a.ONNX", "a.gz"):
        with pytest.raises(ConfigError, match="is the name of a file; expected a folder"):
            check_folder_name(name)


def test_the_folder_has_to_be_new_or_empty(tmp_path: Path) -> None:
    pairs = tmp_path / "faq.csv"
    pairs.write_text("x")
    check_new_folder(tmp_path / "new", [pairs])
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty", [pairs])
    for place in (pairs, tmp_path):
        with pytest.raises(ConfigError):
            check_new_folder(place, [pairs])
    (tmp_path / "empty" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        check_new_folder(tmp_path / "empty", [pairs])
    (tmp_path / "link").symlink_to(tmp_path / "empty-target", target_is_directory=True)
    (tmp_path / "empty-target").mkdir()
    with pytest.raises(ConfigError, match="is there already"):  # a link to an empty folder
        check_new_folder(tmp_path / "link", [pairs])
    with pytest.raises(ConfigError, match="is the name of a file"):
        check_new_folder(tmp_path / "new.json", [pairs])
