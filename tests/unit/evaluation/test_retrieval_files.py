"""BEIR folders as they are published, read for evaluation and for training, against mteb."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hash_encoder import HashEncoder
from nvembed.core.errors import DataError
from nvembed.data.config import DatasetConfig
from nvembed.data.loading import load_records, open_dataset
from nvembed.data.records import Converted
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.reference import ignores_identical_ids
from nvembed.evaluation.session import score_task
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import LocalTask, find_tasks, load_task, load_tasks, task_hash
from task_folders import write_rows, write_task

Rows = list[dict[str, Any]]

CORPUS: Rows = [
    {"_id": "10", "title": "cats", "text": "a cat sleeps"},
    {"_id": "11", "title": "", "text": "a dog chases a cat"},
    {"_id": "12", "title": "", "text": "soup with bread"},
]
QUERIES: Rows = [{"_id": "1", "text": "where do cats sleep"}, {"_id": "2", "text": "bread soup"}]
QRELS: list[tuple[str, str, str]] = [("1", "10", "2"), ("1", "11", "1"), ("2", "12", "1")]
HEADER = ("query-id", "corpus-id", "score")


def lines_of(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table_of(rows: Sequence[Sequence[str]], separator: str = "\t") -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


def csv_of(rows: Rows) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_beir(folder: Path, files: dict[str, str | bytes] | None = None) -> Path:
    """Write the set above; ``files`` takes the place of the files with the same beginning."""
    given = files or {}
    usual: dict[str, str | bytes] = {
        "corpus.jsonl": lines_of(CORPUS),
        "queries.jsonl": lines_of(QUERIES),
        "qrels/test.tsv": table_of([HEADER, *QRELS]),
    }
    stems = {name.partition(".")[0] for name in given}
    for name, content in {**usual, **given}.items():
        if name not in given and name.partition(".")[0] in stems:
            continue
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder


def with_ids(rows: Rows, convert: Callable[[str], Any]) -> str:
    return lines_of([row | {"_id": convert(row["_id"])} for row in rows])


TREC = [(query, "0", document, grade) for query, document, grade in QRELS]
NAMED = table_of([HEADER, *QRELS])
WITH_POINT = [(query, document, grade + ".0") for query, document, grade in QRELS]
AS_OBJECTS: Rows = [
    {"query-id": int(query), "corpus-id": document, "score": float(grade)}
    for query, document, grade in QRELS
]
JOINED: Rows = [
    {"_id": row["_id"], "text": f"{row['title']} {row['text']}".strip()} for row in CORPUS
]
VARIANTS: dict[str, dict[str, str | bytes]] = {
    "as released": {},
    "integer ids": {"corpus.jsonl": with_ids(CORPUS, int), "queries.jsonl": with_ids(QUERIES, int)},
    "ids with a point": {"corpus.jsonl": with_ids(CORPUS, float)},
    "id without underscore": {
        "queries.jsonl": lines_of([{"id": row["_id"], "text": row["text"]} for row in QUERIES])
    },
    "grades with a point": {"qrels/test.tsv": table_of([HEADER, *WITH_POINT])},
    "no line of names": {"qrels/test.tsv": table_of(QRELS)},
    "spaces": {"qrels/test.tsv": table_of([HEADER, *QRELS], "  ")},
    "trec": {"qrels/test.tsv": table_of(TREC, " ")},
    "trec between tabs": {"qrels/test.txt": table_of(TREC)},
    "trec, compressed": {"qrels/test.qrels.gz": table_of(TREC, "\t ")},
    "null titles": {
        "corpus.jsonl": lines_of([row | {"title": row["title"] or None} for row in CORPUS])
    },
    "no titles": {"corpus.jsonl": lines_of(JOINED)},
    "all compressed": {
        "corpus.jsonl.gz": lines_of(CORPUS),
        "queries.jsonl.gz": lines_of(QUERIES),
        "qrels/test.tsv.gz": NAMED,
    },
    "byte order mark": {"qrels/test.tsv": b"\xef\xbb\xbf" + NAMED.encode()},
    "Windows ends": {"qrels/test.tsv": NAMED.replace("\n", "\r\n")},
    "comma separated": {
        "corpus.csv": csv_of(CORPUS),
        "queries.csv": csv_of(QUERIES),
        "qrels/test.csv": table_of([HEADER, *QRELS], ","),
    },
    "comma separated, no names": {"qrels/test.csv": table_of(QRELS, ",")},
    "judgements as JSONL": {"qrels/test.jsonl": lines_of(AS_OBJECTS)},
    "a JSON list": {"corpus.json": json.dumps(CORPUS)},
    "more columns": {
        "qrels/test.tsv": table_of([(*HEADER, "who"), *((*row, "me") for row in QRELS)])
    },
    "blank lines, spaces at ends": {
        "qrels/test.tsv": "\n" + table_of([HEADER, *QRELS], "\t ") + "\n \n"
    },
}


@pytest.mark.parametrize("files", VARIANTS.values(), ids=VARIANTS)
def test_every_spelling_of_a_set_is_the_same_task(
    files: dict[str, str | bytes], tmp_path: Path
) -> None:
    task = load_task(write_beir(tmp_path / "set", files))
    assert task.data == RetrievalData(
        document_ids=("10", "11", "12"),
        documents=("cats a cat sleeps", "a dog chases a cat", "soup with bread"),
        query_ids=("1", "2"),
        queries=("where do cats sleep", "bread soup"),
        judgements={"1": {"10": 2, "11": 1}, "2": {"12": 1}},
    )
    assert task.remarks == (
        "no task.json: Retrieval without an instruction, ndcg_at_10, split test"
    )


@pytest.mark.parametrize("files", VARIANTS.values(), ids=VARIANTS)
def test_every_spelling_of_a_set_trains_the_same(
    files: dict[str, str | bytes], tmp_path: Path
) -> None:
    write_beir(tmp_path / "set", files)
    config = DatasetConfig(
        name="s", path="set", kind="retrieval", instruction=None, layout="beir", split="test"
    )
    rows = list(open_dataset(config, base_dir=tmp_path).rows)
    assert [row.record.to_json() for row in rows if isinstance(row, Converted)] == [
        {"query": "where do cats sleep", "positive": ["cats a cat sleeps", "a dog chases a cat"]},
        {"query": "bread soup", "positive": ["soup with bread"]},
    ]
    assert len(rows) == 2


def test_parquet_files(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    write_beir(tmp_path)
    expected = load_task(tmp_path).data
    numbers = [{"query-id": int(q), "corpus-id": int(d), "score": int(g)} for q, d, g in QRELS]
    tables = {"corpus": CORPUS, "queries": QUERIES, "qrels/test": numbers}
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    for name, rows in tables.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert load_task(tmp_path).data == expected


# --- what published sets get wrong ----------------------------------------------------------------

ODD_CORPUS: Rows = [
    {"_id": "d1", "title": "cats", "text": "the cat sleeps on the mat"},
    {"_id": "d2", "title": "", "text": ""},
    {"_id": "d3", "title": "", "text": "a dog chases the cat"},
    {"_id": "d4", "title": "soup", "text": "soup with bread and cheese"},
    {"_id": "d5", "title": "", "text": "the moon turns around the earth"},
    {"_id": "d6", "title": "", "text": "  the moon and the soup "},
]
ODD_QUERIES: Rows = [
    {"_id": f"q{number}", "text": text}
    for number, text in enumerate(
        ["where does the cat sleep", "soup with bread", "the moon", "a dog", "never judged"]
    )
]
ODD_QRELS: list[tuple[str, str, int]] = [
    ("q0", "d1", 2),
    ("q0", "d3", -1),
    ("q0", "gone", 1),
    ("q1", "d4", 1),
    ("q1", "d6", 0),
    ("q1", "d6", 3),
    ("q1", "d4", 1),
    ("q2", "d2", 1),
    ("q2", "d5", -2),
    ("q3", "d3", 0),
    ("q3", "d1", -1),
    ("absent", "d1", 1),
]


def odd_folder(folder: Path) -> Path:
    write_beir(folder)
    write_rows(folder / "corpus.jsonl", ODD_CORPUS)
    write_rows(folder / "queries.jsonl", ODD_QUERIES)
    rows = [(q, d, str(g)) for q, d, g in ODD_QRELS]
    (folder / "qrels" / "test.tsv").write_text(table_of([HEADER, *rows]), encoding="utf-8")
    return folder


class NoisyEncoder(HashEncoder):
    """Bags of words with noise of the text: no two texts are exactly alike."""

    def _encode(self, texts: Sequence[str], task: str | None) -> NDArray[np.float32]:
        vectors = super()._encode(texts, None)
        seeds = [sum(text.encode()) for text in texts]
        noise = [np.random.default_rng(seed).normal(size=self.dimension) for seed in seeds]
        vectors += 0.01 * np.array(noise, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_what_is_odd_is_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = odd_folder(tmp_path / "odd")
    with caplog.at_level(logging.WARNING):
        task = load_task(folder)
    assert isinstance(task.data, RetrievalData)
    assert task.data.query_ids == ("q0", "q1", "q2", "q3")
    assert task.data.documents[1] == ""
    assert task.data.documents[5] == "the moon and the soup"
    assert task.data.judgements == {
        "q0": {"d1": 2, "d3": 0, "gone": 1},
        "q1": {"d4": 1, "d6": 3},
        "q2": {"d2": 1, "d5": 0},
        "q3": {"d3": 0, "d1": 0},
    }
    (record,) = caplog.records
    assert record.getMessage() == f"odd: {task.remarks}"
    assert task.remarks.split("; ")[1:] == [
        "qrels/test.tsv:3: a grade below 0, which is not relevant (2 more like it: lines 10, 12)",
        "qrels/test.tsv:8: a pair is judged again, alike",
        "qrels/test.tsv:7: a pair is judged again, otherwise, and the last judgement counts",
        "corpus.jsonl:2: a document is empty, and is ranked like any other",
        "qrels/test.tsv:4: document 'gone' is judged and not there, so a relevant one is missed",
        "qrels/test.tsv:11: query 'q3' has no relevant document, so it scores 0",
        "qrels/test.tsv:13: query 'absent' is judged and not there, so it is left out",
    ]


@pytest.fixture(scope="module")
def mteb_of() -> Any:
    """Score a folder by mteb alone: its reader of data sets, its search and its metrics."""
    import datasets
    import mteb
    import sentence_transformers  # noqa: F401
    from mteb.abstasks import AbsTaskRetrieval

    from nvembed.evaluation import mteb_adapter

    def score(folder: Path, task: LocalTask, *, ignore: bool = False) -> dict[str, Any]:
        metadata = mteb_adapter._mteb_task(task).metadata
        attributes = {"metadata": metadata, "ignore_identical_ids": ignore}
        made = type("Published", (AbsTaskRetrieval,), attributes)()
        with mteb_adapter.quiet():
            result = mteb.evaluate(
                mteb_adapter.local_encoder(task, NoisyEncoder(64)),
                made,
                cache=None,
                co2_tracker=False,
                show_progress_bar=False,
            )
        return dict(result.task_results[0].scores["test"][0])

    yield score
    datasets.enable_progress_bars()


CARD = """---
configs:
- config_name: default
  data_files: [{split: test, path: judged.jsonl}]
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
---
"""


@pytest.fixture
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_published(folder: Path, qrels: Sequence[tuple[str, str, int]]) -> None:
    """Add what makes a BEIR folder a data set that mteb loads."""
    rows = [dict(zip(HEADER, row, strict=True)) for row in qrels]
    write_rows(folder / "judged.jsonl", rows)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def assert_scores_of_mteb(task: LocalTask, expected: dict[str, Any]) -> None:
    found = score_local(task, NoisyEncoder(64)).scores
    compared = {name for name in found if isinstance(expected.get(name), float)}
    assert len(compared) > 100
    for name in compared:
        value = found[name]
        assert (float("nan") if value is None else value) == pytest.approx(
            expected[name], abs=1e-6, nan_ok=True
        ), name


@pytest.mark.usefixtures("_own_datasets_cache")
def test_odd_files_score_as_mteb_scores_them(mteb_of: Any, tmp_path: Path) -> None:
    folder = odd_folder(tmp_path / "odd")
    as_published(folder, ODD_QRELS)
    task = load_task(folder)
    expected = mteb_of(folder, task)
    assert 0 < expected["ndcg_at_10"] < 1
    assert_scores_of_mteb(task, expected)


def test_grades_are_those_of_trec_eval(tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    task = load_task(odd_folder(tmp_path / "odd"))
    data = task.data
    assert isinstance(data, RetrievalData)
    encoder = NoisyEncoder(64)
    cosines = encoder.encode_query(data.queries) @ encoder.encode_document(data.documents).T
    run = {
        query: dict(zip(data.document_ids, row.tolist(), strict=True))
        for query, row in zip(data.query_ids, cosines, strict=True)
    }
    # Of a pair that is judged twice a dictionary keeps the last.
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in ODD_QRELS:
        qrels.setdefault(query, {})[document] = grade
    names = {"ndcg_cut.10", "map_cut.10", "recall.3", "P.3", "success.1"}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    found = score_local(task, encoder).scores
    ours = {"ndcg_cut_10": "ndcg_at_10", "map_cut_10": "map_at_10", "recall_3": "recall_at_3"}
    for theirs, name in (ours | {"P_3": "precision_at_3", "success_1": "hit_rate_at_1"}).items():
        mean = float(np.mean([values[theirs] for values in by_query.values()]))
        assert found[name] == pytest.approx(mean, abs=1e-5), name  # mteb rounds to 5 places


def test_a_query_without_a_relevant_document_counts(tmp_path: Path) -> None:
    task = load_task(odd_folder(tmp_path / "odd"))
    items = score_local(task, NoisyEncoder(64)).items
    assert items is not None
    assert items.arrays["values_N"][3] == 0.0
    bm25 = score_task(task, None)[1]
    assert bm25 is not None
    assert bm25.arrays["values_N"][3] == 0.0


def test_the_last_of_two_judgements_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd_folder(tmp_path / "odd")
    config = DatasetConfig(
        name="odd",
        path="odd",
        kind="retrieval",
        instruction=None,
        layout="beir",
        split="test",
        judged_negatives=True,
    )
    with caplog.at_level(logging.WARNING):
        records = load_records(config, base_dir=tmp_path)
    assert [record.to_json() for record in records] == [
        {
            "query": "where does the cat sleep",
            "positive": ["cats the cat sleeps on the mat"],
            "negative": ["a dog chases the cat"],
        },
        {
            "query": "soup with bread",
            "positive": ["the moon and the soup", "soup soup with bread and cheese"],
        },
    ]
    (record,) = caplog.records
    message = record.getMessage().replace(f"{tmp_path}/", "")
    assert message.startswith("odd: left out: odd/qrels/test.tsv:7: document 'd6' was judged other")
    for part in (
        "odd/corpus.jsonl:2: document 'd2' has no text",
        "document 'gone' is not in odd/corpus.jsonl (1 more like it: line 9)",
        "query 'absent' is not in odd/queries.jsonl",
    ):
        assert part in message


def test_documents_given_again(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "set", {"corpus.jsonl": lines_of([*CORPUS, CORPUS[0]])})
    task = load_task(folder)
    assert isinstance(task.data, RetrievalData)
    assert task.data.document_ids == ("10", "11", "12")
    assert "corpus.jsonl:4: corpus: an id is given again with the same text" in task.remarks
    other = CORPUS[0] | {"text": "something else"}
    write_beir(tmp_path / "set", {"corpus.jsonl": lines_of([*CORPUS, other])})
    with pytest.raises(DataError, match=r"corpus\.jsonl:4: id '10' is given twice, first at"):
        load_task(folder)


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "set", VARIANTS["all compressed"])
    for name in ("corpus.jsonl.gz", "qrels/test.tsv.gz"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-9])
        with pytest.raises(DataError, match=rf"{name}.*broken gzip file"):
            load_task(folder)
        (folder / name).write_bytes(whole)
    (folder / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(b"1\t10\t1\n\xff\t11\t1\n"))
    with pytest.raises(DataError, match=r"test\.tsv\.gz:2: not UTF-8 text"):
        load_task(folder)


# --- folders without task.json, splits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "taken"),
    [
        (["train", "dev", "test"], "test"),
        (["train", "dev"], "dev"),
        (["train", "validation"], "validation"),
        (["train"], "train"),
        (["other", "train"], "train"),
        (["b", "a"], "a"),
    ],
)
def test_the_split_that_is_taken(splits: list[str], taken: str, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "Some-Set")
    (folder / "qrels" / "test.tsv").unlink()
    for split in splits:
        row = ("1", "10", "1" if split == taken else "0")
        other = ("2", "12", "1" if split != taken else "0")
        (folder / "qrels" / f"{split}.tsv").write_text(table_of([HEADER, row, other]))
    task = load_task(folder)
    assert isinstance(task.data, RetrievalData)
    assert task.data.judgements == {"1": {"10": 1}, "2": {"12": 0}}
    assert (task.name, task.type, task.instruction) == ("Some-Set", "Retrieval", None)
    assert task.main_score == "ndcg_at_10"
    assert f"no task.json: Retrieval without an instruction, ndcg_at_10, split {taken}" in (
        task.remarks
    )


def test_task_json_may_name_the_split(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "r", "Retrieval", split="dev")
    with pytest.raises(DataError, match=r"dev\.tsv: no such file; .* the splits there: test"):
        load_task(folder)
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    data = load_task(folder).data
    assert isinstance(data, RetrievalData)
    assert data.judgements == {"q1": {"d1": 1}}
    write_task(folder, "Retrieval")
    assert load_task(folder).remarks == ""
    (folder / "qrels" / "test.tsv").unlink()
    assert "qrels/dev.tsv: the split is dev, since there is no test" in load_task(folder).remarks
    with pytest.raises(DataError, match="'split' is of Retrieval tasks, not of STS"):
        load_task(write_task(tmp_path / "s", "STS", split="dev"))


def test_plain_folders_are_found_among_tasks(tmp_path: Path) -> None:
    plain = write_beir(tmp_path / "all" / "scifact")
    task = write_task(tmp_path / "all" / "zzz", "STS")
    (tmp_path / "all" / "half").mkdir()
    write_rows(tmp_path / "all" / "half" / "corpus.jsonl", CORPUS)
    assert find_tasks(tmp_path / "all") == [plain, task]
    assert find_tasks(plain) == [plain]
    assert [task.name for task in load_tasks([tmp_path / "all"])] == ["scifact", "zzz"]


def test_broken_tasks_may_be_passed_over(tmp_path: Path) -> None:
    write_task(tmp_path / "good", "STS")
    (write_task(tmp_path / "bad", "STS", name="no file") / "test.jsonl").unlink()
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "task.json").write_text("{")
    broken: dict[str, str] = {}
    assert [task.name for task in load_tasks([tmp_path], broken=broken)] == ["good"]
    assert set(broken) == {"no file", "worse"}
    assert "no such file" in broken["no file"]
    assert "not valid JSON" in broken["worse"]


# --- results with the id of their query -----------------------------------------------------------


def arguments(folder: Path, **header: Any) -> Path:
    """A set like ArguAna: every query is a document, and what refutes it is another."""
    words = ["cats", "soup", "moon", "dogs"]
    corpus = [{"_id": f"{word}-pro", "text": f"{word} {word} {word} good"} for word in words]
    corpus += [{"_id": f"{word}-con", "text": f"{word} {word} bad"} for word in words]
    write_task(folder, "Retrieval", **header)
    write_rows(folder / "corpus.jsonl", corpus)
    write_rows(folder / "queries.jsonl", corpus[:4])
    rows = [(f"{word}-pro", f"{word}-con", "1") for word in words]
    (folder / "qrels" / "test.tsv").write_text(table_of([HEADER, *rows]))
    return folder


@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.usefixtures("_own_datasets_cache")
def test_identical_ids_are_ignored_as_in_mteb(ignore: bool, mteb_of: Any, tmp_path: Path) -> None:
    from nvembed.evaluation.mteb_adapter import score

    folder = arguments(tmp_path / "mine", ignore_identical_ids=ignore)
    task = load_task(folder)
    as_published(folder, [(f"{w}-pro", f"{w}-con", 1) for w in ("cats", "soup", "moon", "dogs")])
    expected = mteb_of(folder, task, ignore=ignore)
    assert expected["ndcg_at_10"] == pytest.approx(1.0 if ignore else 0.63093, abs=1e-5)
    assert_scores_of_mteb(task, expected)
    by_adapter = score(task, NoisyEncoder(64))
    assert by_adapter["ndcg_at_10"] == pytest.approx(expected["ndcg_at_10"], abs=1e-6)
    bm25 = score_task(task, None)[0].main_score
    assert bm25 == pytest.approx(1.0 if ignore else 0.63093, abs=1e-5)


def test_a_corpus_of_the_query_alone_has_no_results(tmp_path: Path) -> None:
    folder = arguments(tmp_path / "mine", ignore_identical_ids=True)
    write_rows(folder / "corpus.jsonl", [{"_id": "cats-pro", "text": "cats are good"}])
    (folder / "qrels" / "test.tsv").write_text("cats-pro\tcats-pro\t1\n")
    scores = score_local(load_task(folder), NoisyEncoder(64)).scores
    assert (scores["ndcg_at_10"], scores["mrr_at_10"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ArguAna", "ArguAna"),
        ("arguana", "ArguAna"),
        ("fiqa", "FiQA2018"),
        ("QuoraRetrieval", "QuoraRetrieval"),
        ("NFCorpus", None),
        ("mine", None),
    ],
)
def test_known_tasks_need_no_key(name: str, known: str | None, tmp_path: Path) -> None:
    assert ignores_identical_ids(name) == known
    task = load_task(arguments(tmp_path / "folder", name=name))
    assert task.ignore_identical_ids == (known is not None)
    assert task.remarks == (
        f"results with the id of their query do not count, as in mteb's {known}" if known else ""
    )
    told = load_task(arguments(tmp_path / "folder", name=name, ignore_identical_ids=False))
    assert not told.ignore_identical_ids
    assert (task_hash(task) == task_hash(told)) == (known is None)
    # Where no query is a document there is nothing to say.
    write_task(tmp_path / "folder", "Retrieval", name=name)
    assert load_task(tmp_path / "folder").remarks == ""


def test_the_key_is_true_or_false_and_of_retrieval(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'ignore_identical_ids' is neither true nor false"):
        load_task(write_task(tmp_path / "r", "Retrieval", ignore_identical_ids="yes"))
    with pytest.raises(DataError, match="'ignore_identical_ids' is of Retrieval tasks, not of STS"):
        load_task(write_task(tmp_path / "s", "STS", ignore_identical_ids=True))


@pytest.mark.slow
def test_the_list_of_known_tasks_is_that_of_mteb() -> None:
    import mteb

    from nvembed.evaluation.mteb_adapter import quiet

    with quiet():
        tasks = mteb.get_tasks(exclude_superseded=False)
    ignoring = {
        task.metadata.name for task in tasks if getattr(task, "ignore_identical_ids", False)
    }
    assert {name for name in ignoring if ignores_identical_ids(name) != name} == set()
    others = {task.metadata.name for task in tasks} - ignoring
    # Folders of BEIR's release have names of their own; none of them is another task of mteb.
    assert {name for name in others if ignores_identical_ids(name)} == set()


def test_the_main_tasks_are_those_of_mteb() -> None:
    from mteb.tasks.retrieval.eng.argu_ana_retrieval import ArguAna
    from mteb.tasks.retrieval.eng.nf_corpus_retrieval import NFCorpus

    for task in (ArguAna, NFCorpus):
        name = task.metadata.name
        assert (ignores_identical_ids(name) == name) == task.ignore_identical_ids
