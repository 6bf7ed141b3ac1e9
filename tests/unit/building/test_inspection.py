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


def test_keep_going_looks_into_the_other_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_inputs(tmp_path)
    (tmp_path / "pairs.jsonl").unlink()
    assert run(["data", "inspect", str(recipe)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert run(["data", "inspect", str(recipe), "--json", "--keep-going"]) == 2
    shown = capsys.readouterr()
    assert [found["name"] for found in json.loads(shown.out)] == ["sts", "classes"]
    first, last = shown.err.splitlines()
    assert first.startswith("not done: pairs: ")
    assert "no such file" in first
    assert "pairs: could not be read" in last


# --- Checking a file ------------------------------------------------------------------------------


def check(path: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = run(["data", "check", str(path), *options])
    return code, capsys.readouterr().out.splitlines()


def test_every_kind_of_bad_line_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"query": "a", "positive": "b"}', b'{"query": "a"}', b"nonsense", b'"\xff"'] * 500
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + b'{"query": "a"}\n' * 1500)
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert code == 2
    of = "6, 10, 14, 18, 22, 26, 30, 34, 38, 42, …"
    assert found[0] == (
        f'{path}:2: no column "positive"; found: query (1,999 more like it: lines {of})'
    )
    assert found[1].startswith(f"{path}:3: not valid JSON")
    assert "(499 more like it: lines 7, 11," in found[1]
    assert found[2].startswith(f"{path}:4: not UTF-8 text (499 more like it: lines 8, 12,")
    assert len(found) == 3


def test_an_object_in_the_place_of_a_text_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"query": "q", "positive": "p"}
    bad = {"query": "q", "positive": {"title": "t", "text": "p"}}
    listed = {"query": "q", "positive": [{"text": "p"}, "r"]}
    write_jsonl(path, [good, bad, bad, listed, good, bad])
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert code == 2
    assert found == [
        f'{path}:2: "positive" is an object, expected a text or a list of texts '
        "(2 more like it: lines 3, 6)",
        f'{path}:4: "positive[0]" is an object, expected a text',
    ]


def test_a_file_of_nothing_but_bad_lines_is_read_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"query": "a"}\n' * 1500)
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert (code, len(found)) == (2, 1)
    assert found[0].endswith("(1,499 more like it: lines 2-1500)")


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


def test_all_that_is_wrong_with_a_class_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "classes.jsonl"
    write_jsonl(path, [{"text": "one", "label": "x"}] * 2)
    code, found = check(path, "--kind", "classification", capsys=capsys)
    assert code == 2
    assert found[0] == f"{path}:1: 'x' is the only label of the set, expected at least two"
    assert found[1].startswith(f"{path}:1: label 'x' has one text only")


def test_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sts.jsonl"
    write_jsonl(path, STS[:-1])  # the last one contradicts another
    code, found = check(path, "--kind", "sts", capsys=capsys)
    assert (code, found) == (0, [f"{path}: {len(STS) - 1} records, all good"])
    path.write_text("")
    assert check(path, "--kind", "sts", capsys=capsys) == (2, [])


# --- Records that contradict themselves and each other --------------------------------------------


def pair(query: str, *positives: str, negative: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"query": query, "positive": list(positives), "negative": list(negative)}


