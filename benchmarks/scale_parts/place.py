"""The folder of a corpus: how it is made and used, what lies in it, and the names of the parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# In their order.
PARTS = ("make", "encode", "queries", "processes", "ray", "index", "search", "mine")
PARTS += ("kill_encode", "kill_index")
OF_MODELS = ("processes", "ray", "kill_encode")  # nothing of hashed vectors


@dataclass(frozen=True)
class Place:
    """The folder of a corpus, and how it is made and used."""

    folder: Path
    documents: int
    texts: tuple[str, ...]
    model: str
    vectors: Literal["model", "hash"] = "model"
    dtype: str = "auto"
    queries: int = 200
    mine_queries: int = 1024
    kill_documents: int = 20 * 1024
    processes: int = 2
    ray: int = 0
    seed: int = 0
    window: int | None = None  # texts of one call of the model, where it is not the package's own

    def at(self, name: str) -> Path:
        return self.folder / name


DOCUMENTS, QUERIES, PAIRS = "docs.jsonl", "queries.jsonl", "pairs.jsonl"
VECTORS, QUERY_VECTORS, DATABASE = "vectors.npy", "queries.npy", "db"
SOME, AGAIN, KILLED = "some.jsonl", "again.npy", "killed.db"  # deleted when they were compared
