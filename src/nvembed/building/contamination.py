"""Contamination: training texts that an evaluation asks about; and near-duplicates in a stream.

``exact`` is equal but for case and white space, ``near`` and ``bm25`` are similarities at or above
a threshold. Their indexes hold of every text only so many of its rarest parts that no text can
reach the threshold without one of them (prefix filter; Bayardo et al., Scaling Up All Pairs
Similarity Search, 2007), so that no rule misses one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import UserError
from nvembed.data.bm25 import BM25
from nvembed.data.records import PairRecord, Record, StsRecord
from nvembed.data.similarity import jaccard, shingles, word_list
from nvembed.evaluation.task_files import (
    ClassificationData,
    LabelledTexts,
    PairData,
    RerankingData,
    RetrievalData,
)
from nvembed.evaluation.tasks import LocalTask
from nvembed.mining.corpus import MemoryCorpus

_ROUNDING = 1e-9
_SEED = 1
_MISSED = 0.02


class ShingleIndex:
    """Texts by the Jaccard similarity in (0, 1] of their shingles of ``shingle_words`` words."""

    def __init__(self, texts: Sequence[str], threshold: float, shingle_words: int) -> None:
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._shingles = [shingles(text, shingle_words) for text in texts]
        self._rows_with: defaultdict[int, list[int]] = defaultdict(list)
        together = np.concatenate([np.empty(0, np.uint64), *self._shingles])
        different, counts = np.unique(together, return_counts=True)
        self._different = np.append(different, np.uint64(2**64 - 1))  # so that there is a next one
        self._counts = np.append(counts, 0)
        for row, own in enumerate(self._shingles):
            for shingle in self._rarest(own):
                self._rows_with[shingle].append(row)

    def _rarest(self, own: NDArray[np.uint64]) -> list[int]:
        """Return so many shingles that every text that reaches the threshold has one of its own.

        Such a text holds ceil(t * n) of the n shingles. In one order of all shingles the first
        n - ceil(t * n) + 1 of both texts meet; rare ones come first, as few texts share them.
        """
        size = len(own) - math.ceil(self._threshold * len(own) - _ROUNDING) + 1
        at = np.searchsorted(self._different, own)
        counts = np.where(self._different[at] == own, self._counts[at], 0)
        return own[np.argsort(counts, kind="stable")[:size]].tolist()

    def search(self, text: str) -> dict[int, float]:
        """Return the similarity of every row that reaches the threshold."""
        own = shingles(text, self._shingle_words)
        rarest = self._rarest(own)
        candidates = {row for shingle in rarest for row in self._rows_with.get(shingle, ())}
        found = {}
        for row in candidates:
            other = self._shingles[row]
            if min(len(own), len(other)) < self._threshold * max(len(own), len(other)) - _ROUNDING:
                continue
            similarity = jaccard(own, other)
            if similarity >= self._threshold - _ROUNDING:
                found[row] = similarity
        return found


class Bm25Index:
    """Texts by the share of their BM25 score that a query reaches, and the query's own share.

    The score of query q for text d, with every different word of q once, is divided by the most
    that any query scores: from 0 (no word in common) to 1. Any long query reaches 1 for a short d,
    so the lower one counts of this share and of the part that words of d have in q, by weight idf.
    """

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self._threshold = threshold
        searched = BM25(texts, words=word_list)
        self._idf = dict(zip(searched.vocabulary, searched.idf.tolist(), strict=True))
        self._idf_unseen = math.log1p((len(texts) + 0.5) / 0.5)
        self._weights: list[dict[str, float]] = []
        self._rows_with: defaultdict[str, list[int]] = defaultdict(list)
        of_column = list(searched.vocabulary)
        weights, starts = searched.weights, searched.weights.indptr
        for row in range(len(texts)):
            own = slice(starts[row], starts[row + 1])
            shares = weights.data[own] / weights.data[own].sum()
            words = [of_column[column] for column in weights.indices[own].tolist()]
            self._weights.append(dict(zip(words, shares.tolist(), strict=True)))
            # Without one of the heaviest words the rest cannot reach the threshold.
            rest = 1.0
            for word, share in sorted(self._weights[-1].items(), key=lambda one: (-one[1], one[0])):
                if rest < threshold - _ROUNDING:
                    break
                self._rows_with[word].append(row)
                rest -= share

    def search(self, text: str) -> dict[int, float]:
        """Return the share of every row that reaches the threshold."""
        own = {word: self._idf.get(word, self._idf_unseen) for word in word_list(text)}
        whole = sum(own.values())
        found = {}
        for row in {row for word in own for row in self._rows_with.get(word, ())}:
            weights = self._weights[row]
            shared = sorted(own.keys() & weights.keys())
            of_text = sum(weights[word] for word in shared)
            if of_text < self._threshold - _ROUNDING:
                continue
            share = min(1.0, of_text, sum(own[word] for word in shared) / whole)
            if share >= self._threshold - _ROUNDING:
                found[row] = share
        return found


class NearDuplicates:
    """The texts of a stream so far, as hashes: about 2 kB each at the defaults, 8 bytes per word.

    MinHash LSH (``rensa``) proposes candidates, and the Jaccard similarity of the shingle sets
    decides. A duplicate exactly at the threshold is missed with a chance of 2 % at most, one of
    similarity 1 never. The same texts in the same order give the same answers in every process.
    """

    def __init__(
        self, threshold: float = 0.8, *, shingle_words: int = 3, num_hashes: int = 64
    ) -> None:
        try:
            import rensa
        except ImportError as error:
            raise UserError(
                "near-duplicates need the package rensa", hint="pip install 'nvembed[data]'"
            ) from error
        bands, rows = lsh_shape(threshold, num_hashes)
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._num_hashes = bands * rows
        self._new_minhash = rensa.RMinHash
        self._index = rensa.RMinHashLSH(threshold, self._num_hashes, bands)
        self._shingles: dict[int, NDArray[np.uint64]] = {}

    def find_or_add(self, key: int, text: str) -> list[int]:
        """Return the keys of the near-duplicates of a text, ascending; if none, take it in."""
        own = shingles(text, self._shingle_words)
        minhash = self._new_minhash(self._num_hashes, _SEED)
        # The same bytes on machines of either byte order.
        data = own.astype("<u8", copy=False).tobytes()
        minhash.update([data[at : at + 8] for at in range(0, len(data), 8)])
        least = self._threshold - _ROUNDING
        candidates = self._index.query(minhash)
        found = sorted(key for key in candidates if jaccard(own, self._shingles[key]) >= least)
        if not found:
            self._index.insert(key, minhash)
            self._shingles[key] = own
        return found


def lsh_shape(threshold: float, num_hashes: int) -> tuple[int, int]:
    """Choose the number of bands b and of hashes per band r, with ``b * r <= num_hashes``.

    Two texts of similarity s meet with the chance 1 - (1 - s^r)^b: the longest bands that miss 2 %
    at the threshold at most.
    """
    rows = 1
    while rows < num_hashes:
        bands = num_hashes // (rows + 1)
        if (1 - threshold ** (rows + 1)) ** bands > _MISSED:
            break
        rows += 1
    return num_hashes // rows, rows


Rule = Literal["exact", "near", "bm25"]


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text, or two that are a pair in either order, of the test part of a task."""

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


def evaluation_texts(tasks: Sequence[LocalTask]) -> Iterator[EvaluationText]:
    """List what must not be trained on of the test parts of tasks, in the order of their files.

    Documents of retrieval and reranking are shared by design and not listed, nor are single
    sentences of pairs: they are captions and headlines that many sets share.
    """
    for task in tasks:
        data = task.data
        if isinstance(data, PairData):
            for pair in zip(data.first, data.second, strict=True):
                yield EvaluationText(pair, task.name, "pair")
            continue
        parts: dict[str, Sequence[str]]
        if isinstance(data, RetrievalData | RerankingData):
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
