"""What a data set holds, in numbers and samples: ``nvembed data inspect``.

Memory holds a few numbers per record and no texts but the samples.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nvembed.building.build import BuildableRecipe, default_folder
from nvembed.building.row_filters import Digests, identity
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.reporting import ProblemCounts, progress
from nvembed.data.built_sets import MANIFEST, read_manifest, read_shards
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import POSITIVE_SCORE
from nvembed.data.loading import open_dataset
from nvembed.data.records import (
    BadRow,
    Converted,
    Kind,
    LabelRecord,
    PairRecord,
    Record,
    StsRecord,
    TextRecord,
)

if TYPE_CHECKING:
    from rich.console import Console

_PROBLEMS_SHOWN = 5
_CLASSES_SHOWN = 5
_SHOWN_CHARACTERS = 160
_BATCH = 64  # records whose texts are tokenised at once

# A distribution: count, mean, and percentiles that are values that occur.
Spread = dict[str, float]
# Numbers of tokens of texts, without special ones.
CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass
class Inspection:
    """What a set holds; None stands for what its kind does not have.

    ``repeated`` are records equal to an earlier one (pairs: with the query of an earlier one).
    Lengths are of the texts of each side, in tokens where there is a tokenizer.
    """

    name: str
    kind: Kind
    records: int = 0
    bad: int = 0
    problems: tuple[str, ...] = ()
    repeated: int = 0
    characters: dict[str, Spread] = field(default_factory=dict)
    tokens: dict[str, Spread] | None = None
    per_record: dict[str, Spread] = field(default_factory=dict)
    without_negatives: int | None = None
    classes: int | None = None
    largest: tuple[tuple[str, int], ...] | None = None
    smallest: tuple[tuple[str, int], ...] | None = None
    trained_on: int | None = None
    samples: tuple[dict[str, Any], ...] = ()


class OpenSet(NamedTuple):
    """A set to be read once; the rows raise ``SourceError`` where the source cannot be opened."""

    name: str
    kind: Kind
    rows: Iterable[Converted | BadRow]


def open_sets(
    path: Path, given: DatasetConfig | None, read_recipe: Callable[[Path], BuildableRecipe]
) -> Iterator[OpenSet]:
    """Find the sets at a path.

    It is a recipe, whose sets are taken as built where they are; the folder of a built set, or of
    several; or a file of records, read as ``given`` says.
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
    """Count with the tokenizer of a model folder."""
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
    """Look at all records of a set, and keep some of them, drawn evenly with a fixed seed."""
    found, trained_on = Inspection(name, kind), 0
    problems, digests, classes = ProblemCounts(), Digests(), Counter[str]()
    numbers = [defaultdict[str, "array[int]"](lambda: array("q")) for _ in range(3)]
    characters, tokens, per_record = numbers
    samples: list[tuple[int, Record]] = []
    choose = random.Random(0)
    waiting = iter(rows)
    with progress(None, f"inspect {name}") as bar:
        while batch := list(islice(waiting, _BATCH)):
            sides: list[tuple[str, str]] = []
            for row in batch:
                if isinstance(row, BadRow):
                    problems.add(row.place, row.problem)
                    continue
                record = row.record
                found.records += 1
                if len(samples) < num_samples:  # each of the records so far with the same chance
                    samples.append((found.records, record))
                elif (place := choose.randrange(found.records)) < num_samples:
                    samples[place] = (found.records, record)
                digests.add(*identity(record))
                sides += _sides(record)
                if isinstance(record, LabelRecord):
                    classes[record.label] += 1
                elif isinstance(record, PairRecord | StsRecord):
                    per_record["negatives"].append(len(record.negatives))
                if isinstance(record, PairRecord):
                    per_record["positives"].append(len(record.positives))
                elif isinstance(record, StsRecord):
                    trained_on += record.score >= POSITIVE_SCORE
            counts = count_tokens([text for _, text in sides]) if count_tokens else ()
            for side, text in sides:
                characters[side].append(len(text))
            for (side, _), count in zip(sides, counts, strict=False):
                tokens[side].append(count)
            bar.advance(len(batch))
    found.bad, found.problems = problems.count, tuple(map(str, problems.kinds[:_PROBLEMS_SHOWN]))
    found.repeated = found.records - len(np.unique(digests.first_rows()))
    found.characters, found.per_record = _spreads(characters), _spreads(per_record)
    found.tokens = _spreads(tokens) if count_tokens else None
    if kind in ("classification", "clustering"):
        ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
        found.classes = len(ordered)
        found.largest = tuple(ordered[:_CLASSES_SHOWN])
        found.smallest = tuple(ordered[: -_CLASSES_SHOWN - 1 : -1])
    elif kind != "text":
        found.without_negatives = per_record["negatives"].count(0)
    if kind == "sts":
        found.trained_on = trained_on
    found.samples = tuple(record.to_json() for _, record in sorted(samples, key=itemgetter(0)))
    return found


def _spreads(numbers: dict[str, array[int]]) -> dict[str, Spread]:
    found: dict[str, Spread] = {}
    for side, some in numbers.items():
        low, middle, p90, p99, high = np.percentile(
            some, [0, 50, 90, 99, 100], method="inverted_cdf"
        ).tolist()
        found[side] = {"count": len(some), "mean": float(np.mean(some)), "min": low}
        found[side] |= {"median": middle, "p90": p90, "p99": p99, "max": high}
    return found


def _sides(record: Record) -> list[tuple[str, str]]:
    if isinstance(record, LabelRecord | TextRecord):
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
    return [f"{value:,.1f}" if name == "mean" else f"{value:,}" for name, value in spread.items()]


def _short(value: object) -> str:
    if isinstance(value, list):
        shown = " | ".join(_short(item) for item in value[:2])
        return shown + (f" | … {len(value)} in all" if len(value) > 2 else "")
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
