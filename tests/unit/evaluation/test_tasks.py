from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvembed.core.errors import DataError
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
    SummarizationData,
)
from nvembed.evaluation.tasks import find_tasks, load_task, load_tasks
from task_folders import MAIN_SCORES, QRELS, rows_of, write_rows, write_task


def test_retrieval_joins_titles_and_keeps_judged_queries(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "r", "Retrieval"))
    assert isinstance(task.data, RetrievalData)
    assert (task.name, task.type, task.main_score) == ("r", "Retrieval", "ndcg_at_10")
    assert task.instruction == "Find what fits"
    assert task.data.document_ids == ("d1", "d2", "d3", "d4", "d5")
    assert task.data.documents[0] == "cats a cat sleeps on the mat all day"
    assert task.data.documents[3] == "soup"
    assert task.data.documents[4] == "bread and cheese with soup"
    assert task.data.query_ids == ("q1", "q2", "q3")
    assert task.data.queries[1] == "soup with bread"
    assert task.data.judgements["q1"] == {"d1": 2, "d2": 1, "d3": 0}


def test_other_types_keep_their_rows(tmp_path: Path) -> None:
    def data(kind: str) -> Any:
        return load_task(write_task(tmp_path / kind, kind)).data

    reranking = data("Reranking")
    assert isinstance(reranking, RerankingData)
    assert reranking.queries == ("cat dog", "soup bread")
    assert reranking.negatives[0] == ("moon", "a cat")
    sts = data("STS")
    assert isinstance(sts, PairData)
    assert sts.values == (5.0, 3.2, 0.5, 4.0, 1.5)
    assert sts.second[1] == "a horse runs"
    assert data("PairClassification").values == (1.0, 0.0, 0.0, 1.0, 0.0)
    classification = data("Classification")
    assert isinstance(classification, ClassificationData)
    assert (len(classification.train.texts), len(classification.test.texts)) == (36, 24)
    clustering = data("Clustering")
    assert isinstance(clustering, LabelledTexts)
    assert clustering.labels[:4] == ("animals", "food", "sky", "animals")
    summaries = data("Summarization")
    assert isinstance(summaries, SummarizationData)
    assert summaries.human[0] == ("cats sleep", "a cat sleeps a lot")
    assert summaries.relevance[0] == (5.0, 2.5, 1.0)


def test_integer_labels_and_null_instruction(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "c", "Clustering", instruction=None)
    write_rows(folder / "test.jsonl", [{"text": "a", "label": 3}, {"text": "b", "label": 12}])
    task = load_task(folder)
    assert task.instruction is None
    assert task.data == LabelledTexts(("a", "b"), ("3", "12"))


def test_line_separators_inside_texts_do_not_split_records(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "c", "Clustering")
    text = "one\u2028two\u0085three"
    line = json.dumps({"text": text, "label": "x"}, ensure_ascii=False)
    (folder / "test.jsonl").write_text(
        line + "\n" + json.dumps({"text": "b", "label": "y"}) + "\n", encoding="utf-8"
    )
    data = load_task(folder).data
    assert isinstance(data, LabelledTexts)
    assert data.texts[0] == text


# --- qrels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qrels", "line", "message"),
    [
        (QRELS + "q1\td4\t1.5\n", 8, "score '1.5'; expected a whole number"),
        (QRELS + "q1\td4\t1e99\n", 8, "score '1e+99'; expected a whole number of 32 bits"),
        (QRELS + "q1\td4\tnan\n", 8, "\"score\" is 'nan', expected a number"),
        (QRELS + "q1\td4\t1_0\n", 8, "\"score\" is '1_0', expected a number"),
        (QRELS + "q1\td4\t\u0663\n", 8, "\"score\" is '\u0663', expected a number"),
        (QRELS + "q1\td4\n", 8, "2 columns, expected 3: query-id, corpus-id, score"),
        (QRELS + "q1\t0\td4\t1\n", 8, "4 columns, expected 3"),
        (QRELS + "\td4\t1\n", 8, "an id is empty"),
    ],
)
def test_broken_qrels(tmp_path: Path, qrels: str, line: int, message: str) -> None:
    folder = write_task(tmp_path / "r", "Retrieval")
    path = folder / "qrels" / "test.tsv"
    path.write_text(qrels, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("", "the file is empty"),
        ("query-id\tcorpus-id\tscore\n", "the file is empty"),
        ("qid\tpid\tlabel\nq1\td1\t1\n", 'no column "query-id" and no column "corpus-id"'),
        ("q7\td1\t1\nq8\td1\t1\n", "no judged query is known, such as 'q7'"),
        ("q1\tx1\t1\nq7\td1\t1\n", "no judged document is known, such as 'x1'"),
    ],
)
def test_qrels_of_something_else(tmp_path: Path, qrels: str, message: str) -> None:
    folder = write_task(tmp_path / "r", "Retrieval")
    path = folder / "qrels" / "test.tsv"
    path.write_text(qrels, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_qrels_without_any_relevant_document(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "r", "Retrieval")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    with pytest.raises(DataError, match="no query has a relevant document"):
        load_task(folder)


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "r", "Retrieval")
    (folder / "qrels" / "test.tsv").write_bytes(QRELS.replace("\n", "\r\n").encode())
    data = load_task(folder).data
    assert isinstance(data, RetrievalData)
    assert data.judgements["q2"] == {"d5": 1, "d4": 2}


