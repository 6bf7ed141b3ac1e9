"""Contamination: training texts that an evaluation asks about.

In: evaluation texts (of local task folders: ``evaluation_texts.py``) and training records; out: for
a record that must go, which evaluation text it holds, by which rule, with which score.

    exact   equal but for case and white space
    near    Jaccard similarity of the shingle sets at or above a threshold
    bm25    BM25 score at or above a share of what the evaluation text scores for itself

All rules are exact: an inverted index of the rarest parts of the evaluation texts proposes
candidates without missing any (prefix filter), and the score itself decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.mining.pool import text_key

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
        near: Jaccard similarity of shingle sets from which two texts count as the same; None for
            off.
        bm25: share in (0, 1] of the score of an evaluation text for itself; None for off. The paper
            filters Emotion and AmazonCounterfactual so, against their own test sets, without
            giving its number.
        shingle_words: words in a shingle.
    """

    def __init__(
        self,
        texts: Iterable[EvaluationText],
        *,
        near: float | None = None,
        bm25: float | None = None,
        shingle_words: int = 3,
    ) -> None:
        self._singles: dict[str, EvaluationText] = {}
        self._pairs: dict[tuple[str, str], EvaluationText] = {}
        for item in texts:
            if len(item.texts) == 1:
                self._singles.setdefault(text_key(item.texts[0]), item)
            else:
                self._pairs.setdefault(_pair_key(*item.texts), item)

    def __len__(self) -> int:
        return len(self._singles) + len(self._pairs)

    def check(self, text: str) -> Match | None:
        """Compare a text with the single evaluation texts."""
        found = self._singles.get(text_key(text))
        return Match("exact", 1.0, found, (text,)) if found else None

    def check_pair(self, first: str, second: str) -> Match | None:
        """Compare two texts with the pairs, in either order."""
        found = self._pairs.get(_pair_key(first, second))
        return Match("exact", 1.0, found, (first, second)) if found else None

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


def _pair_key(first: str, second: str) -> tuple[str, str]:
    one, other = sorted((text_key(first), text_key(second)))
    return one, other
