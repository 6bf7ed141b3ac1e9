from __future__ import annotations

import random
from pathlib import Path

from nvembed.building.row_filters import Repeats, distinct
from nvembed.data.built_sets import read_shards, write_shards
from nvembed.data.records import Converted, LabelRecord, PairRecord, Record, StsRecord

WORDS = ["Red", "red", "blue ", " blue", "fox", "FOX", "owl\n"]


def run(records: list[Record], tmp_path: Path) -> tuple[list[Record], Repeats]:
    rows = [Converted(record, str(number)) for number, record in enumerate(records)]
    repeats = Repeats()
    kept = list(distinct(lambda: iter(rows), tmp_path / "spilled", repeats))
    assert not (tmp_path / "spilled").exists()
    places = [int(row.place) for row in kept]
    assert places == sorted(places)
    assert len(records) - len(kept) == repeats.equal + repeats.merged
    return [row.record for row in kept], repeats


def same(text: str) -> str:
    return " ".join(text.lower().split())


def plain_merge(records: list[PairRecord]) -> list[PairRecord]:
    """The rule in plain loops."""
    merged: list[PairRecord] = []
    for record in records:
        if any(same(record.query) == same(other.query) for other in merged):
            continue
        group = [other for other in records if same(other.query) == same(record.query)]
        if len(group) == 1:
            merged.append(record)
            continue
        positives: list[str] = []
        negatives: list[str] = []
        for texts, found in (("positives", positives), ("negatives", negatives)):
            for other in group:
                for text in getattr(other, texts):
                    if same(text) not in map(same, found):
                        found.append(text)
        kept = [text for text in negatives if same(text) not in map(same, positives)]
        merged.append(PairRecord(record.query, tuple(positives), tuple(kept)))
    return merged


def test_pairs_with_the_same_query_become_one(tmp_path: Path) -> None:
    choose = random.Random(0)

    def text() -> str:
        return " ".join(choose.choices(WORDS, k=2))

    records = [
        PairRecord(text(), tuple({text() for _ in range(2)}), tuple({text() for _ in range(2)}))
        for _ in range(120)
    ]
    found, repeats = run(list(records), tmp_path)
    assert found == plain_merge(records)
    assert repeats.merged > 20


def test_scores_of_merged_records_stay_if_all_have_them(tmp_path: Path) -> None:
    first = PairRecord("q", ("a",), ("n", "b"), (0.9,), (0.1, 0.2))
    second = PairRecord("Q", ("b",), ("n",), (0.8,), (0.3,))
    assert run([first, second], tmp_path)[0] == [
        PairRecord("q", ("a", "b"), ("n",), (0.9, 0.8), (0.1,))
    ]
    third = PairRecord("q", ("c",))
    assert run([first, third], tmp_path)[0] == [PairRecord("q", ("a", "c"), ("n", "b"))]


def test_equal_records_and_merged_ones_are_told_apart(tmp_path: Path) -> None:
    records: list[Record] = [
        PairRecord("q", ("a",)),
        PairRecord("other", ("a",)),
        PairRecord("Q ", ("A",)),
        PairRecord("q", ("b",)),
    ]
    found, repeats = run(records, tmp_path)
    assert found == [PairRecord("q", ("a", "b")), records[1]]
    assert (repeats.equal, repeats.merged) == (1, 1)


def test_sts_pairs_are_equal_in_either_order(tmp_path: Path) -> None:
    records: list[Record] = [
        StsRecord("one", "two", 4.0),
        StsRecord("Two", "one", 3.0),
        StsRecord("one", "three", 1.0),
    ]
    assert run(records, tmp_path)[0] == [records[0], records[2]]


def test_a_text_may_have_several_labels(tmp_path: Path) -> None:
    records: list[Record] = [
        LabelRecord("a text", "x"),
        LabelRecord("a  Text", "x"),
        LabelRecord("a text", "y"),
        LabelRecord("a", "text x"),
    ]
    assert run(records, tmp_path)[0] == [records[0], *records[2:]]


def test_instructions_stay_and_a_query_with_another_one_is_another_query(tmp_path: Path) -> None:
    records: list[Record] = [
        PairRecord("q", ("a",), instruction="one"),
        PairRecord("q", ("b",)),
        PairRecord("Q", ("c",), instruction="one"),
    ]
    kept, _ = run(records, tmp_path)
    expected = [PairRecord("q", ("a", "c"), instruction="one"), PairRecord("q", ("b",))]
    assert kept == expected
    write_shards(
        tmp_path, [Converted(record, "") for record in kept], "retrieval", rows_per_shard=9
    )
    assert [row.record for row in read_shards(tmp_path, "retrieval")] == expected
