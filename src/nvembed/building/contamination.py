"""Contamination: training texts that an evaluation asks about.

In: evaluation texts (of local task folders: ``evaluation_texts.py``) and training records; out: for
a record that must go, which evaluation text it holds, by which rule, with which score.

    exact   equal but for case and white space
    near    Jaccard similarity of the shingle sets at or above a threshold
    bm25    BM25 score, as shares of what the texts score for themselves, at or above a threshold

No rule misses a text that reaches its threshold (``similar_texts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nvembed.building.similar_texts import Bm25Index, ShingleIndex, SimilarTexts
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.mining.corpus import MemoryCorpus

Rule = Literal["exact", "near", "bm25"]


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text, or two that are evaluated as a pair, of the test part of a task.

    Args:
        texts: one text, or the two of a pair in either order.
        task: name of the task.
        part: which texts of the task, such as ``query`` or ``pair``.
    """

    texts: tuple[str] | tuple[str, str]
    task: str
    part: str = "text"


@dataclass(frozen=True, slots=True)
class Match:
    """Why a record must go.

    Args:
        rule: the rule that found it, the first of them in the order of ``Rule``.
        score: 1 for exact, else what reached the threshold, in (0, 1]; of a pair the lower one.
        found: the evaluation text.
        texts: the text or pair of the record that matched, in its own spelling.
    """

    rule: Rule
    score: float
    found: EvaluationText
    texts: tuple[str] | tuple[str, str]


class Contamination:
    """Finds evaluation texts among training records.

    Args:
        texts: what must not be trained on. Where several are equal the first one is reported.
        near: Jaccard similarity of shingle sets in (0, 1] from which two texts count as the same;
            None for off.
        bm25: lower share of two texts in each other by BM25, in (0, 1] (``similar_texts.py``); None
            for off. The paper filters Emotion and AmazonCounterfactual
            so, each against its own test set, without giving a number.
        shingle_words: words in a shingle.

    The defaults find a text of a dozen words with one of them changed. They find sentences of one
    form with another name in it as well, which costs a little training data and leaks nothing.
    """

    def __init__(
        self,
        texts: Iterable[EvaluationText],
        *,
        near: float | None = 0.6,
        bm25: float | None = None,
        shingle_words: int = 2,
    ) -> None:
        self._pool = MemoryCorpus()
        self._singles: dict[int, EvaluationText] = {}
        self._pairs: dict[tuple[int, int], EvaluationText] = {}
        for item in texts:
            rows = [self._pool.add(text) for text in item.texts]
            if len(rows) == 1:
                self._singles.setdefault(rows[0], item)
            else:
                self._pairs.setdefault((min(rows), max(rows)), item)
        self._indexes: list[tuple[Rule, SimilarTexts]] = []
        if near is not None:
            self._indexes.append(("near", ShingleIndex(self._pool.texts, near, shingle_words)))
        if bm25 is not None:
            self._indexes.append(("bm25", Bm25Index(self._pool.texts, bm25)))

    def __len__(self) -> int:
        return len(self._singles) + len(self._pairs)

    def check(self, text: str) -> Match | None:
        """Compare a text with the single evaluation texts."""
        row = self._pool.find(text)
        if row is not None and row in self._singles:
            return Match("exact", 1.0, self._singles[row], (text,))
        if not self._singles:
            return None
        for rule, index in self._indexes:
            scores = {
                row: score for row, score in index.search(text).items() if row in self._singles
            }
            if scores:
                best = min(scores, key=lambda row: (-scores[row], row))
                return Match(rule, scores[best], self._singles[best], (text,))
        return None

    def check_pair(self, first: str, second: str) -> Match | None:
        """Compare two texts with the pairs, in either order."""
        if not self._pairs:
            return None
        row, other = self._pool.find(first), self._pool.find(second)
        if row is not None and other is not None:
            found = self._pairs.get((min(row, other), max(row, other)))
            if found:
                return Match("exact", 1.0, found, (first, second))
        for rule, index in self._indexes:
            ones = index.search(first)
            others = ones and index.search(second)
            scores: dict[tuple[int, int], float] = {}
            for row, score in ones.items():
                for other, other_score in others.items():
                    if (pair := (min(row, other), max(row, other))) in self._pairs:
                        # Texts that are similar to both sides reach the pair in both orders.
                        scores[pair] = max(scores.get(pair, 0.0), min(score, other_score))
            if scores:
                best = min(scores, key=lambda pair: (-scores[pair], pair))
                return Match(rule, scores[best], self._pairs[best], (first, second))
        return None

    def check_record(self, record: Record) -> Match | None:
        """Compare what a record brings: its queries with texts, its pairs with pairs.

        Documents alone are not compared: retrieval tasks share their corpus with training data by
        design. A query with its positive, or two sentences of STS, are pairs; a pair that scores
        low is one as well. The texts of STS and classes are queries too.
        """
        if isinstance(record, PairRecord):
            singles: tuple[str, ...] = (record.query,)
            pairs = tuple((record.query, positive) for positive in record.positives)
        elif isinstance(record, StsRecord):
            singles = (record.sentence1, record.sentence2)
            pairs = (singles,)
        else:
            singles, pairs = (record.text,), ()
        for text in singles:
            if match := self.check(text):
                return match
        for first, second in pairs:
            if match := self.check_pair(first, second):
                return match
        return None
