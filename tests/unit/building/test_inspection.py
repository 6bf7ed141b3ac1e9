from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nvembed.cli.main import run
from nvembed.core.files import write_jsonl
from tiny_build import CLASSES, PAIRS, STS, write_inputs

WORDS = ["one", "two", "three", "four"]
ROWS: list[dict[str, Any]] = [
    {
        "query": f"{'q' * (number % 7 + 1)} {number // 2}",
        "positive": [f"{word} {number}" for word in WORDS[: number % 3 + 1]],
        "negative": [f"no {number}"] * (number % 2),
    }
    for number in range(50)
]
ROWS += [{"query": "Q  0", "positive": "again"}, {"query": "no positive"}]


def inspect(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert run(["data", "inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected_spread(values: list[int]) -> dict[str, Any]:
    ordered = sorted(values)

    def at(share: int) -> int:
        """The least value that so many per cent of the values do not exceed."""
        return next(
            v for v in ordered if sum(o <= v for o in ordered) * 100 >= share * len(ordered)
        )

    return {
        "count": len(values),
        "mean": pytest.approx(statistics.mean(values)),
        "min": ordered[0],
        "median": at(50),
        "p90": at(90),
        "p99": at(99),
        "max": ordered[-1],
    }


def test_numbers_of_pairs(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--kind", "retrieval", "--tokenizer", str(tmp_path / "model"), "--samples", "3"]
    (found,) = inspect(str(tmp_path / "pairs.jsonl"), *options, capsys=capsys)
    good = ROWS[:-1]
    positives = [p if isinstance(p, list) else [p] for p in (row["positive"] for row in good)]
    texts = {
        "query": [row["query"] for row in good],
        "positive": [text for texts in positives for text in texts],
        "negative": [text for row in good for text in row.get("negative", [])],
    }
    assert (found["records"], found["bad"]) == (51, 1)
    assert found["problems"][0].endswith('no column "positive"; found: query')
    assert found["repeated"] == 1
    assert found["characters"] == {
        side: expected_spread([len(text) for text in of_side]) for side, of_side in texts.items()
    }
    assert found["tokens"] == found["characters"]  # a token per byte
    assert found["per_record"]["positives"] == expected_spread([len(p) for p in positives])
    assert found["per_record"]["negatives"] == expected_spread(
        [len(row.get("negative", [])) for row in good]
    )
    assert found["without_negatives"] == 26
    queries = [row["query"] for row in good]
    places = [queries.index(sample["query"]) for sample in found["samples"]]
    assert places == sorted(set(places))
    assert len(places) == 3


def test_numbers_of_classes_and_sts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_inputs(tmp_path)
    pairs, sts, classes = inspect(str(recipe), capsys=capsys)
    assert (pairs["name"], pairs["records"], pairs["bad"]) == ("pairs", len(PAIRS) - 1, 1)
    assert (sts["records"], sts["repeated"], sts["trained_on"]) == (len(STS), 1, len(STS) - 1)
    assert classes["classes"] == 4
    assert classes["largest"] == [["animals", 12], ["places", 12], ["sky", 12], ["single", 1]]
    assert classes["smallest"][0] == ["single", 1]
    assert classes["without_negatives"] is None
    assert len(CLASSES) == classes["records"]


def test_built_sets_are_looked_into_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_inputs(tmp_path, mine=None)
    assert run(["data", "build", str(recipe)]) == 0
    capsys.readouterr()
    of_recipe = inspect(str(recipe), capsys=capsys)
    assert [(found["name"], found["records"]) for found in of_recipe] == [
        ("pairs (built)", 30),
        ("sts (built)", len(STS) - 1),
        ("classes (built)", len(CLASSES) - 1),
    ]
    (alone,) = inspect(str(tmp_path / "built" / "sts"), capsys=capsys)
    assert alone == {**of_recipe[1], "name": "sts"}
    assert len(inspect(str(tmp_path / "built"), capsys=capsys)) == 3
    assert run(["data", "inspect", str(tmp_path / "built")]) == 0
    table = capsys.readouterr().out
    assert "sts (sts): 12 records, 0 repeated, 12 without negatives, 12 scored 4 or more" in table
    assert "3 classes from 12 (sky) to 12 (animals)" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs.jsonl"], "--kind"),
        (["."], "no built data set here"),
        (["nothing.jsonl", "--kind", "sts"], "no such file"),
        (["pairs.jsonl", "--kind", "sts", "--tokenizer", "."], "tokenizer.json"),
        (["pairs.jsonl", "--kind", "sts", "--column", "x"], "NAME=COLUMN"),
    ],
)
def test_what_cannot_be_looked_into(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    assert run(["data", "inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


# --- Checking a file ------------------------------------------------------------------------------


def check(path: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = run(["data", "check", str(path), *options])
    return code, capsys.readouterr().out.splitlines()


def test_every_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [b'{"query": "a", "positive": "b"}', b'{"query": "a"}', b"nonsense", b'"\xff"'] * 500
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + b'{"query": "a"}\n' * 1500)
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert code == 2
    bad = [number for number in range(1, 2001) if number % 4 != 1] + list(range(2001, 3501))
    assert [line.split(": ")[0] for line in found] == [f"{path}:{number}" for number in bad]
    assert "positive" in found[0]
    assert "JSON" in found[1]
    assert "UTF-8" in found[2]


def test_a_file_of_nothing_but_bad_lines_is_read_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"query": "a"}\n' * 1500)
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert (code, len(found)) == (2, 1500)


def test_classes_that_cannot_be_converted_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
    rows += [{"text": "same", "label": "x"}] * 3
    path = tmp_path / "classes.csv"
    path.write_text("text,intent\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    options = ["--kind", "classification", "--column", "label=intent"]
    code, found = check(path, *options, capsys=capsys)
    assert code == 2
    assert [line.split(": ")[0] for line in found] == [f"{path}:8"]
    assert "'x' has one text only" in found[0]
    _, found = check(path, *options, "--conversion", "label", capsys=capsys)
    assert [line.split(": ")[0] for line in found] == [f"{path}:2", f"{path}:3"]


def test_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sts.jsonl"
    write_jsonl(path, STS)
    code, found = check(path, "--kind", "sts", capsys=capsys)
    assert (code, found) == (0, [f"{path}: {len(STS)} records, all good"])
    path.write_text("")
    assert check(path, "--kind", "sts", capsys=capsys) == (2, [])
