"""Contamination: training texts that an evaluation asks about, and by which rule they are found.

``exact`` is equal but for case and white space, ``near`` and ``bm25`` are similarities at or above
a threshold; no rule misses a text that reaches it (``similar_texts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from nvembed.building.similar_texts import Bm25Index, ShingleIndex
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
)
from nvembed.evaluation.tasks import LocalTask
from nvembed.mining.corpus import MemoryCorpus

Rule = Literal["exact", "near", "bm25"]


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text, or two that are evaluated as a pair in either order, of the test part of a task."""

    texts: tuple[str, ...]
    task: str
    part: str = "text"  # which texts of the task they are, such as "query" or "pair"


@dataclass(frozen=True, slots=True)
class Match:
    """The first rule that found an evaluation text in texts of a record, and the lower score."""

    rule: Rule
    score: float
    found: EvaluationText
    texts: tuple[str, ...]


class Contamination:
    """Finds evaluation texts among training records.

    ``near`` is the Jaccard similarity of shingle sets from which two texts count as the same, and
    ``bm25`` the lower share of two texts in each other, both in (0, 1]; None is off. The defaults
    find a text of a dozen words with one of them changed, and sentences of one form with another
    name, which costs a little training data and leaks nothing.
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
        # By the rows of their texts in the pool, ascending; of equal items the first counts.
        self._items: dict[tuple[int, ...], EvaluationText] = {}
        for item in texts:
            self._items.setdefault(tuple(sorted(map(self._pool.add, item.texts))), item)
        self._sizes = set(map(len, self._items))
        self._indexes: list[tuple[Rule, ShingleIndex | Bm25Index]] = []
        if near is not None:
            self._indexes.append(("near", ShingleIndex(self._pool.texts, near, shingle_words)))
        if bm25 is not None:
            self._indexes.append(("bm25", Bm25Index(self._pool.texts, bm25)))

    def __len__(self) -> int:
        return len(self._items)

    def check(self, *texts: str) -> Match | None:
        """Compare a text with the single evaluation texts, or two with the pairs."""
        if len(texts) not in self._sizes:
            return None
        rows = [row for text in texts if (row := self._pool.find(text)) is not None]
        if len(rows) == len(texts) and (item := self._items.get(tuple(sorted(rows)))):
            return Match("exact", 1.0, item, texts)
        for rule, index in self._indexes:
            scores: dict[tuple[int, ...], float] = {}
            similar = [index.search(texts[0]).items()]
            if similar[0]:
                similar += [index.search(text).items() for text in texts[1:]]
            for together in product(*similar):
                key = tuple(sorted(row for row, _ in together))
                if len(key) == len(texts) and key in self._items:
                    # Texts that are similar to both sides reach a pair in both orders.
                    score = min(score for _, score in together)
                    scores[key] = max(scores.get(key, 0.0), score)
            if scores:
                best = min(scores, key=lambda key: (-scores[key], key))
                return Match(rule, scores[best], self._items[best], texts)
        return None

    def check_record(self, record: Record) -> Match | None:
        """Compare what a record brings: its queries with texts, its pairs with pairs.

        Documents alone are not compared: retrieval tasks share their corpus with training data by
        design. A pair that scores low is a pair as well. Texts of STS and classes are queries too.
        """
        brought: list[tuple[str, ...]]
        if isinstance(record, PairRecord):
            brought = [(record.query,), *((record.query, text) for text in record.positives)]
        elif isinstance(record, StsRecord):
            both = record.sentence1, record.sentence2
            brought = [both[:1], both[1:], both]
        else:
            brought = [(record.text,)]
        return next((match for texts in brought if (match := self.check(*texts))), None)


def evaluation_texts(
    tasks: Sequence[LocalTask], *, sentences: bool = False
) -> Iterator[EvaluationText]:
    """List what must not be trained on of the test parts of tasks, in the order of their files.

    Documents of retrieval and reranking are shared by design and not listed. With ``sentences``
    those of pairs are listed singly as well, as for STS22, whose texts are rare; those of other STS
    sets are captions and headlines that many sets share.
    """
    for task in tasks:
        data = task.data
        if isinstance(data, PairData):
            pairs = list(zip(data.first, data.second, strict=True))
            for pair in pairs:
                yield EvaluationText(pair, task.name, "pair")
            parts: dict[str, Sequence[str]] = {}
            if sentences:
                parts = {"sentence": [text for pair in pairs for text in pair]}
        elif isinstance(data, RetrievalData | RerankingData):
            parts = {"query": data.queries}
        elif isinstance(data, ClassificationData):
            parts = {"text": data.test.texts}
        elif isinstance(data, LabelledTexts):
            parts = {"text": data.texts}
        else:
            of_articles = zip(data.human, data.machine, strict=True)
            summaries = [text for some in of_articles for texts in some for text in texts]
            parts = {"article": data.articles, "summary": summaries}
        for part, texts in parts.items():
            yield from (EvaluationText((text,), task.name, part) for text in texts)