@pytest.mark.parametrize(
    ("rows", "line", "problem"),
    [
        ([pair("q", "p", negative=("n", " P "))], 1, "a positive is among the negatives too"),
        ([pair("q", "r", "p", negative=("p",))], 1, "a positive is among the negatives too"),
        ([pair("Q", " q")], 1, "the only positive is the query itself"),
        ([pair("q", "q")], 1, "the only positive is the query itself"),
        (
            [pair("q", "p"), pair("x", "y"), pair(" Q", "r", negative=("P",))],
            3,
            "a document is negative here and positive for the same query in {path}:1",
        ),
        (
            [pair("q", "r", negative=("a", "p")), pair("q", "p")],
            2,
            "a document is positive here and negative for the same query in {path}:1",
        ),
    ],
)
def test_contradictions_are_problems(
    rows: list[dict[str, Any]],
    line: int,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    code, found = check(path, "--kind", "retrieval", capsys=capsys)
    assert (code, found) == (2, [f"{path}:{line}: {problem.format(path=path)}"])


@pytest.mark.parametrize(
    ("kind", "rows", "line", "warning"),
    [
        ("retrieval", [pair("q", "p", "Q")], 1, "a positive is the query itself"),
        ("retrieval", [pair("q", "p", negative=("Q", "n"))], 1, "a negative is the query itself"),
        ("nli", [pair("q", "p", negative=("n", "n"))], 1, "a text is given twice in one list"),
        ("retrieval", [pair("q", "p", "p")], 1, "a text is given twice in one list"),
        (
            "retrieval",
            [pair("q", "p", negative=("n", "N "))],
            1,
            "two texts of one list differ in case and white space only",
        ),
        (
            "sts",
            [
                {"sentence1": "a", "sentence2": "b", "score": 4},
                {"sentence1": "B", "sentence2": "a", "score": 1},
            ],
            2,
            "the pair has another score in {path}:1",
        ),
        (
            "sts",
            [
                {"sentence1": "a", "sentence2": "A", "score": 3},
                {"sentence1": "a", "sentence2": "b", "score": 3},
            ],
            1,
            "two equal sentences are scored 3",
        ),
        (
            "classification",
            [{"text": f"t{n % 4}", "label": "ab"[n % 2]} for n in range(4)]
            + [{"text": "T1", "label": "a"}],
            5,
            "the text has another label in {path}:2",
        ),
    ],
)
def test_what_may_be_meant_is_a_warning(
    kind: str,
    rows: list[dict[str, Any]],
    line: int,
    warning: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "set.jsonl"
    write_jsonl(path, rows)
    code, found = check(path, "--kind", kind, capsys=capsys)
    assert (code, found) == (
        0,
        [
            f"warning: {path}:{line}: {warning.format(path=path)}",
            f"{path}: {len(rows)} records, 1 warning",
        ],
    )


def test_scores_out_of_range_and_on_another_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sts.jsonl"
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n / 10} for n in range(11)]
    write_jsonl(path, rows)
    code, found = check(path, "--kind", "sts", capsys=capsys)
    assert code == 0
    assert found[0].startswith(f"warning: {path}: no score is above 1, on a scale of 0 to 5")
    write_jsonl(path, [*rows, {"sentence1": "a", "sentence2": "b", "score": 6}])
    code, found = check(path, "--kind", "sts", capsys=capsys)
    assert code == 2
    assert found[0] == f'{path}:12: "score" is 6, expected a number from 0 to 5'
    negative = {"sentence1": "a", "sentence2": "b", "score": 5, "negative": ["c", "B"]}
    write_jsonl(path, [negative])
    code, found = check(path, "--kind", "sts", capsys=capsys)
    assert (code, found) == (2, [f"{path}:1: a sentence is among the negatives too"])


def test_judgements_of_what_is_not_there_are_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "corpus.jsonl", [{"_id": 1, "text": "p"}, {"_id": 2, "text": ""}])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "query"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("q 0 1 1\nq 0 2 1\nq 0 3 1\nq 0 4 1\n")
    code, found = check(folder, "--kind", "retrieval", "--layout", "beir", capsys=capsys)
    assert code == 0
    assert found == [
        f"warning: {folder}/corpus.jsonl:2: document '2' has no text",
        f"warning: {folder}/qrels/train.tsv:2: document '2' is not in {folder}/corpus.jsonl "
        "(2 more like it: lines 3-4)",
        f"{folder}: 1 records, 4 warnings",
    ]


def test_bare_texts_are_inspected_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one", "two words", "One", ""]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (found,) = inspect(str(tmp_path / "texts.jsonl"), "--kind", "text", capsys=capsys)
    assert (found["records"], found["repeated"], found["bad"]) == (3, 1, 1)
    assert found["characters"] == {"text": expected_spread([3, 9, 3])}
    assert found["without_negatives"] is None
    assert run(["data", "check", str(tmp_path / "texts.jsonl"), "--kind", "text"]) == 2
    told = capsys.readouterr()
    assert "texts.jsonl:4" in told.out + told.err
