"""What a data set holds, in numbers and samples: ``nvembed data inspect``.

Memory holds a few numbers per record and no texts but the samples.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nvembed.building.build import BuildableRecipe, default_folder
from nvembed.building.row_filters import Digests, identity
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.reporting import ProblemCounts, progress
from nvembed.data.built_sets import MANIFEST, read_manifest
from nvembed.data.convert import POSITIVE_SCORE
from nvembed.data.record_shards import read_shards
from nvembed.data.records import Kind, LabelRecord, PairRecord, Record, StsRecord
from nvembed.data.sources import BadRow, Converted, DatasetConfig, open_dataset

if TYPE_CHECKING:
    from rich.console import Console

_PROBLEMS_SHOWN = 5
_CLASSES_SHOWN = 5
_SHOWN_CHARACTERS = 160
_BATCH = 256  # texts that are tokenised at once

# Numbers of tokens of texts, without special ones.
CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution: how many values, and where they lie. Percentiles are values that occur."""

    count: int
    mean: float
    min: int
    median: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a set holds.

    Args:
        name: name of the set.
        kind: kind of its records.
        records: number of records.
        bad: number of rows that are no records.
        problems: the first kinds of those.
        repeated: records equal to an earlier one (pairs: with the query of an earlier one).
        characters: length of the texts of each side.
        tokens: the same in tokens; None without a tokenizer.
        per_record: number of positives and negatives of a record.
        without_negatives: records that have none; None for kinds that have no use for them.
        classes: number of classes; None where there are none, as for the next two.
        largest: the largest classes, name and size.
        smallest: the smallest ones.
        trained_on: STS pairs scored 4 or more; None for other kinds.
        samples: some records, as they would be written.
    """

    name: str
    kind: Kind
    records: int
    bad: int
    problems: tuple[str, ...]
    repeated: int
    characters: dict[str, Spread]
    tokens: dict[str, Spread] | None
    per_record: dict[str, Spread]
    without_negatives: int | None
    classes: int | None
    largest: tuple[tuple[str, int], ...] | None
    smallest: tuple[tuple[str, int], ...] | None
    trained_on: int | None
    samples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain data."""
        return asdict(self)


class OpenSet(NamedTuple):
    """A set to be read once; the rows raise ``SourceError`` where the source cannot be opened."""

    name: str
    kind: Kind
    rows: Iterable[Converted | BadRow]


def open_sets(
    path: Path, given: DatasetConfig | None, read_recipe: Callable[[Path], BuildableRecipe]
) -> Iterator[OpenSet]:
    """Find the sets at a path.

    Args:
        path: a recipe, whose sets are taken as built where they are, else from their sources; the
            folder of a built set, or of several; or a file of records.
        given: how to read a file; None where its kind was not said.
        read_recipe: reads a recipe; called for one alone.

    Raises:
        DataError: there is nothing of that sort, or a source cannot be opened.
        ConfigError: a file whose kind was not said.
    """
    if path.suffix in (".yaml", ".yml"):
        config = read_recipe(path)
        built = path.parent / (config.build.folder if config.build else default_folder(path))
        for dataset in config.datasets:
            folder, kind = built / dataset.name, dataset.kind
            manifest = read_manifest(folder)
            if manifest is not None and manifest["kind"] == kind:
                yield OpenSet(f"{dataset.name} (built)", kind, read_shards(folder, kind))
            else:
                yield OpenSet(dataset.name, kind, _when_asked(dataset, path.parent))
    elif path.is_dir():
        folders = sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
        if (path / MANIFEST).is_file():
            folders = [path]
        if not folders:
            raise DataError("no built data set here", where=str(path), expected=f"a {MANIFEST}")
        for folder in folders:
            manifest = read_manifest(folder)
            if manifest is None:
                raise DataError("the set is not whole", where=str(folder), hint="Build it again")
            yield OpenSet(manifest["name"], manifest["kind"], read_shards(folder, manifest["kind"]))
    elif given is None:
        raise ConfigError(
            "the kind of the records is missing",
            where="--kind",
            expected="retrieval, nli, sts, classification or clustering",
        )
    else:
        yield OpenSet(given.name, given.kind, open_dataset(given, base_dir=Path()).rows)


def _when_asked(dataset: DatasetConfig, base_dir: Path) -> Iterator[Converted | BadRow]:
    """Open a source when its first row is asked for, so that others can be read without it."""
    yield from open_dataset(dataset, base_dir=base_dir).rows


