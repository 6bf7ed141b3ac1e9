"""One run of mining: the corpus searched for every case, block by block, and negatives chosen.

Letters: C cases, S sides of each, N candidates, K results of a query, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, cast

import numpy as np

from nvembed.core.background import prefetch
from nvembed.core.errors import DataError
from nvembed.core.reporting import progress
from nvembed.data.config import MiningConfig
from nvembed.data.examples import POSITIVE_SCORE
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.data.similarity import text_key
from nvembed.mining.corpus import Corpus
from nvembed.mining.ranking import BLOCK_QUERIES, NOTHING, Query, Ranking, Rows, Scores
from nvembed.mining.selection import Case, Mined, MiningReport, Neighbours, Selector

# Records per search. What is chosen from holds a few numbers for each of their candidates.
BLOCK_RECORDS = 2048


class Run:
    """Mining for a plan: ``mined`` gives negatives case by case, then ``report`` the numbers."""

    def __init__(self, plan: Plan, corpus: Corpus, ranking: Ranking, config: MiningConfig) -> None:
        cases = plan.cases
        self._cases, self._corpus, self._ranking, self._config = cases, corpus, ranking, config
        self._query_rows = {query: row for row, query in enumerate(plan.queries)}
        self._positive_rows = [
            [[self._row(text) for text in texts] for _, texts in case.sides] for case in cases
        ]
        self._selector = Selector(config, corpus, _known_positives(plan, corpus), len(cases))

    def mined(self) -> Iterator[Mined]:
        """Choose the negatives of every case; given ones first."""
        size = BLOCK_RECORDS if self._config.rerank is None else BLOCK_QUERIES
        blocks = [self._cases[at : at + size] for at in range(0, len(self._cases), size)]
        # The next block is searched for while this one is chosen from. Reranking writes files, for
        # one thread at a time.
        starts = accumulate(map(len, blocks), initial=0)
        found: Iterator[Neighbours] = map(self._neighbours, blocks, starts)
        found = prefetch(found) if self._config.rerank is None else found
        with progress(len(self._cases), "mine") as bar:
            for block, near in zip(blocks, found, strict=True):
                chosen = self._selector.choose(block, near)
                if self._config.write_scores:
                    chosen = self._with_scores(block, chosen)
                yield from chosen
                bar.advance(len(block))

    def report(self) -> MiningReport:
        """Return the numbers of the cases gone through."""
        return self._selector.report()

    def _neighbours(self, block: Sequence[Case], start: int) -> Neighbours:
        """Search for all cases of a block (C cases of S sides each, from ``start``) in one go."""
        query_CS = np.array(
            [[self._query_rows[q, case.instruction] for q, _ in case.sides] for case in block]
        )
        unique, place_CS = np.unique(query_CS, return_inverse=True)
        scores_BK, rows_BK = self._ranking.nearest(unique)
        place_CS = place_CS.reshape(query_CS.shape)
        if query_CS.shape[1] == 1:
            scores_CN, rows_CN = scores_BK[place_CS[:, 0]], rows_BK[place_CS[:, 0]]
        else:
            scores_CN, rows_CN = self._of_both_sides(query_CS, rows_BK[place_CS])
        return Neighbours(rows_CN, scores_CN, *self._lowest_positives(query_CS, start))

    def _of_both_sides(self, query_CS: Rows, rows_CSK: Rows) -> tuple[Scores, Rows]:
        """Join what was found for either side; a document counts with the higher of its scores."""
        num_cases, num_sides, num_results = rows_CSK.shape
        shape = (num_cases, num_sides * num_results)
        rows_CN = np.full(shape, NOTHING, dtype=np.int64)
        scores_CN = np.full(shape, -np.inf, dtype=np.float32)
        for number, query_S in enumerate(query_CS):
            rows_N = np.unique(rows_CSK[number])
            rows_N = rows_N[rows_N != NOTHING]
            scores_SN = [
                self._ranking.scores(np.full(len(rows_N), query), rows_N) for query in query_S
            ]
            scores_N = np.max(scores_SN, axis=0)
            order_N = np.argsort(-scores_N, kind="stable")
            rows_CN[number, : len(rows_N)] = rows_N[order_N]
            scores_CN[number, : len(rows_N)] = scores_N[order_N]
        return scores_CN, rows_CN

    def _lowest_positives(self, query_CS: Rows, start: int) -> tuple[Rows, Scores]:
        """Find the positive with the lowest score of each case, of equal ones the first row."""
        pairs = [
            (number, query, row)
            for number, query_S in enumerate(query_CS.tolist())
            for query, rows in zip(query_S, self._positive_rows[start + number], strict=True)
            for row in rows
        ]
        case_P, query_P, row_P = np.array(pairs, dtype=np.int64).T
        score_P = self._ranking.scores(query_P, row_P)
        order_P = np.lexsort((row_P, score_P, case_P))
        _, first_C = np.unique(case_P[order_P], return_index=True)
        lowest_C = order_P[first_C]
        return row_P[lowest_C], score_P[lowest_C]

    def _row(self, text: str) -> int:
        row = self._corpus.find(text)
        assert row is not None, "texts of cases are in the corpus"
        return row

    def _with_scores(self, block: Sequence[Case], chosen: Sequence[Mined]) -> list[Mined]:
        """Add the scores for the first side, the only one of a pair record."""
        queries: list[int] = []
        rows: list[int] = []
        splits = [0]
        for case, own in zip(block, chosen, strict=True):
            query, positives = case.sides[0]
            for part in (list(map(self._row, positives)), own.rows):
                queries += [self._query_rows[query, case.instruction]] * len(part)
                rows += part
                splits.append(len(rows))
        scores = self._ranking.scores(np.array(queries), np.array(rows)).tolist()
        parts = [tuple(scores[start:end]) for start, end in pairwise(splits)]
        return [
            replace(own, positive_scores=positive, negative_scores=negative)
            for own, positive, negative in zip(chosen, parts[::2], parts[1::2], strict=True)
        ]


# --- Records as cases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Records as cases."""

    cases: list[Case]
    further: Iterable[Case]  # of the same set, not mined for; their positives are no negatives
    texts: Sequence[str]  # of the corpus, beside those of the cases
    symmetric: bool  # the instruction goes to documents too
    finish: Callable[[Iterator[Mined]], Iterator[Any]]  # puts the negatives into the records

    @cached_property
    def queries(self) -> list[Query]:
        """The different queries, with their instructions; equal ones are looked for once."""
        if not self.cases:
            raise DataError(
                "no records to mine for",
                expected=f"queries with positives, or pairs scored {POSITIVE_SCORE:g} or more",
            )
        queries = ((q, case.instruction) for case in self.cases for q, _ in case.sides)
        return list(dict.fromkeys(queries))

    def corpus_texts(self, documents: Iterable[str]) -> Iterator[str]:
        """The texts that are searched, repeated ones included."""
        for case in self.cases:
            for _, positives in case.sides:
                yield from positives
            yield from case.given
        yield from self.texts
        yield from documents


