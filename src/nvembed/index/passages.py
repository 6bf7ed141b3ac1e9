"""Passages of a document: what a database keeps of each, and what the model reads."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nvembed.core.errors import ModelError
from nvembed.data.reading import Document
from nvembed.index.cutting import HEADINGS, cut_passages, token_ends
from nvembed.index.database import PASSAGE_ID, text_hash
from nvembed.model.settings import LongTexts, Work

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PASSAGE_TOKENS = 256  # at most, of a new database; benchmarks/passages.py
# Fields that passages have beside those of a row; all have "start".
PLACE_FIELDS = ("file", "document", "heading", "start", "end", "line", "page")


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A document that was cut, and where its passages begin and end."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Passage(Document):
    """A part of a document, with the id ``document#hash``."""

    read: str = ""  # what the model reads of it alone: with its headings
    key: str = ""  # of all that its vector is made of
    fields: Mapping[str, Any] = field(default_factory=dict)  # of PLACE_FIELDS
    whole: Whole = field(default_factory=lambda: Whole(""))
    number: int = 0  # in the whole
    path: tuple[str, ...] = ()  # headings above it
    body: str = ""  # its text without those that it begins with


def is_passage_id(id: str) -> bool:
    """Whether an id has the form of those of passages."""
    return re.fullmatch(PASSAGE_ID, id) is not None


def id_in_file(id: str, file: str) -> str:
    """Another id of a passage, whose own is that of an equal passage of another file."""
    digest = hashlib.blake2b(f"{file}\0{id}".encode(), digest_size=6).hexdigest()
    return f"{id.rpartition('#')[0]}#{digest}"


def key_of(document: Document) -> str:
    """Name what the vector of a document is made of."""
    return document.key if isinstance(document, Passage) else text_hash(document.text)


def place_of(id: str, fields: Mapping[str, Any]) -> str | None:
    """Where a passage stands in its document, and under which headings; None of other rows."""
    if "start" not in fields or not is_passage_id(id):
        return None
    place = f"characters {fields['start']}–{fields['end']}"
    for name in ("line", "page"):
        place = f"{name} {fields[name]}" if name in fields else place
    return f"{place} · {fields['heading']}" if "heading" in fields else place


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts texts into passages of ``tokens``, counted by a tokenizer (None: by words).

    A passage is read under its headings, unless ``late``: the model has read the whole then.
    """

    tokens: int
    tokenizer: Tokenizer | None
    late: bool = False

    def cut(self, document: Document, ending: str) -> list[Passage]:
        """Cut a document of an id; ``ending`` says the structure of its text."""
        whole, times = Whole(document.text), Counter[str]()
        of_whole = text_hash(whole.text)
        ends, found = token_ends(self.tokenizer, whole.text), []
        for start, end, path, body in cut_passages(whole.text, ending, ends, self._room):
            text, headings = whole.text[start:end], HEADINGS.join(path)
            digest = hashlib.blake2b(f"{headings}\0{text}".encode(), digest_size=6).hexdigest()
            times[digest] += 1
            again = f"-{times[digest]}" if times[digest] > 1 else ""
            fields = {"heading": headings} if headings else {}
            read = f"{headings}\n{text}" if headings and not self.late else text
            passage = Passage(
                f"{document.id}#{digest}{again}",
                text,
                document.metadata,
                document.place,
                document.table,
                read,
                text_hash(f"{of_whole} {start} {end}" if self.late else read),
                {**fields, "start": start, "end": end},
                whole,
                len(whole.spans),
                path,
                whole.text[body:end],
            )
            whole.spans.append((start, end))
            found.append(passage)
        return found

    def _room(self, path: tuple[str, ...]) -> int:
        if self.late or not path:
            return self.tokens
        headings = len(token_ends(self.tokenizer, HEADINGS.join(path) + "\n"))
        return max(self.tokens - headings, self.tokens // 2, 1)


def late_vectors(encoder: Any, missing: Mapping[str, Document]) -> dict[str, NDArray[np.float32]]:
    """Vectors ``(D,)`` of passages by their keys: pooled from the states of whole documents."""
    parts: dict[Whole, dict[int, str]] = {}  # keys by number, of each document
    for key, passage in missing.items():
        if isinstance(passage, Passage):
            parts.setdefault(passage.whole, {})[passage.number] = key
    found: dict[str, NDArray[np.float32]] = {}
    for whole, keys in parts.items():
        cuts, late = [[start for start, _ in whole.spans]], LongTexts("late")
        work: Work = encoder.prepare([whole.text], side="document", long=late, cuts=cuts)
        vectors = work.launch()()
        if len(vectors) != len(whole.spans) or not np.isfinite(vectors).all():
            raise ModelError(f"no vector for each passage of {whole.text[:60]!r}")
        found |= {key: vectors[number] for number, key in keys.items()}
    return found
