"""The demo's example searches: all held-out documents, found by words and by models.

Enters: the documents with their summaries (the evaluation leaves those out, as its queries are made
of them) and the models. Leaves: for every question the names that each way finds, side by side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvembed.core.files import read_jsonl
from nvembed.data.bm25 import BM25
from nvembed.model.bulk import encode_texts, encode_window
from nvembed.model.encoder import Encoder
from pydocs.dataset import RETRIEVAL_INSTRUCTION
from pydocs.docstrings import truncate

SHOWN = 3

# Answered by modules that are held out on every machine. None is a sentence of their documentation.
EXAMPLE_QUERIES = (
    "turn a picture by some degrees",
    "read data from a JSON file",
    "how many false positives did my classifier make?",
    "cheapest route between two nodes when edges have costs",
    "keep low frequencies of a signal",
)

Found = list[list[str]]
"""For each question the names of what was found, best first."""


class Documents:
    """The texts that the examples search, with their names; a model may read them cut."""

    def __init__(self, file: Path, max_chars: int | None = None) -> None:
        rows = [row for _, row in read_jsonl(file)]
        self.names = [str(row["_id"]) for row in rows]
        self.texts = [str(row["text"]) for row in rows]
        self.read = [truncate(t, max_chars) for t in self.texts] if max_chars else self.texts

    def by_words(self, queries: Sequence[str], k: int = SHOWN) -> Found:
        """What BM25 finds."""
        _, places = BM25(self.texts).top_k(queries, k)
        return [[self.names[place] for place in row] for row in places.tolist()]

    def seconds(self, encoder: Encoder, sample: int = 64) -> float:
        """How long it takes to embed the documents, from a few of them."""
        few = self.read[:: max(1, len(self.read) // sample)]
        started = time.perf_counter()
        encode_window(encoder, few, side="document")
        return (time.perf_counter() - started) * len(self.read) / len(few)

    def by_model(self, encoder: Encoder, queries: Sequence[str], k: int = SHOWN) -> Found:
        """What is nearest to the questions, the instruction of the training data before them."""
        task = RETRIEVAL_INSTRUCTION
        query_vectors = encode_window(encoder, list(queries), side="query", task=task)
        scores = query_vectors @ encode_texts(encoder, self.read, side="document").T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [[self.names[place] for place in row] for row in order.tolist()]


def show_searches(console: Console, queries: Sequence[str], found: Mapping[str, Found]) -> None:
    """Print a table for each question: a column for each way to search, a row for each rank.

    Names that are too long lose their beginning, which says least.
    """
    width = (min(console.width, 110) - 4) // max(1, len(found)) - 3
    for place, query in enumerate(queries):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
        for name in found:
            table.add_column(name, style="cyan", header_style="dim", width=width, no_wrap=True)
        for names in zip(*(by_query[place] for by_query in found.values()), strict=True):
            table.add_row(*(escape(shortened(name, width)) for name in names))
        console.print(f"\n[bold]{escape(query)}[/bold]", highlight=False)
        console.print(table, highlight=False)


def shortened(name: str, width: int) -> str:
    """The end of a name that is longer than ``width``."""
    return name if len(name) <= width else f"…{name[1 - width :]}"
