"""The demo's data: training records and evaluation tasks made of installed documentation.

Enters: the entries of `harvest.py`. Leaves, in the layouts that every command of the package reads:

    OUT/tasks/pydocs_retrieval        queries against documents of held-out modules
    OUT/tasks/pydocs_classification   text → package; train part from training modules
    OUT/tasks/pydocs_clustering       held-out texts by subpackage
    OUT/data/{retrieval,classification,clustering}.jsonl   training modules only
    OUT/data/search.jsonl             all held-out documents with their summaries, to search in
    OUT/data/stats.json               how many entries each step took in and let out

A document is the signature and the documentation without its summary; a query is made from the
summary (`questions.py`). The split is by module (`split.py`). Near-duplicates go (`duplicates.py`):
among held-out documents, among training documents, and training documents that resemble a held-out
one. A summary that several documents share gives no evaluation query. `run.py` uses all of this.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.errors import DataError
from nvembed.core.files import atomic_folder, write_json, write_jsonl, write_text
from nvembed.core.runs import derive_seed
from pydocs.docstrings import truncate
from pydocs.duplicates import keep_distinct
from pydocs.harvest import DocEntry
from pydocs.questions import QUERY_STYLES, QueryStyle, make_query
from pydocs.split import held_out

RETRIEVAL_INSTRUCTION = "Given a question about Python, retrieve the documentation that answers it"
CLASSIFICATION_INSTRUCTION = "Identify the Python package that a piece of documentation belongs to"
CLUSTERING_INSTRUCTION = "Identify the topic of a piece of Python documentation"

DEMO = "demo"
SEARCHED = "search.jsonl"
TASK_NAMES = ("pydocs_retrieval", "pydocs_classification", "pydocs_clustering")


@dataclass(frozen=True)
class DatasetLimits:
    """Sizes of the data set.

    Args:
        document_chars: longest document; longer ones are cut at a sentence or word end.
        label_text_chars: longest text to classify or cluster.
        min_rest_words: documentation beside the summary that a definition needs to be a document.
        duplicate_threshold: Jaccard similarity of word 3-grams from which texts are duplicates.
        held_out_documents: most documents of the retrieval task.
        queries_per_document: training queries made from one summary, of different styles.
        max_positives: a training query with more documents than this is too general to teach.
        packages: most classes of the classification task.
        topics: most classes of the clustering task.
        min_test_texts: held-out texts that a class needs.
        max_test_texts: held-out texts taken of a class, so that large packages do not dominate.
        max_train_texts: texts of a class in the train part of the classification task.
        max_training_texts: texts of a class in the training records.
    """

    document_chars: int = 600
    label_text_chars: int = 200
    min_rest_words: int = 15
    duplicate_threshold: float = 0.6
    held_out_documents: int = 2000
    queries_per_document: int = 2
    max_positives: int = 3
    packages: int = 20
    topics: int = 20
    min_test_texts: int = 25
    max_test_texts: int = 40
    max_train_texts: int = 32
    max_training_texts: int = 300


@dataclass(frozen=True)
class DemoData:
    """Where the data set lies and what went into it."""

    folder: Path
    stats: dict[str, Any]

    @property
    def tasks(self) -> tuple[Path, ...]:
        """The task folders: retrieval, classification, clustering."""
        return tuple(self.folder / "tasks" / name for name in TASK_NAMES)

    @property
    def searched(self) -> Path:
        """All held-out documents with their summaries."""
        return self.folder / "data" / SEARCHED


def build_dataset(
    entries: Sequence[DocEntry],
    output: Path,
    *,
    seed: int = 0,
    limits: DatasetLimits | None = None,
) -> DemoData:
    """Write tasks and training records made of `entries` below `output`.

    The same entries, seed and limits give the same files.

    Raises:
        DataError: there is too little documentation to train and evaluate on.
    """
    limits = limits or DatasetLimits()
    documented = [e for e in entries if len(e.rest.split()) >= limits.min_rest_words]
    held, training, duplicates = _distinct_split(documented, limits)
    corpus = _sample(held, limits.held_out_documents, seed, "corpus")
    queries = evaluation_queries(corpus, {_normal(entry.summary) for entry in training}, seed)
    records = training_records(training, limits, seed)
    packages = _class_texts(held, training, _package, limits.packages, limits, seed)
    topics = _class_texts(held, training, _topic, limits.topics, limits, seed)
    if not queries or not records or min(len(packages.labels), len(topics.labels)) < 2:
        raise DataError(
            f"found {len(documented):,} documented functions and classes, too few for a data set",
            where="the packages of this Python",
            expected="some thousands, as numpy, torch and scikit-learn bring",
            hint="Run the demo in the environment where this package is installed with its extras",
        )
    stats = {
        "entries": len(entries),
        "with_enough_text": len(documented),
        "near_duplicates_removed": duplicates,
        "documents": {"training": len(training), "held_out": len(held)},
        "modules": {
            "training": len({entry.module for entry in training}),
            "held_out": len({entry.module for entry in held}),
        },
        "pydocs_retrieval": {
            "documents": len(corpus),
            "queries": len(queries),
            "queries_by_style": dict(Counter(query.style for query in queries)),
        },
        "pydocs_classification": {
            "train": len(packages.train),
            "test": len(packages.test),
            "labels": packages.labels,
        },
        "pydocs_clustering": {"test": len(topics.test), "labels": topics.labels},
        "records": {
            "retrieval": len(records),
            "classification": len(packages.records),
            "clustering": len(topics.records),
        },
    }
    with atomic_folder(output / "tasks", DEMO) as folder:
        _write_retrieval(folder / TASK_NAMES[0], corpus, queries, limits)
        header = _header(TASK_NAMES[1], "Classification", CLASSIFICATION_INSTRUCTION, "accuracy")
        write_json(folder / TASK_NAMES[1] / "task.json", header)
        write_jsonl(folder / TASK_NAMES[1] / "train.jsonl", packages.train)
        write_jsonl(folder / TASK_NAMES[1] / "test.jsonl", packages.test)
        header = _header(TASK_NAMES[2], "Clustering", CLUSTERING_INSTRUCTION, "v_measure")
        write_json(folder / TASK_NAMES[2] / "task.json", header)
        write_jsonl(folder / TASK_NAMES[2] / "test.jsonl", topics.test)
    with atomic_folder(output / "data", DEMO) as folder:
        write_jsonl(folder / SEARCHED, ({"_id": e.name, "text": search_text(e)} for e in held))
        write_jsonl(folder / "retrieval.jsonl", records)
        write_jsonl(folder / "classification.jsonl", packages.records)
        write_jsonl(folder / "clustering.jsonl", topics.records)
        write_json(folder / "stats.json", stats)
    return DemoData(output, stats)


def document_text(entry: DocEntry, max_chars: int) -> str:
    """Return what is searched: signature and documentation, without the summary."""
    return truncate(f"{entry.signature}\n{entry.rest}", max_chars)


def search_text(entry: DocEntry) -> str:
    """Return summary, signature and documentation: what is cut keeps what says most."""
    return f"{entry.summary}\n{entry.signature}\n{entry.rest}".strip()


@dataclass(frozen=True)
class EvaluationQuery:
    """A query whose one right answer is the document of `entry`."""

    text: str
    style: QueryStyle
    entry: DocEntry


def evaluation_queries(
    corpus: Sequence[DocEntry], known_summaries: Collection[str], seed: int
) -> list[EvaluationQuery]:
    """Make one query for each document of the corpus that a query can single out.

    The styles take turns. Left out are summaries that several documents share, those that are also
    in training (`known_summaries`, normalised), and queries that come out equal.
    """
    shared = Counter(_normal(entry.summary) for entry in corpus)
    queries: dict[str, EvaluationQuery] = {}
    for entry in corpus:
        summary = _normal(entry.summary)
        if shared[summary] > 1 or summary in known_summaries:
            continue
        style = QUERY_STYLES[len(queries) % len(QUERY_STYLES)]
        text = _query_text(entry, style, seed)
        queries.setdefault(_normal(text), EvaluationQuery(text, style, entry))
    return list(queries.values())


def training_records(
    training: Sequence[DocEntry], limits: DatasetLimits, seed: int
) -> list[dict[str, Any]]:
    """Make retrieval records, queries of different styles for each document, in random order.

    Documents that share a query become positives of one record.
    """
    positives: defaultdict[str, list[str]] = defaultdict(list)
    for entry in training:
        rng = random.Random(derive_seed(seed, "styles", entry.name))
        document = document_text(entry, limits.document_chars)
        for style in rng.sample(QUERY_STYLES, limits.queries_per_document):
            positives[_query_text(entry, style, seed)].append(document)
    records = [
        {"query": query, "positive": list(dict.fromkeys(documents))}
        for query, documents in positives.items()
        if len(documents) <= limits.max_positives
    ]
    random.Random(derive_seed(seed, "records")).shuffle(records)
    return records


def _query_text(entry: DocEntry, style: QueryStyle, seed: int) -> str:
    rng = random.Random(derive_seed(seed, "query", entry.name, style))
    return make_query(entry.summary, style, rng, is_class=entry.kind == "class")


def _distinct_split(
    entries: Sequence[DocEntry], limits: DatasetLimits
) -> tuple[list[DocEntry], list[DocEntry], dict[str, int]]:
    """Split by module and remove near-duplicates; also returns how many were removed."""
    # Held-out ones first: of two that resemble each other across the split, training loses its own.
    ordered = sorted(entries, key=lambda entry: (not held_out(entry.module), entry.name))
    texts = [truncate(entry.rest, limits.document_chars) for entry in ordered]
    kept = [
        ordered[position] for position in keep_distinct(texts, threshold=limits.duplicate_threshold)
    ]
    held = [entry for entry in kept if held_out(entry.module)]
    training = [entry for entry in kept if not held_out(entry.module)]
    all_held = sum(held_out(entry.module) for entry in entries)
    removed = {
        "training": len(entries) - all_held - len(training),
        "held_out": all_held - len(held),
    }
    return held, training, removed


# --- Classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ClassTexts:
    """Labelled rows of one kind of label: the two parts of the task, and the training records."""

    labels: list[str]
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    records: list[dict[str, str]]


def _class_texts(
    held: Sequence[DocEntry],
    training: Sequence[DocEntry],
    label_of: Callable[[DocEntry], str],
    max_labels: int,
    limits: DatasetLimits,
    seed: int,
) -> _ClassTexts:
    """Choose the classes with the most held-out texts and draw their texts.

    Training uses every class with enough texts, the task those that have enough held-out texts too.
    """
    held_by, training_by = _grouped(held, label_of), _grouped(training, label_of)
    taught = [name for name, found in training_by.items() if len(found) >= limits.min_test_texts]
    tested = [name for name in taught if len(held_by.get(name, ())) >= limits.min_test_texts]
    tested = sorted(sorted(tested, key=lambda name: (-len(held_by[name]), name))[:max_labels])

    def rows(
        groups: dict[str, list[DocEntry]], labels: Sequence[str], most: int
    ) -> list[dict[str, str]]:
        drawn = [
            {"text": _label_text(entry, limits.label_text_chars), "label": label}
            for label in labels
            for entry in _sample(groups[label], most, seed, label)
        ]
        return list({row["text"]: row for row in drawn}.values())

    return _ClassTexts(
        labels=tested,
        train=rows(training_by, tested, limits.max_train_texts),
        test=rows(held_by, tested, limits.max_test_texts),
        records=rows(training_by, sorted(taught), limits.max_training_texts),
    )


def _package(entry: DocEntry) -> str:
    return entry.package


def _topic(entry: DocEntry) -> str:
    """``scipy.stats`` for all that lies below it; private modules do not count as a level."""
    package, *inner = entry.module.split(".")
    public = [part for part in inner if not part.startswith("_")]
    return ".".join([package, *public[:1]])


def _label_text(entry: DocEntry, max_chars: int) -> str:
    return truncate(f"{entry.summary} {entry.rest}", max_chars)


def _grouped(
    entries: Iterable[DocEntry], label_of: Callable[[DocEntry], str]
) -> dict[str, list[DocEntry]]:
    groups: defaultdict[str, list[DocEntry]] = defaultdict(list)
    for entry in entries:
        groups[label_of(entry)].append(entry)
    return dict(groups)


def _sample(entries: Sequence[DocEntry], most: int, seed: int, name: str) -> list[DocEntry]:
    """Draw at most `most` entries, in their order."""
    if len(entries) <= most:
        return list(entries)
    chosen = random.Random(derive_seed(seed, "sample", name)).sample(range(len(entries)), most)
    return [entries[position] for position in sorted(chosen)]


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# --- Files ----------------------------------------------------------------------------------------


def _write_retrieval(
    folder: Path,
    corpus: Sequence[DocEntry],
    queries: Sequence[EvaluationQuery],
    limits: DatasetLimits,
) -> None:
    """Write a retrieval task in BEIR layout; documents are called by their qualified name."""
    header = _header(folder.name, "Retrieval", RETRIEVAL_INSTRUCTION, "ndcg_at_10")
    write_json(folder / "task.json", header)
    write_jsonl(
        folder / "corpus.jsonl",
        (
            {"_id": entry.name, "title": "", "text": document_text(entry, limits.document_chars)}
            for entry in corpus
        ),
    )
    numbered = [(f"q{number}", query) for number, query in enumerate(queries)]
    write_jsonl(
        folder / "queries.jsonl",
        ({"_id": name, "text": query.text, "style": query.style} for name, query in numbered),
    )
    judgements = [f"{name}\t{query.entry.name}\t1" for name, query in numbered]
    lines = ["query-id\tcorpus-id\tscore", *judgements]
    write_text(folder / "qrels" / "test.tsv", "\n".join(lines) + "\n")


def _header(name: str, kind: str, instruction: str, main_score: str) -> dict[str, str]:
    return {
        "name": name,
        "type": kind,
        "instruction": instruction,
        "main_score": main_score,
        "license": "that of each installed package",
        "source": "documentation of the installed Python packages",
    }