# --- rows -----------------------------------------------------------------------------------------


def _change(kind: str, file: str, change: Callable[[list[dict[str, Any]]], None]) -> Any:
    rows = rows_of(kind)[file]
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("kind", "file", "change", "line", "message"),
    [
        ("Retrieval", "corpus.jsonl", lambda r: r[1].pop("text"), 2, 'no column "text"; found'),
        ("Retrieval", "corpus.jsonl", lambda r: r[0].update(title=3), 1, '"title" or "text" is no'),
        ("Retrieval", "corpus.jsonl", lambda r: r[0].update(text={}), 1, '"title" or "text" is no'),
        ("Retrieval", "corpus.jsonl", lambda r: r[2].update(_id="d1"), 3, "id 'd1' is given twice"),
        ("Retrieval", "corpus.jsonl", lambda r: r[2].update(_id=None), 3, "an id is NoneType"),
        ("Retrieval", "corpus.jsonl", lambda r: r[2].pop("_id"), 3, 'no column "id"; found'),
        (
            "Retrieval",
            "queries.jsonl",
            lambda r: r[0].update(text=""),
            1,
            "a judged query is empty",
        ),
        ("Retrieval", "queries.jsonl", lambda r: r[0].update(text=3), 1, '"text" is no text'),
        ("Retrieval", "queries.jsonl", lambda r: r[3].update(_id=True), 4, "an id is bool"),
        ("Reranking", "test.jsonl", lambda r: r[1].update(positive=[]), 2, "'positive' is empty"),
        ("Reranking", "test.jsonl", lambda r: r[0].update(negative="x"), 1, "'negative' is a text"),
        (
            "Reranking",
            "test.jsonl",
            lambda r: r[0].update(negative=["x", ""]),
            1,
            "'negative' holds an empty text",
        ),
        ("Reranking", "test.jsonl", lambda r: r[0].update(positive=["x", 3]), 1, "'positive' is a"),
        ("STS", "test.jsonl", lambda r: r[2].update(score="4"), 3, "'score' is a text"),
        ("STS", "test.jsonl", lambda r: r[2].update(score=float("nan")), 3, "'score' is the num"),
        ("STS", "test.jsonl", lambda r: r[2].update(score=True), 3, "'score' is true or false"),
        ("STS", "test.jsonl", lambda r: r[4].pop("sentence2"), 5, "'sentence2' is missing"),
        ("PairClassification", "test.jsonl", lambda r: r[0].update(label=2), 1, "label 2"),
        ("Classification", "test.jsonl", lambda r: r[3].update(label="new"), 4, "label 'new' does"),
        ("Classification", "train.jsonl", lambda r: r[3].update(label=1.5), 4, "'label' is the nu"),
        ("Clustering", "test.jsonl", lambda r: r[9].update(text="  "), 10, "'text' is empty"),
        ("Summarization", "test.jsonl", lambda r: r[0]["relevance"].pop(), 1, "2 values of 'relev"),
        (
            "Summarization",
            "test.jsonl",
            lambda r: r[1].update(relevance=3),
            2,
            "'relevance' is the",
        ),
    ],
)
def test_broken_rows(
    tmp_path: Path,
    kind: str,
    file: str,
    change: Callable[[list[dict[str, Any]]], None],
    line: int,
    message: str,
) -> None:
    folder = write_task(tmp_path / "task", kind)
    write_rows(folder / file, _change(kind, file, change))
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert f"{folder / file}:{line}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "file", "rows", "message"),
    [
        ("STS", "test.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}], "all scores are"),
        (
            "PairClassification",
            "test.jsonl",
            [{"sentence1": "a", "sentence2": "b", "label": 1}] * 3,
            "only one of the labels",
        ),
        ("Clustering", "test.jsonl", [{"text": "a", "label": "x"}] * 2, "only the label 'x'"),
        ("Retrieval", "corpus.jsonl", [], "the file is empty"),
        ("Classification", "train.jsonl", [], "the file is empty"),
    ],
)
def test_files_that_no_model_can_be_judged_on(
    tmp_path: Path, kind: str, file: str, rows: list[dict[str, Any]], message: str
) -> None:
    folder = write_task(tmp_path / "task", kind)
    write_rows(folder / file, rows)
    with pytest.raises(DataError, match=message) as caught:
        load_task(folder)
    # The cause alone: an empty corpus is not reported again as unknown ids in the qrels.
    assert "problems" not in str(caught.value)


@pytest.mark.parametrize(("kind", "file"), [(k, f) for k in MAIN_SCORES for f in rows_of(k)])
def test_missing_file(tmp_path: Path, kind: str, file: str) -> None:
    folder = write_task(tmp_path / "task", kind)
    (folder / file).unlink()
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value).startswith(f"{folder / file}: no such file")


