"""Built data sets: ``part-00000.parquet`` … with records, and ``manifest.json`` beside them.

The manifest says what a set was built from: settings, counts, checksums. ``refused.jsonl`` and
``contaminated.jsonl`` list what was left out. The same records give the same bytes: no times, no
random names, row groups that end at fixed places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nvembed.core.cache import file_digest
from nvembed.data.config import BuildConfig, BuildMining, DatasetConfig
from nvembed.data.records import COLUMNS, Converted, Kind, record_of, texts_of
from nvembed.data.sources.files import parquet_rows, shard_files

# A sequence of records that can be walked several times.
Rows = Callable[[], Iterator[Converted]]

# A row group ends at whichever comes first, so that gigantic texts do not fill the memory.
GROUP_ROWS = 8192
GROUP_CHARACTERS = 32_000_000

FORMAT = 1
MANIFEST = "manifest.json"
MINED_KINDS = ("retrieval", "nli", "sts")
# Keys of a data set that decide nothing about its records.
_NOT_OF_THE_BUILD = {"name", "weight", "stages", "note"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a set: its name, its rows, its size in bytes and its checksum."""

    file: str
    rows: int
    bytes: int
    sha256: str


def write_shards(
    folder: Path,
    rows: Iterable[Converted],
    kind: Kind,
    *,
    rows_per_shard: int,
    places: bool = False,
) -> list[Shard]:
    """Write records into a folder without shards; ``places``: with where each came from."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    text, number = pyarrow.string(), pyarrow.float64()
    types = dict.fromkeys(("positive", "negative"), pyarrow.list_(text)) | {"score": number}
    types |= dict.fromkeys(("positive_scores", "negative_scores"), pyarrow.list_(number))
    columns = COLUMNS[kind] + (("place",) if places else ())
    schema = pyarrow.schema([(name, types.get(name, text)) for name in columns])
    shards: list[Shard] = []
    rows = iter(rows)
    for first in rows:
        part = chain([first], islice(rows, rows_per_shard - 1))
        path, written = folder / f"part-{len(shards):05d}.parquet", 0
        # Opened here and not by name: an error of the disk then is Python's own.
        with (
            open(path, "wb") as raw,
            ParquetWriter(raw, schema, compression="zstd", write_page_index=False) as file,
        ):
            for group in _groups(part, rows_per_shard, places=places):
                file.write_batch(pyarrow.RecordBatch.from_pylist(group, schema=schema))
                written += len(group)
                del group  # before the next one is filled
        shards.append(Shard(path.name, written, path.stat().st_size, file_digest(path)))
    return shards


def _groups(
    rows: Iterable[Converted], most: int, *, places: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield the row groups of a file; the last one is empty where a group ends early at its end."""
    group: list[dict[str, Any]] = []
    characters = 0
    for number, row in enumerate(rows, start=1):
        group.append(row.record.to_json() | ({"place": row.place} if places else {}))
        characters += sum(map(len, texts_of(row.record)))
        is_full = len(group) == GROUP_ROWS or characters >= GROUP_CHARACTERS
        if is_full and number < most:
            yield group
            group, characters = [], 0
    yield group


def read_shards(folder: Path, kind: Kind) -> Iterator[Converted]:
    """Read what ``write_shards`` wrote; the records are trusted, not checked again."""
    for shard in shard_files(folder):
        for _, row in parquet_rows(shard):
            yield Converted(record_of(row, kind), row.get("place") or "")


def mining_of(dataset: DatasetConfig, build: BuildConfig) -> BuildMining | None:
    """How a set is mined; None where it is not."""
    mine = build.mine
    if mine is None or dataset.kind not in MINED_KINDS:
        return None
    return mine if mine.datasets is None or dataset.name in mine.datasets else None


def set_settings(dataset: DatasetConfig, build: BuildConfig) -> dict[str, Any]:
    """Everything in a recipe that decides what a built set holds, as plain data."""
    mine = mining_of(dataset, build)
    # The instruction is read by the teacher alone.
    left_out = _NOT_OF_THE_BUILD if mine else _NOT_OF_THE_BUILD | {"instruction"}
    against = {"near": build.near, "bm25": build.bm25.get(dataset.name)}
    return {
        "format": FORMAT,
        "source": dataset.model_dump(mode="json", exclude=left_out),
        "max_refused": build.max_refused,
        "decontaminate": {"tasks": list(build.tasks)} | against if build.tasks else None,
        "mine": mine and mine.model_dump(mode="json", exclude={"datasets"}),
        "rows_per_shard": build.rows_per_shard,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a built set; None where there is no set, or one that is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        whole = all((folder / name).stat().st_size == size for name, size in shards.items())
        whole &= all(isinstance(manifest[key], dict) for key in ("settings", "inputs", "steps"))
        whole &= all(isinstance(manifest[key], str) for key in ("name", "kind"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return manifest if whole and shards else None


def built_problem(dataset: DatasetConfig, build: BuildConfig, folder: Path) -> str | None:
    """Why the set in ``folder`` is not the one that the recipe describes; None where it is."""
    manifest = read_manifest(folder / dataset.name)
    if manifest is None:
        return f"{dataset.name} is not built"
    keys = list(_different_keys(manifest["settings"], set_settings(dataset, build)))
    return f"{dataset.name} was built with another {', '.join(keys)}" if keys else None


def _different_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Key paths of settings at which two of them differ."""
    for key in dict.fromkeys((*old, *new)):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key}.{inner}" for inner in _different_keys(one, other))
        elif one != other:
            yield key
