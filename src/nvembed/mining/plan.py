"""What is mined for: records as cases, and how what is found goes back into the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from nvembed.core.text_files import read_jsonl
from nvembed.data.convert import POSITIVE_SCORE
from nvembed.data.record_shards import record_of
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.mining.pool import text_key
from nvembed.mining.run import Mined
from nvembed.mining.selection import Case


@dataclass(frozen=True)
class Plan:
    """Records as cases.

    Args:
        cases: what is mined for.
        further: cases that nothing is mined for, of the same set.
        texts: of the pool, beside those of the cases.
        symmetric: the instruction goes to documents too.
        finish: puts the negatives of the cases into the records.
    """

    cases: list[Case]
    further: Iterable[Case]
    texts: Sequence[str]
    symmetric: bool
    finish: Callable[[Iterator[Mined]], Iterator[Any]]


def plan_records(records: Sequence[Record], further: Iterable[PairRecord] = ()) -> Plan:
    """Plan for the records of a set, which are of one kind; see the two below."""
    pairs = [record for record in records if isinstance(record, PairRecord)]
    return plan_pairs(pairs, further) if pairs else plan_sts(cast(Sequence[StsRecord], records))


def pairs_of(path: Path | None) -> Iterator[PairRecord]:
    """Read pair records one at a time, as ``building`` wrote them."""
    for _, row in read_jsonl(path) if path is not None else ():
        yield cast(PairRecord, record_of(row, "retrieval"))


def plan_pairs(records: Sequence[PairRecord], further: Iterable[PairRecord]) -> Plan:
    """One case per record, whose query asks.

    Args:
        records: queries with what answers them.
        further: records of the same set that nothing is mined for.
    """

    def finish(mined: Iterator[Mined]) -> Iterator[PairRecord]:
        for record, found in zip(records, mined, strict=True):
            yield replace(
                record,
                negatives=found.negatives,
                positive_scores=found.positive_scores,
                negative_scores=found.negative_scores,
            )

    def case(record: PairRecord) -> Case:
        sides = ((record.query, record.positives),)
        return Case(sides, given=record.negatives, instruction=record.instruction)

    return Plan(list(map(case, records)), map(case, further), (), symmetric=False, finish=finish)


def plan_sts(records: Sequence[StsRecord]) -> Plan:
    """One case per pair of like sentences, each of which asks for negatives of both."""

    def is_mined(record: StsRecord) -> bool:
        different = text_key(record.sentence1) != text_key(record.sentence2)
        return record.score >= POSITIVE_SCORE and different

    def finish(mined: Iterator[Mined]) -> Iterator[StsRecord]:
        for record in records:
            yield replace(record, negatives=next(mined).negatives) if is_mined(record) else record
        # The last one asked for is not the end of the generator, which counts on being ended.
        assert next(mined, None) is None

    cases = []
    for record in filter(is_mined, records):
        first, second = record.sentence1, record.sentence2
        sides = ((first, (second,)), (second, (first,)))
        cases.append(Case(sides=sides, given=record.negatives))
    sentences = [text for record in records for text in (record.sentence1, record.sentence2)]
    return Plan(cases, (), sentences, symmetric=True, finish=finish)