def test_missing_qrels(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", "Retrieval")
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(DataError, match=r"test\.tsv: no such file"):
        load_task(folder)


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", "Retrieval")
    (folder / "qrels" / "test.tsv").write_text(QRELS + "q1\td1\t1\t0\nq1\td9\tx\n")
    with open(folder / "queries.jsonl", "a", encoding="utf-8") as out:
        out.write("{not json\n")
    with pytest.raises(DataError) as caught:
        load_task(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: 3 problems: ")
    assert f"{folder / 'queries.jsonl'}:5: not valid JSON" in text
    assert f"{folder / 'qrels' / 'test.tsv'}:8: 4 columns" in text
    assert f"{folder / 'qrels' / 'test.tsv'}:9: \"score\" is 'x'" in text
    assert "\n" not in text


def test_many_problems_are_counted(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", "Clustering")
    write_rows(folder / "test.jsonl", [{"text": "", "label": "a"}] * 40)
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value) == (
        f"{folder / 'test.jsonl'}:1: 'text' is empty; expected a text (39 more like it: lines 2-40)"
    )
    texts = [{"text": f"t{number}", "label": [number]} for number in range(40)]
    write_rows(folder / "test.jsonl", [{"text": ""}, *texts, {"text": "", "label": "a"}])
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value).startswith(f"{folder}: 43 problems: ")
    assert "line 2: 'label' is a list with the number 0" in str(caught.value)
    assert str(caught.value).endswith("(39 more like it: lines 3-41)")


# --- task.json and folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"type": "Retrival"}, "type 'Retrival'; expected perhaps Retrieval"),
        ({"main_score": "ndcg_at_11"}, "main_score 'ndcg_at_11' for Retrieval; expected perhaps"),
        ({"main_score": "v_measure"}, "main_score 'v_measure' for Retrieval"),
        ({"name": ""}, "'name' is empty"),
        ({"instruction": ""}, "'instruction' is empty; expected"),
        ({"instruction": 3}, "'instruction' is the number 3"),
    ],
)
def test_broken_header(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    folder = write_task(tmp_path / "r", "Retrieval", **header)
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert str(caught.value).startswith(f"{folder / 'task.json'}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "task.json:1: not valid JSON"),
        ("[1]", "the file holds list"),
        ('{"name": "a", "type": "STS", "main_score": "spearman"}', "'instruction' is missing"),
        ("{}", "4 problems"),
    ],
)
def test_header_that_is_no_header(tmp_path: Path, text: str, message: str) -> None:
    folder = write_task(tmp_path / "r", "STS")
    (folder / "task.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(folder)


def test_find_tasks(tmp_path: Path) -> None:
    one = write_task(tmp_path / "all" / "b", "STS")
    two = write_task(tmp_path / "all" / "a", "Clustering")
    (tmp_path / "all" / "notes").mkdir()
    assert find_tasks(tmp_path / "all") == [two, one]
    assert find_tasks(one) == [one]
    with pytest.raises(DataError, match="no evaluation task here"):
        find_tasks(tmp_path / "all" / "notes")
    with pytest.raises(DataError, match="no such folder"):
        find_tasks(tmp_path / "nowhere")


def test_load_tasks_filters_by_name_and_refuses_twins(tmp_path: Path) -> None:
    write_task(tmp_path / "all" / "a", "STS", name="sts")
    write_task(tmp_path / "all" / "b", "Clustering", name="topics")
    assert [task.name for task in load_tasks([tmp_path / "all"])] == ["sts", "topics"]
    # The same folder given twice is one task.
    both = load_tasks([tmp_path / "all", tmp_path / "all" / "a"], names=["sts"])
    assert [task.name for task in both] == ["sts"]
    with pytest.raises(DataError, match="no task called 'topic'; expected perhaps topics"):
        load_tasks([tmp_path / "all"], names=["topic"])
    write_task(tmp_path / "other", "STS", name="sts")
    with pytest.raises(DataError, match="task 'sts' is also in"):
        load_tasks([tmp_path / "all", tmp_path / "other"])


def test_a_broken_task_that_is_not_asked_for_does_not_matter(tmp_path: Path) -> None:
    write_task(tmp_path / "good", "STS")
    (write_task(tmp_path / "bad", "STS") / "test.jsonl").unlink()
    assert [task.name for task in load_tasks([tmp_path], names=["good"])] == ["good"]
    with pytest.raises(DataError, match="no such file"):
        load_tasks([tmp_path])


@pytest.mark.shared
def test_all_shared_tasks_load(shared: Callable[[str], Path]) -> None:
    tasks = load_tasks([shared("data/tasks")])
    assert len(tasks) == 32
    sizes = {
        task.name: len(task.data.queries) for task in tasks if isinstance(task.data, RetrievalData)
    }
    # Numbers of the data README.
    assert sizes == {
        "cranfield": 225,
        "cisi": 76,
        "nfcorpus": 323,
        "msmarco_dl19": 43,
        "dbpedia_entity": 40,
        "squad_test": 3574,
        "stackfaq": 1249,
        "pubmedqa_test": 200,
    }