def plan_records(records: Sequence[Record], further: Iterable[PairRecord] = ()) -> Plan:
    """Plan for the records of a set, which are of one kind; see the two below."""
    pairs = [record for record in records if isinstance(record, PairRecord)]
    return plan_pairs(pairs, further) if pairs else plan_sts(cast(Sequence[StsRecord], records))


def plan_pairs(records: Sequence[PairRecord], further: Iterable[PairRecord]) -> Plan:
    """One case per record, whose query asks."""

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


def _known_positives(plan: Plan, corpus: Corpus) -> dict[str, frozenset[int]]:
    """Collect, for every query, the rows of its positives in all records and its own row.

    Queries that differ in case and white space only are one, and so are those with different
    instructions: what answers a query in one task is too near to be a negative in another.
    """
    keys = {query: text_key(query) for case in plan.cases for query, _ in case.sides}
    by_key = {key: {corpus.find(query)} for query, key in keys.items()}
    for case in chain(plan.cases, plan.further):
        for query, positives in case.sides:
            key = keys.get(query) or text_key(query)
            if key in by_key:
                by_key[key].update(map(corpus.find, positives))
    frozen = {
        key: frozenset(row for row in rows if row is not None) for key, rows in by_key.items()
    }
    return {query: frozen[key] for query, key in keys.items()}