def load_token_counter(folder: Path) -> CountTokens:
    """Count with the tokenizer of a model folder.

    Raises:
        ConfigError: there is none in it.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            "no tokenizer here", where=str(folder), expected="a model folder with tokenizer.json"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [
        len(found) for found in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


def inspect(
    name: str,
    kind: Kind,
    rows: Iterable[Converted | BadRow],
    *,
    num_samples: int,
    count_tokens: CountTokens | None = None,
) -> Inspection:
    """Look at all records of a set.

    Args:
        name: name of the set.
        kind: kind of its records.
        rows: records and bad rows.
        num_samples: how many records to keep, drawn evenly with a fixed seed.
        count_tokens: None for lengths in characters alone.
    """
    tally = _Tally(num_samples, count_tokens)
    with progress(None, f"inspect {name}") as bar:
        for row in rows:
            if isinstance(row, BadRow):
                tally.problems.add(row.place, row.problem)
            else:
                tally.add(row.record)
            bar.advance()
    return tally.result(name, kind)


class _Numbers(defaultdict[str, "array[int]"]):
    """Lists of numbers by name."""

    def __missing__(self, name: str) -> array[int]:
        self[name] = array("q")
        return self[name]

    def spreads(self) -> dict[str, Spread]:
        return {name: _spread(numbers) for name, numbers in self.items()}


def _spread(numbers: Sequence[int]) -> Spread:
    found = np.asarray(numbers, dtype=np.int64)
    percentiles = np.percentile(found, [0, 50, 90, 99, 100], method="inverted_cdf")
    return Spread(len(found), float(found.mean()), *percentiles.tolist())


class _Tally:
    """Numbers so far."""

    def __init__(self, num_samples: int, count_tokens: CountTokens | None) -> None:
        self.problems = ProblemCounts()
        self._num_samples = num_samples
        self._count_tokens = count_tokens
        self._choose = random.Random(0)
        self._samples: list[tuple[int, Record]] = []
        self._records = self._trained_on = self._without_negatives = 0
        self._digests = Digests()
        self._characters, self._tokens, self._per_record = _Numbers(), _Numbers(), _Numbers()
        self._classes: Counter[str] = Counter()
        self._waiting: list[tuple[str, str]] = []  # side and text, to be tokenised

    def add(self, record: Record) -> None:
        self._records += 1
        # Each record so far is kept with the same chance.
        if len(self._samples) < self._num_samples:
            self._samples.append((self._records, record))
        elif (place := self._choose.randrange(self._records)) < self._num_samples:
            self._samples[place] = (self._records, record)
        self._digests.add(*identity(record))
        for side, text in _sides(record):
            self._characters[side].append(len(text))
            self._waiting.append((side, text))
        if len(self._waiting) >= _BATCH:
            self._tokenise()
        if isinstance(record, LabelRecord):
            self._classes[record.label] += 1
            return
        self._per_record["negatives"].append(len(record.negatives))
        self._without_negatives += not record.negatives
        if isinstance(record, PairRecord):
            self._per_record["positives"].append(len(record.positives))
        else:
            self._trained_on += record.score >= POSITIVE_SCORE

    def _tokenise(self) -> None:
        if self._count_tokens is not None and self._waiting:
            counts = self._count_tokens([text for _, text in self._waiting])
            for (side, _), count in zip(self._waiting, counts, strict=True):
                self._tokens[side].append(count)
        self._waiting = []

    def result(self, name: str, kind: Kind) -> Inspection:
        self._tokenise()
        has_classes = kind in ("classification", "clustering")
        ordered = sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))
        firsts = self._digests.first_rows()
        samples = sorted(self._samples, key=lambda sample: sample[0])
        return Inspection(
            name=name,
            kind=kind,
            records=self._records,
            bad=self.problems.count,
            problems=tuple(map(str, self.problems.kinds[:_PROBLEMS_SHOWN])),
            repeated=int((firsts != np.arange(len(firsts))).sum()),
            characters=self._characters.spreads(),
            tokens=None if self._count_tokens is None else self._tokens.spreads(),
            per_record=self._per_record.spreads(),
            without_negatives=None if has_classes else self._without_negatives,
            classes=len(ordered) if has_classes else None,
            largest=tuple(ordered[:_CLASSES_SHOWN]) if has_classes else None,
            smallest=tuple(ordered[: -_CLASSES_SHOWN - 1 : -1]) if has_classes else None,
            trained_on=self._trained_on if kind == "sts" else None,
            samples=tuple(record.to_json() for _, record in samples),
        )


def _sides(record: Record) -> list[tuple[str, str]]:
    if isinstance(record, LabelRecord):
        return [("text", record.text)]
    if isinstance(record, StsRecord):
        sides = [("sentence", record.sentence1), ("sentence", record.sentence2)]
    else:
        sides = [("query", record.query), *(("positive", text) for text in record.positives)]
    return [*sides, *(("negative", text) for text in record.negatives)]


# --- For reading ----------------------------------------------------------------------------------


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the numbers of a set, a table of lengths and its samples."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    parts = [f"{found.records:,} records", f"{found.repeated:,} repeated"]
    if found.bad:
        parts.append(f"{found.bad:,} bad rows")
    if found.without_negatives is not None:
        parts.append(f"{found.without_negatives:,} without negatives")
    if found.trained_on is not None:
        parts.append(f"{found.trained_on:,} scored 4 or more")
    if found.classes is not None and found.largest and found.smallest:
        (most, largest), (least, smallest) = found.largest[0], found.smallest[0]
        parts.append(
            f"{found.classes:,} classes from {smallest:,} ({escape(least)}) "
            f"to {largest:,} ({escape(most)})"
        )
    console.print(f"[bold]{escape(found.name)}[/bold] ({found.kind}): {', '.join(parts)}")
    for problem in found.problems:
        console.print(f"  bad row {escape(problem)}", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("texts", "mean", "min", "median", "90 %", "99 %", "max"):
        table.add_column(name, justify="right")
    for side, spread in found.characters.items():
        table.add_row(f"{side}, characters", *_cells(spread))
        if found.tokens is not None:
            table.add_row(f"{side}, tokens", *_cells(found.tokens[side]))
    for side, spread in found.per_record.items():
        table.add_row(f"{side} of a record", *_cells(spread))
    console.print(table)
    for sample in found.samples:
        for key, value in sample.items():
            console.print(f"  {key}: {_short(value)}", markup=False, highlight=False)
        console.print()


def _cells(spread: Spread) -> list[str]:
    numbers = (spread.min, spread.median, spread.p90, spread.p99, spread.max)
    return [f"{spread.count:,}", f"{spread.mean:,.1f}", *(f"{number:,}" for number in numbers)]


def _short(value: object) -> str:
    if isinstance(value, list):
        shown = " | ".join(_short(item) for item in value[:2])
        return shown + (f" | … {len(value)} in all" if len(value) > 2 else "")
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
