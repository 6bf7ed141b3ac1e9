"""Sets a part of a user's records aside as an evaluation task; no text is on both sides.

Records that share a text, as query or as document, go to one side together, and of a folder of
documents those of a file, where enough files can be set aside. Which do is decided by their texts
alone, so the order of a file changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvembed.building.own_pairs import OwnPairs
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import atomic_folder, write_json, write_jsonl, write_text
from nvembed.data.records import Kind, LabelRecord, PairRecord, Record, StsRecord
from nvembed.data.similarity import text_key
from nvembed.evaluation.task_files import TaskType
from nvembed.evaluation.tasks import load_task

DATA_TASK = "data task"
SHARE, LEAST, MOST = 0.1, 30, 500  # of the records
_FITTED = 32  # texts of a label that the classifier of a task is fitted on
_FEWEST = 3  # texts of a label from which one is held out
_Node = tuple[str, str]  # a kind, and the text or file
_TYPES: dict[Kind, tuple[TaskType, str]] = {
    "retrieval": ("Retrieval", "ndcg_at_10"),
    "classification": ("Classification", "accuracy"),
    "sts": ("STS", "cosine_spearman"),
}


@dataclass(frozen=True)
class Split:
    """Both sides of a file."""

    held: tuple[Record, ...]
    rest: tuple[Record, ...]
    by_files: bool = False  # no file is on both sides

    @property
    def warning(self) -> str | None:
        """Said of a part that is too small to measure much."""
        if len(self.held) >= LEAST:
            return None
        return f"only {len(self.held)} records could be held out: their scores are rough"


def split(
    records: Sequence[Record],
    target: int | None = None,
    sources: Sequence[Collection[str]] = (),
) -> Split:
    """Hold ``target`` records out; None is a tenth, at least 30 and at most 500, at most half.

    Of labels each gives its share, if it has three texts or more. Negatives that are a text of the
    held-out side are taken out of the other. ``sources`` are the files of each record: whole files
    are held out, unless these would be fewer than half of the ``target`` records.

    Raises:
        DataError: one side would be empty.
    """
    if target is None:
        target = min(max(round(SHARE * len(records)), LEAST), MOST, len(records) // 2)
    sizes = Counter(map(_label, records))
    quota = {"": target}
    if "" not in sizes:
        shares = {name: round(size * target / len(records)) for name, size in sizes.items()}
        quota = {name: max(1, shares[name]) if sizes[name] >= _FEWEST else 0 for name in sizes}
    held, rest = _divided(_together(records, sources), quota)
    by_files = bool(sources) and 2 * len(held) >= target
    if sources and not by_files:
        held, rest = _divided(_together(records), quota)
    if not held or not rest:
        raise DataError(
            f"{len(records):,} records cannot be divided so that no text is on both sides",
            expected="more records, or some that share no text with the others",
        )
    hidden = {text_key(text) for record in held for text in _texts(record)}
    return Split(tuple(held), tuple(_without(record, hidden) for record in rest), by_files)


def _divided(
    groups: Iterable[Sequence[Record]], quota: Mapping[str, int]
) -> tuple[list[Record], list[Record]]:
    """Put every group that fits into the quota of its label on the first side."""
    left, held, rest = dict(quota), list[Record](), list[Record]()
    for group in groups:
        label = _label(group[0])
        fits = len(group) <= left[label]
        left[label] -= len(group) if fits else 0
        (held if fits else rest).extend(group)
    return held, rest


def _label(record: Record) -> str:
    return record.label if isinstance(record, LabelRecord) else ""


def _texts(record: Record) -> tuple[str, ...]:
    if isinstance(record, PairRecord):
        return (record.query, *record.positives)
    if isinstance(record, StsRecord):
        return record.sentence1, record.sentence2
    return (record.text,)


def _together(
    records: Sequence[Record], sources: Sequence[Collection[str]] = ()
) -> list[list[Record]]:
    """Groups of records that share texts or files, in an order that depends on the texts alone."""
    parent: dict[_Node, _Node] = {}

    def root(key: _Node) -> _Node:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for number, record in enumerate(records):
        files = sources[number] if sources else ()
        first, *others = (("text", text_key(text)) for text in _texts(record))
        for other in (*others, *(("file", file) for file in files)):
            parent[root(other)] = root(first)
    groups: dict[_Node, list[Record]] = {}
    for record in records:
        groups.setdefault(root(("text", text_key(_texts(record)[0]))), []).append(record)

    def place(group: list[Record]) -> bytes:
        smallest = min(text_key(text) for record in group for text in _texts(record))
        return hashlib.blake2b(smallest.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    return sorted(groups.values(), key=place)


def _without(record: Record, hidden: set[str]) -> Record:
    if not isinstance(record, PairRecord):
        return record
    kept = [at for at, text in enumerate(record.negatives) if text_key(text) not in hidden]
    scores = record.negative_scores
    return replace(
        record,
        negatives=tuple(record.negatives[at] for at in kept),
        negative_scores=tuple(scores[at] for at in kept) if scores else (),
    )


# --- Task folders ---------------------------------------------------------------------------------


def make_task(pairs: OwnPairs, folder: Path) -> int:
    """Make a whole file an evaluation task; return how many records are asked.

    Of labelled texts half are for fitting the classifier.
    """
    fit: Sequence[Record] = ()
    asked: Sequence[Record] = pairs.records
    if pairs.config.kind == "classification":
        divided = split(asked, len(asked) // 2)
        asked, fit = divided.held, divided.rest
    with atomic_folder(folder, DATA_TASK) as temporary:
        write_task(temporary, pairs, asked, fit)
    return len(asked)


def write_task(
    folder: Path, pairs: OwnPairs, asked: Sequence[Record], others: Sequence[Record]
) -> list[str]:
    """Write the files of a task; return the texts that one evaluation embeds.

    ``others`` are those of the other side: up to 32 texts of a label fit the classifier, and no
    document of theirs stands beside those that are searched.
    """
    kind = pairs.config.kind
    if kind not in _TYPES:
        raise ConfigError(f"kind {kind}", expected=", ".join(_TYPES))
    task_type, main_score = _TYPES[kind]
    header = {"name": Path(str(pairs.config.path)).name.partition(".")[0] or "task"}
    header |= {"type": task_type, "main_score": main_score}
    write_json(folder / "task.json", header | {"instruction": pairs.config.instruction})
    if kind == "retrieval":
        texts = _write_retrieval(folder, asked, others)
    else:
        parts = {"test": asked}
        if kind == "classification":
            parts["train"] = list(_fitted(others))
        for name, records in parts.items():
            write_jsonl(folder / f"{name}.jsonl", (record.to_json() for record in records))
        texts = [text for records in parts.values() for one in records for text in _texts(one)]
    load_task(folder)  # the reader has the last word
    return texts


def _fitted(records: Sequence[Record]) -> Iterator[Record]:
    count: Counter[str] = Counter()
    for record in records:
        count[_label(record)] += 1
        if count[_label(record)] <= _FITTED:
            yield record


def _write_retrieval(folder: Path, asked: Sequence[Record], others: Sequence[Record]) -> list[str]:
    pairs = [record for record in asked if isinstance(record, PairRecord)]
    trained = [record for record in others if isinstance(record, PairRecord)]
    known = {text_key(text) for one in trained for text in (*_texts(one), *one.negatives)}
    ids: dict[str, str] = {}  # of documents, by their key
    corpus: list[dict[str, Any]] = []

    def document(text: str) -> str:
        if (key := text_key(text)) not in ids:
            ids[key] = f"d{len(ids)}"
            corpus.append({"_id": ids[key], "text": text})
        return ids[key]

    judged = [
        f"q{number}\t{document(text)}\t1\n"
        for number, record in enumerate(pairs)
        for text in record.positives
    ]
    for record in pairs:
        for text in record.negatives:
            if text_key(text) not in known:
                document(text)
    queries = [{"_id": f"q{number}", "text": one.query} for number, one in enumerate(pairs)]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    write_text(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judged))
    return [row["text"] for row in (*corpus, *queries)]
