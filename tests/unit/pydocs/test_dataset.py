"""The demo's data set: no leak across the split, one right answer per query, readable files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from nvembed.core.errors import DataError
from nvembed.core.files import read_jsonl
from nvembed.core.ownership import MARK
from nvembed.data.loading import read_records
from nvembed.evaluation.task_files import RetrievalData
from nvembed.evaluation.tasks import load_task
from oracles import demo as oracle
from pydocs.dataset import (
    DatasetLimits,
    DemoData,
    build_dataset,
    document_text,
    evaluation_queries,
    training_records,
)
from pydocs.harvest import DocEntry
from pydocs.split import held_out

LIMITS = DatasetLimits(
    held_out_documents=60, packages=3, topics=5, min_test_texts=3, max_test_texts=8
)
NOUNS = [
    "matrix",
    "graph",
    "tensor",
    "window",
    "socket",
    "queue",
    "archive",
    "colour",
    "angle",
    "signal",
    "polynomial",
    "date",
]
VERBS = ["Compute", "Return", "Draw", "Sort", "Remove", "Parse", "Merge", "Check"]


def entry(number: int, package: str, module: str, rng: random.Random) -> DocEntry:
    noun, other = rng.sample(NOUNS, 2)
    name = f"f{number}"
    return DocEntry(
        name=f"{package}.{module}.{name}",
        module=f"{package}.{module}",
        package=package,
        kind="function",
        signature=f"{name}({noun})",
        summary=f"{rng.choice(VERBS)} the {noun} number {number} of the {other}.",
        rest=" ".join(rng.choices([*NOUNS, *(f"{package}{n}" for n in range(40))], k=40)),
    )


@pytest.fixture(scope="module")
def entries() -> list[DocEntry]:
    rng = random.Random(0)
    made = [
        entry(number, f"pack{number % 4}", f"part{number % 3}.module{number % 120}", rng)
        for number in range(1200)
    ]
    # The same documentation in many modules, as of `fit`.
    copies = [
        DocEntry(
            f"{e.module}.fit", e.module, e.package, "method", "fit(x)", "Fit the model.", "w " * 40
        )
        for e in made[::10]
    ]
    return made + copies


@pytest.fixture(scope="module")
def built(entries: list[DocEntry], tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return build_dataset(entries, tmp_path_factory.mktemp("demo"), seed=3, limits=LIMITS)


def test_tasks_and_records_load(built: DemoData) -> None:
    retrieval, classification, clustering = map(load_task, built.tasks)
    assert [t.type for t in (retrieval, classification, clustering)] == [
        "Retrieval",
        "Classification",
        "Clustering",
    ]
    assert isinstance(retrieval.data, RetrievalData)
    assert len(retrieval.data.documents) == 60
    assert len(retrieval.data.queries) >= 50
    data = built.folder / "data"
    assert len(read_records(data / "retrieval.jsonl", "retrieval")) > 1000
    for kind in ("classification", "clustering"):
        labels = {record.label for record in read_records(data / f"{kind}.jsonl", kind)}
        assert len(labels) >= 4
    stats = json.loads((data / "stats.json").read_text(encoding="utf-8"))
    assert stats == built.stats
    assert stats["entries"] == 1320
    assert stats["with_enough_text"] == 1320
    # Of the 120 copies one is left, on the held-out side.
    assert sum(stats["near_duplicates_removed"].values()) == 119
    assert sum(stats["documents"].values()) == 1201


def test_no_document_of_a_held_out_module_is_trained_on(
    built: DemoData, entries: list[DocEntry]
) -> None:
    sides = {True: set[str](), False: set[str]()}
    for e in entries:
        if e.summary != "Fit the model.":
            sides[held_out(e.module)].add(document_text(e, LIMITS.document_chars))
    corpus = {row["text"] for _, row in read_jsonl(built.tasks[0] / "corpus.jsonl")}
    trained = {
        document
        for record in read_records(built.folder / "data" / "retrieval.jsonl", "retrieval")
        for document in record.positives
    }
    assert trained <= sides[False]
    assert corpus - sides[True] <= {"fit(x)\n" + ("w " * 40).strip()}
    assert len(trained) > 900


def test_all_held_out_documents_can_be_searched_with_their_summaries(
    built: DemoData, entries: list[DocEntry]
) -> None:
    rows = {row["_id"]: row["text"] for _, row in read_jsonl(built.searched)}
    held = {e.name: e for e in entries if held_out(e.module)}
    assert rows.keys() <= held.keys()
    assert len(rows) == built.stats["documents"]["held_out"]
    assert rows.keys() >= {row["_id"] for _, row in read_jsonl(built.tasks[0] / "corpus.jsonl")}
    assert all(held[name].summary in text for name, text in rows.items())


def test_near_duplicates_of_held_out_texts_leave_training(
    entries: list[DocEntry], tmp_path: Path
) -> None:
    held = next(e for e in entries if held_out(e.module))
    module = next(e.module for e in entries if not held_out(e.module))
    words = held.rest.split()
    near = " ".join([*words[:-1], "changed"])
    assert len(oracle.triples(near) & oracle.triples(held.rest)) > 0.8 * len(oracle.triples(near))
    copy = DocEntry("copy", module, held.package, "function", "copy()", "Copy it all.", near)
    built = build_dataset([*entries, copy], tmp_path, limits=LIMITS)
    text = (built.folder / "data" / "retrieval.jsonl").read_text(encoding="utf-8")
    assert "copy()" not in text
    assert sum(built.stats["near_duplicates_removed"].values()) == 120


def test_every_query_has_the_document_of_its_own_summary(
    built: DemoData, entries: list[DocEntry]
) -> None:
    summaries = {e.name: e.summary for e in entries}
    queries = {row["_id"]: row for _, row in read_jsonl(built.tasks[0] / "queries.jsonl")}
    task = load_task(built.tasks[0])
    assert isinstance(task.data, RetrievalData)
    for query, judged in task.data.judgements.items():
        (document,) = judged
        number = next(word for word in summaries[document].split() if word.isdigit())
        assert number in re.findall(r"\w+", queries[query]["text"])
    styles = [row["style"] for row in queries.values()]
    assert max(map(styles.count, set(styles))) - min(map(styles.count, set(styles))) <= 1
    assert set(styles) == {"summary", "question", "keywords"}


def test_ambiguous_and_known_summaries_are_no_queries(entries: list[DocEntry]) -> None:
    first, second, third = entries[:3]
    corpus = [first, second, third, DocEntry(**{**vars(first), "name": "again"})]
    queries = evaluation_queries(corpus, {" ".join(second.summary.lower().strip(".").split())}, 0)
    assert [query.entry for query in queries] == [third]


def test_documents_that_share_a_query_become_its_positives(entries: list[DocEntry]) -> None:
    same = [
        DocEntry(**{**vars(entries[n]), "summary": "Sort all the rows.", "name": f"n{n}"})
        for n in range(3)
    ]
    limits = DatasetLimits(queries_per_document=3)
    summary = [r for r in training_records(same, limits, 0) if r["query"] == "Sort all the rows"]
    assert len(summary) == 1
    assert sorted(summary[0]["positive"]) == sorted(document_text(e, 800) for e in same)
    few = DatasetLimits(queries_per_document=3, max_positives=2)
    queries = [r["query"] for r in training_records(same, few, 0)]
    assert "Sort all the rows" not in queries  # too general


def test_same_input_same_files(entries: list[DocEntry], built: DemoData, tmp_path: Path) -> None:
    again = build_dataset(list(reversed(entries)), tmp_path, seed=3, limits=LIMITS)
    other = build_dataset(entries, tmp_path / "other", seed=4, limits=LIMITS)
    files = sorted(p.relative_to(built.folder) for p in built.folder.rglob("*.*") if p.is_file())
    assert len([file for file in files if file.name != MARK]) == 14
    assert all((again.folder / f).read_bytes() == (built.folder / f).read_bytes() for f in files)
    records = Path("data/retrieval.jsonl")
    assert (other.folder / records).read_bytes() != (built.folder / records).read_bytes()


def test_classes_are_split_too(built: DemoData) -> None:
    _, classification, clustering = built.tasks
    train = {row["text"] for _, row in read_jsonl(classification / "train.jsonl")}
    test = {row["text"] for _, row in read_jsonl(classification / "test.jsonl")}
    assert train
    assert test
    assert not train & test
    labels = {row["label"] for _, row in read_jsonl(clustering / "test.jsonl")}
    assert labels <= {f"pack{p}.part{q}" for p in range(4) for q in range(3)}
    assert len(labels) == 5


def test_too_little_documentation(tmp_path: Path, entries: list[DocEntry]) -> None:
    with pytest.raises(DataError, match="found 5 documented functions and classes, too few"):
        build_dataset(entries[:5], tmp_path)
    assert not list(tmp_path.iterdir())
