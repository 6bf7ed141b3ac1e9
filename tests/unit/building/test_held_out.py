"""The held-out part: no text on both sides, of the right size, readable as a task."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.building.held_out import make_task, split, write_task
from nvembed.building.own_pairs import OwnPairs
from nvembed.core.errors import DataError
from nvembed.data.config import file_dataset
from nvembed.data.records import Kind, LabelRecord, PairRecord, Record, StsRecord
from nvembed.evaluation.task_files import ClassificationData, PairData, RetrievalData
from nvembed.evaluation.tasks import load_task


def own(kind: Kind, records: list[Record]) -> OwnPairs:
    return OwnPairs(file_dataset(Path("faq.csv"), kind), tuple(records))


def test_files_are_on_one_side() -> None:
    records = [PairRecord(f"q{i}", (f"d{i}",)) for i in range(400)]
    sources = [{f"file {i // 8}"} for i in range(400)]
    sources[0] |= {"file 7"}  # a query of two files
    found = split(records, sources=sources)
    files = [
        {file for one, of in zip(records, sources, strict=True) if one in side for file in of}
        for side in (found.held, found.rest)
    ]
    assert found.by_files
    assert not files[0] & files[1]
    assert len(found.held) == 40  # five files, or three and the two that share a query
    assert len(files[0] | files[1]) == 50
    assert not split(records).by_files
    # Of few files none fits into a tenth.
    few = split(records, sources=[{f"file {i // 200}"} for i in range(400)])
    assert (few.by_files, few.held) == (False, split(records).held)


def texts_of(record: Record) -> set[str]:
    assert isinstance(record, PairRecord)
    return {" ".join(text.lower().split()) for text in (record.query, *record.positives)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(20, 60)), min_size=4, max_size=60))
def test_no_text_is_on_both_sides(links: list[tuple[int, int]]) -> None:
    # Numbers from 20 to 40 are queries and documents; spellings differ in case and white space.
    records: list[Record] = [
        PairRecord(f"Text  {query}", (f"text {document}",), (f"text {(document * 7) % 61}",))
        for query, document in links
    ]
    try:
        found = split(records)
    except DataError:
        return
    held = set().union(*map(texts_of, found.held))
    trained = set().union(*map(texts_of, found.rest))
    assert not held & trained
    assert not held & {text for one in found.rest for text in one.negatives}
    assert len(found.held) + len(found.rest) == len(records)
    assert 0 < len(found.held) <= len(records) // 2
    shuffled = random.Random(0).sample(records, len(records))
    assert {*split(shuffled).held} == {*found.held}


@pytest.mark.parametrize(("count", "held"), [(20, 10), (40, 20), (100, 30), (700, 70), (6000, 500)])
def test_sizes(count: int, held: int) -> None:
    found = split([PairRecord(f"q{i}", (f"d{i}",)) for i in range(count)])
    assert (len(found.held), len(found.rest)) == (held, count - held)
    warning = f"only {held} records could be held out: their scores are rough"
    assert found.warning == (warning if held < 30 else None)


def test_a_document_that_everything_shares_is_trained_on() -> None:
    shared: list[Record] = [PairRecord(f"q{i}", ("all",)) for i in range(80)]
    alone: list[Record] = [PairRecord(f"x{i}", (f"d{i}",)) for i in range(20)]
    found = split([*shared, *alone])
    assert {*found.held} == {*alone}
    with pytest.raises(DataError, match="80 records cannot be divided"):
        split(shared)


def test_every_label_gives_its_share() -> None:
    sizes = {"a": 300, "b": 90, "c": 5, "rare": 2}
    records = [
        LabelRecord(f"{name} {i}", name) for name, size in sizes.items() for i in range(size)
    ]
    found = split(records)
    held = [record.label for record in found.held]
    assert {name: held.count(name) for name in sizes} == {"a": 30, "b": 9, "c": 1, "rare": 0}


def test_a_retrieval_task(tmp_path: Path) -> None:
    asked = [PairRecord("q", ("a", "b"), ("n", "known", "no")), PairRecord("r", ("A ",))]
    others = [PairRecord("s", ("known",), ("no",))]
    texts = write_task(tmp_path / "t", own("retrieval", []), asked, others)
    data = load_task(tmp_path / "t").data
    assert isinstance(data, RetrievalData)
    assert (data.queries, data.documents) == (("q", "r"), ("a", "b", "n"))
    assert data.judgements == {"q0": {"d0": 1, "d1": 1}, "q1": {"d0": 1}}
    assert sorted(texts) == ["a", "b", "n", "q", "r"]


def test_whole_files_as_tasks(tmp_path: Path) -> None:
    pairs = own("retrieval", [PairRecord(f"q{i}", (f"d{i}",)) for i in range(9)])
    assert make_task(pairs, tmp_path / "faq") == 9
    task = load_task(tmp_path / "faq")
    assert (task.name, task.type, task.main_score) == ("faq", "Retrieval", "ndcg_at_10")
    labelled: list[Record] = [LabelRecord(f"text {i}", "xy"[i % 2]) for i in range(100)]
    assert make_task(own("classification", labelled), tmp_path / "labels") == 50
    data = load_task(tmp_path / "labels").data
    assert isinstance(data, ClassificationData)
    assert (len(data.train.texts), len(data.test.texts)) == (50, 50)
    assert not {*data.train.texts} & {*data.test.texts}
    graded: list[Record] = [StsRecord(f"a{i}", f"b{i}", float(i % 5)) for i in range(9)]
    assert make_task(own("sts", graded), tmp_path / "graded") == 9
    sts = load_task(tmp_path / "graded").data
    assert isinstance(sts, PairData)
    assert sts.values == tuple(float(i % 5) for i in range(9))


def test_a_classifier_is_fitted_on_few_texts_of_a_label(tmp_path: Path) -> None:
    rest: list[Record] = [LabelRecord(f"{name}{i}", name) for name in "xy" for i in range(50)]
    write_task(tmp_path, own("classification", []), [LabelRecord("t", "x")], rest)
    data = load_task(tmp_path).data
    assert isinstance(data, ClassificationData)
    assert [data.train.labels.count(name) for name in "xy"] == [32, 32]
