"""Pairs of a folder of documents: a heading asks for the passages below it.

The folder is read and cut as ``nvembed index`` does, tokens counted by words. A query is the title
of the file with the headings below it; of its passages the heading itself is taken off, since it
would answer by its words alone. A text that stands below several headings belongs to none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nvembed.building.own_pairs import INSTRUCTIONS, Ask, OwnPairs, find_dataset, read_pairs
from nvembed.building.row_filters import Repeats, merge
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import is_gzip
from nvembed.data.config import Column, file_dataset
from nvembed.data.instructions import read_task
from nvembed.data.records import PairRecord
from nvembed.data.similarity import text_key
from nvembed.data.sources.beir import is_beir_folder
from nvembed.index.cutting import HEADINGS
from nvembed.index.documents import Reader
from nvembed.index.passages import PASSAGE_TOKENS, Cutter, Passage

FEWEST = 50  # pairs that are worth a training
_LETTERS = 20  # letters and digits that a passage has at least


def read_own(
    path: Path,
    columns: Mapping[str, Column],
    *,
    instruction: str | None = None,
    ask: Ask | None = None,
) -> OwnPairs:
    """Read a user's own data: a file, a folder in BEIR's layout, or a folder of documents.

    Raises:
        UserError: there is no such file or folder, or it does not give records; see
            ``find_dataset``, whose arguments these are.
    """
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), hint="Relative paths start here")
    if not path.is_dir() or is_beir_folder(path):
        return read_pairs(find_dataset(path, columns, instruction=instruction, ask=ask))
    if columns:
        message = "a folder of documents has no columns"
        raise ConfigError(message, where="--column", hint="Leave it out")
    config = file_dataset(path, "retrieval")
    told = read_task(instruction) or INSTRUCTIONS["retrieval"]
    records, sources, notes = _read_folder(path)
    return OwnPairs(config.model_copy(update={"instruction": told}), records, notes, sources)


def _read_folder(
    folder: Path,
) -> tuple[tuple[PairRecord, ...], tuple[frozenset[str], ...], tuple[str, ...]]:
    """The pairs of a folder, the files of each, and what is told of files without any."""
    reader = Reader(Cutter(PASSAGE_TOKENS, None), tables=False)
    found: list[tuple[str, str, str]] = []  # query, passage, file
    files, without = 0, list[str]()
    for group in reader.groups(str(folder)):
        if passages := [one for one in group.documents if isinstance(one, Passage)]:
            files += 1
            pairs = list(_pairs(passages, Path(group.name)))
            found += [(query, text, group.name) for query, text in pairs]
            without += [] if pairs else [group.name]
    asked: dict[str, set[str]] = {}  # queries of a passage
    for query, text, _ in found:
        asked.setdefault(text_key(text), set()).add(text_key(query))
    repeated = {text for text, queries in asked.items() if len(queries) > 1}
    by_query: dict[str, list[tuple[PairRecord, str]]] = {}
    for query, text, file in found:
        if text_key(text) not in repeated:
            by_query.setdefault(text_key(query), []).append((PairRecord(query, (text,)), file))
    notes = []
    if without:
        first = f"the first is {without[0]}"
        notes.append(f"{len(without)} of {files} files gave no pairs: no headings ({first})")
    if repeated:
        notes.append(f"{len(repeated)} passages left out that stand below several headings")
    if reader.left_out.count:
        notes.append(str(reader.left_out))
    if len(by_query) < FEWEST:
        raise DataError(
            f"only {len(by_query)} headings have passages of their own below them"
            + (f" ({'; '.join(notes)})" if notes else ""),
            where=str(folder),
            expected=f"a folder with at least {FEWEST}, or a file of pairs",
            hint="nvembed data synthesize lets a language model write pairs to train on; nvembed "
            "index searches the folder with a model as it is",
        )
    groups = by_query.values()
    records = tuple(merge([record for record, _ in group], Repeats()) for group in groups)
    return records, tuple(frozenset(file for _, file in group) for group in groups), tuple(notes)


def _pairs(passages: Sequence[Passage], file: Path) -> Iterator[tuple[str, str]]:
    """Queries and passages of a file, whose title is its only outermost heading, or its name."""
    outermost = {one.path[0] for one in passages if one.path}
    name = re.sub(r"[-_]+", " ", Path(file.stem).stem if is_gzip(file) else file.stem)
    for one in passages:
        headings = one.path if len(outermost) == 1 or not one.path else (name, *one.path)
        words = [" ".join(heading.split()) for heading in headings]
        query = HEADINGS.join(heading for heading in words if any(map(str.isalnum, heading)))
        text = one.body.strip()
        enough = sum(map(str.isalnum, text)) >= _LETTERS
        if one.path and query and enough and text_key(text) != text_key(query):
            yield query, text
