"""Sets on the Hugging Face hub, or in local folders laid out like them, as tables of rows."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nvembed.core.errors import DataError, SourceError
from nvembed.core.files import ending_of
from nvembed.core.runs import derive_seed
from nvembed.data.config import HubLocation, TableConfig
from nvembed.data.records import BadRow
from nvembed.data.sources.files import open_file
from nvembed.data.sources.rows import Row, Rows, Table

_ROWS_AT_ONCE = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub(table: TableConfig, location: HubLocation, base_dir: Path) -> Table:
    """Open a set by its card or, also where a script comes with it, file by file."""
    _import("huggingface_hub")
    folder = base_dir / location.id
    local = folder if folder.is_dir() else None
    revision = None if local else _commit(location)
    # Of the set alone: the rows that are taken do not depend on the rest of the recipe.
    names = (location.id, location.config or "", location.split)
    seed = derive_seed(0, "take", *names) % 2**32
    if location.files is None:
        return _from_card(location, str(local or location.id), revision, seed)
    open_one = partial(open_file, header=table.header, quotes=table.quotes)
    tables = [
        open_one(local / file) if local else _open_remote(location, file, revision, open_one)
        for file in location.files
    ]
    rows: Rows = (row for one in tables for row in one.rows)
    if location.take is not None:
        shuffled = through_buffer(rows, location.shuffle_buffer, random.Random(seed))
        rows = islice(shuffled, location.take)
    columns = tables[0].columns if len(tables) == 1 else None
    textual = any(one.textual for one in tables)
    return Table(location.id, rows, columns, textual=textual, revision=revision)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(
            f"reading sets of the hub needs the library {name}",
            hint="Run `pip install nvembed[data]`",
        ) from error


def _commit(location: HubLocation) -> str | None:
    """The commit that the revision stands for; None where that cannot be known offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if location.revision is not None and _COMMIT.fullmatch(location.revision):
        return location.revision
    with _explained(location):
        try:
            return HfApi().dataset_info(location.id, revision=location.revision).sha
        except OfflineModeIsEnabled:
            return location.revision  # what was downloaded before can be used all the same


def _from_card(location: HubLocation, place: str, revision: str | None, seed: int) -> Table:
    datasets, name = _import("datasets"), _name(location)
    streaming, take = location.streaming, location.take
    with _explained(location):
        dataset = datasets.load_dataset(
            place, location.config, split=location.split, revision=revision, streaming=streaming
        )
        if take is not None and streaming:
            buffer = location.shuffle_buffer
            dataset = dataset.shuffle(seed=seed, buffer_size=buffer).take(take)
        elif take is not None:
            dataset = dataset.shuffle(seed=seed).select(range(min(take, len(dataset))))
        # A stream does not always know its columns before it is read.
        columns = dataset.column_names or tuple(next(iter(dataset), {}))

    def rows() -> Rows:
        number = 0
        batches = dataset.iter(batch_size=_ROWS_AT_ONCE)
        while True:
            with _explained(location, f"after row {number}: "):
                batch = next(batches, None)
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(f"{name} row {number}", dict(zip(batch, values, strict=True)))

    return Table(name, rows(), tuple(columns), revision=revision)


def _open_remote(
    location: HubLocation, file: str, revision: str | None, open_one: Callable[..., Table]
) -> Table:
    from huggingface_hub import HfFileSystem, hf_hub_download

    name = f"{location.id}/{file}"
    if not location.streaming or ending_of(file) == ".parquet":
        with _explained(location):
            path = hf_hub_download(location.id, file, repo_type="dataset", revision=revision)
        return open_one(Path(path), name=name)

    def stream() -> IO[bytes]:
        at = f"@{revision}" if revision else ""
        with _explained(location):
            return HfFileSystem().open(f"datasets/{location.id}{at}/{file}", "rb")

    def rows() -> Rows:
        with _explained(location):  # the network may fail in the middle
            yield from table.rows

    table = open_one(name, opener=stream)
    return replace(table, rows=rows())


def through_buffer(rows: Rows, size: int, generator: random.Random) -> Iterator[Row | BadRow]:
    """Shuffle a stream: every row waits in a buffer until chance takes it out."""
    buffer = list(islice(rows, size))
    for row in rows:
        place = generator.randrange(size)
        buffer[place], row = row, buffer[place]
        yield row
    generator.shuffle(buffer)
    yield from buffer


_PIN = "Has the set changed? Look at its files and correct the recipe"
_CHECK_ID = "Check `hub.id`, and that the set still has the form that the recipe says"

# Names of errors, or what their texts say in lower case → what is wrong in terms of the recipe, and
# what to do. The first that fits counts.
_MEANINGS: tuple[tuple[set[str], str, str], ...] = (
    (
        {"GatedRepoError", "gated"},
        "the set is gated",
        "Accept its terms on its page (datasets/{id}), then log in with `hf auth login`",
    ),
    ({"RevisionNotFoundError"}, "no revision {revision!r}", _PIN),
    (
        {"RepositoryNotFoundError", "doesn't exist on the hub"},
        "no such set on the hub, or a private one",
        _CHECK_ID,
    ),
    ({"RemoteEntryNotFoundError"}, "no such file in the set ({reason})", _PIN),
    (
        {"dataset scripts are no longer supported"},
        "the set comes with a loading script, which is not run",
        "Name its data files under `hub.files`, or give `revision: refs/convert/parquet`",
    ),
    ({"builderconfig", "config name is missing"}, "{reason}", "Correct `hub.config`"),
    ({"unknown split", "bad split"}, "{reason}", "Correct `hub.split`"),
    (
        {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "httpx."},
        "the hub cannot be reached ({reason})",
        "Check the network and run again: what was downloaded is kept. For a local copy give its "
        "folder as `hub.id`",
    ),
    ({"Exception"}, "cannot be read ({kind}: {reason})", _CHECK_ID),
)


@contextmanager
def _explained(location: HubLocation, when: str = "") -> Iterator[None]:
    """Turn what the libraries below raise, errors of many families, into a SourceError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        names = {type(error).__module__.partition(".")[0] + "."}
        cause: BaseException | None = error
        while cause is not None:
            names |= {kind.__name__ for kind in type(cause).__mro__}
            cause = cause.__cause__ or cause.__context__
        message, hint = next(
            told
            for signs, *told in _MEANINGS
            if signs & names or any(sign in reason.lower() for sign in signs)
        )
        known = {"reason": reason, "kind": type(error).__name__, "id": location.id}
        known["revision"] = location.revision or ""
        raise SourceError(
            when + message.format(**known), where=_name(location), hint=hint.format(**known)
        ) from error


def _name(location: HubLocation) -> str:
    parts = (location.id, location.config, None if location.files else location.split)
    return " ".join(filter(None, parts))
