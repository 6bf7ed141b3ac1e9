"""What the columns of a user's file are taken for, and what its rows become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nvembed.building.own_pairs import INSTRUCTIONS, find_dataset, read_pairs
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_jsonl
from nvembed.data.records import LabelRecord, PairRecord, StsRecord


def table(folder: Path, header: str, *rows: str) -> Path:
    path = folder / "own.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("header", "kind", "columns"),
    [
        ("Question,Answer,id", "retrieval", {"query": "Question", "positive": "Answer"}),
        ("anchor,positive", "retrieval", {"query": "anchor", "positive": "positive"}),
        ("title,text", "retrieval", {"query": "title", "positive": "text"}),
        ("question,title,text", "retrieval", {"query": "question", "positive": "text"}),
        ("Search Query,document", "retrieval", {"query": "Search Query", "positive": "document"}),
        ("question,answer,category", "retrieval", {"query": "question", "positive": "answer"}),
        ("message,intent", "classification", {"text": "message", "label": "intent"}),
        ("text,label", "classification", {"text": "text", "label": "label"}),
        ("question,topic", "classification", {"text": "question", "label": "topic"}),
    ],
)
def test_columns_are_found_by_name(header: str, kind: str, columns: dict, tmp_path: Path) -> None:
    found = find_dataset(table(tmp_path, header, "a,b,c"))
    assert (found.kind, found.columns, found.layout) == (kind, columns, "records")
    assert found.instruction == INSTRUCTIONS[found.kind]


def test_graded_pairs_and_the_top_of_their_scale(tmp_path: Path) -> None:
    wanted = {"sentence1": "text1", "sentence2": "text2", "score": "similarity"}
    for scores, top, last in (("0.25,1.0", 1, 5.0), ("1,4", None, 4.0), ("20,80", 100, 4.0)):
        first, second = scores.split(",")
        path = table(tmp_path, "text1,text2,similarity", f"a,b,{first}", f"c,d,{second}")
        found = find_dataset(path)
        assert (found.kind, found.columns, found.max_score) == ("sts", wanted, top)
        read = read_pairs(found).records
        assert read[1] == StsRecord("c", "d", last)
    path = table(tmp_path, "text1,text2,similarity", "a,b,400")
    with pytest.raises(DataError, match="a score is 400; expected 0 to 1, 5, 10 or 100"):
        find_dataset(path)


@pytest.mark.parametrize(
    "header",
    ["foo,bar", "question,context,answer", "title,text,label", "query,document,score", "text,more"],
)
def test_nothing_is_guessed(header: str, tmp_path: Path) -> None:
    path = table(tmp_path, header, "a,b,c")
    with pytest.raises(ConfigError) as caught:
        find_dataset(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: the names of the columns do not tell what they hold; expected")
    assert told.endswith(f"each one of {', '.join(header.split(','))}")
    assert "--column query=… --column positive=…, or --column text=… --column label=…" in told


def test_other_separators_than_commas(tmp_path: Path) -> None:
    path = table(tmp_path, "Frage;Question;Answer", "x;q;a, b")
    found = find_dataset(path)
    assert found.columns == {"query": "Question", "positive": "Answer"}
    assert read_pairs(found).records == (PairRecord("q", ("a, b",)),)
    path = table(tmp_path, "question;answer, if any", "q;a, b")
    with pytest.raises(ConfigError, match=r"if any\. If semicolons separate them, save it with"):
        find_dataset(path)


def test_what_the_user_names_decides(tmp_path: Path) -> None:
    path = table(tmp_path, "title,text,label", "a,b,c")
    assert find_dataset(path, {"label": "label"}).kind == "classification"
    assert find_dataset(path, {"query": "title"}).columns == {"query": "title", "positive": "text"}
    joined = find_dataset(path, {"query": "label", "positive": ("title", "text")})
    assert read_pairs(joined).records == (PairRecord("c", ("a b",)),)
    asked: list[tuple[str, Sequence[str]]] = []

    def ask(role: str, columns: Sequence[str]) -> str:
        asked.append((role, columns))
        return {"query": "label", "positive": "text"}[role]

    found = find_dataset(path, ask=ask)
    assert found.columns == {"query": "label", "positive": "text"}
    assert asked == [(role, ["title", "text", "label"]) for role in ("query", "positive")]
    with pytest.raises(ConfigError, match="DocFinder"):
        find_dataset(path, {"label": "label"}, instruction="DocFinder")


def test_other_layouts(tmp_path: Path) -> None:
    rows = {
        "lists": [{"query": "q", "pos": ["p"], "neg": ["n"]}],
        "tuples": [{"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}],
        "passages": [{"query": "q", "positive_passages": [{"text": "p"}], "x": 1}],
    }
    wanted = {"lists": ("n",), "tuples": ("n", "m"), "passages": ()}
    for layout, objects in rows.items():
        write_jsonl(path := tmp_path / f"{layout}.jsonl", objects)
        found = find_dataset(path)
        assert found.layout == layout
        assert read_pairs(found).records == (PairRecord("q", ("p",), wanted[layout]),)


def test_a_folder_in_beirs_layout(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "d", "title": "t", "text": "a text"}])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a query"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    found = find_dataset(tmp_path)
    assert (found.layout, found.split) == ("beir", "dev")
    assert read_pairs(found).records == (PairRecord("a query", ("t a text",)),)


def test_rows_are_checked_and_each_query_stands_once(tmp_path: Path) -> None:
    rows = ["q,a", "Q ,b", "empty,", "same,same", "q,a", "r,c"]
    found = read_pairs(find_dataset(table(tmp_path, "question,answer", *rows)))
    assert found.records == (PairRecord("q", ("a", "b")), PairRecord("r", ("c",)))
    assert len(found.notes) == 2
    assert "own.csv:4" in found.notes[0]
    assert "the only positive is the query itself" in found.notes[1]
    with pytest.raises(DataError, match="no good record"):
        read_pairs(find_dataset(table(tmp_path, "question,answer", "q,")))
    labels = table(tmp_path, "text,label", "a,x", "a,x", "b,y")
    assert read_pairs(find_dataset(labels)).records == (
        LabelRecord("a", "x"),
        LabelRecord("b", "y"),
    )
