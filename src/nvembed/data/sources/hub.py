"""Sets on the Hugging Face hub, or in local folders laid out like them, as tables of rows.

A set is read by its card (``load_dataset``), or file by file as it lies in the repository, which
also works for sets that come with a loading script and for single files of very large ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nvembed.core.errors import SourceError
from nvembed.core.seeding import derive_seed
from nvembed.core.text_files import ending_of
from nvembed.data.sources.config import HubLocation
from nvembed.data.sources.files import open_file, open_stream
from nvembed.data.sources.rows import BadRow, Row, Rows, Table

_ROWS_AT_ONCE = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub(
    location: HubLocation,
    *,
    base_dir: Path,
    header: Sequence[str] | None = None,
    quotes: bool | None = None,
) -> Table:
    """Open a set on the hub.

    Args:
        location: where it is.
        base_dir: folder that local ids start at.
        header: as of ``open_file``, for ``files``.
        quotes: as of ``open_file``, for ``files``.

    Raises:
        SourceError: a library is missing, the set cannot be reached or may not be read, or there is
            no such set, revision, configuration, split or file.
    """
    _import("huggingface_hub")
    folder = base_dir / location.id
    local = folder if folder.is_dir() else None
    revision = None if local else _commit(location)
    if location.files is None:
        return _from_card(location, local, revision)
    tables = [
        _open_one(location, file, local, revision, header=header, quotes=quotes)
        for file in location.files
    ]
    rows: Rows = (row for table in tables for row in table.rows)
    if location.take is not None:
        rows = _some(rows, location)
    return Table(
        location.id,
        rows,
        tables[0].columns if len(tables) == 1 else None,
        textual=any(table.textual for table in tables),
        revision=revision,
    )


def _import(name: str) -> Any:
    import importlib

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
    try:
        return HfApi().dataset_info(location.id, revision=location.revision).sha
    except OfflineModeIsEnabled:
        return location.revision  # what was downloaded before can be used all the same
    except Exception as error:  # the libraries below raise errors of many families
        raise _explained(error, location) from error


# --- By the card ----------------------------------------------------------------------------------


def _from_card(location: HubLocation, local: Path | None, revision: str | None) -> Table:
    datasets = _import("datasets")
    name = _name(location)
    try:
        dataset = datasets.load_dataset(
            str(local or location.id),
            location.config,
            split=location.split,
            revision=revision,
            streaming=location.streaming,
        )
        if location.take is not None:
            dataset = _shuffled(dataset, location)
        # A stream does not always know its columns before it is read.
        columns = dataset.column_names or tuple(next(iter(dataset), {}))
    except Exception as error:  # the libraries below raise errors of many families
        raise _explained(error, location) from error
    return Table(name, _batches(dataset, name, location), tuple(columns), revision=revision)


def _shuffled(dataset: Any, location: HubLocation) -> Any:
    if location.streaming:
        stream = dataset.shuffle(seed=_seed(location), buffer_size=location.shuffle_buffer)
        return stream.take(location.take)
    most = min(location.take or 0, len(dataset))
    return dataset.shuffle(seed=_seed(location)).select(range(most))


def _seed(location: HubLocation) -> int:
    # Of the set alone: the rows that are taken do not depend on the rest of the recipe.
    return derive_seed(0, "take", location.id, location.config or "", location.split) % 2**32


def _batches(dataset: Any, name: str, location: HubLocation) -> Rows:
    number = 0
    try:
        for batch in dataset.iter(batch_size=_ROWS_AT_ONCE):
            names = tuple(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(f"{name} row {number}", dict(zip(names, values, strict=True)))
    except Exception as error:  # the network or a file of the set, in the middle
        raise _explained(error, location, f"after row {number}: ") from error


# --- File by file ---------------------------------------------------------------------------------


def _open_one(
    location: HubLocation,
    file: str,
    local: Path | None,
    revision: str | None,
    *,
    header: Sequence[str] | None,
    quotes: bool | None,
) -> Table:
    if local is not None:
        return open_file(local / file, header=header, quotes=quotes)
    name = f"{location.id}/{file}"
    if location.streaming and ending_of(file) != ".parquet":
        opened = open_stream(
            lambda: _stream(location, file, revision), name, header=header, quotes=quotes
        )
        return Table(
            opened.name, _network(opened.rows, location), opened.columns, textual=opened.textual
        )
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(location.id, file, repo_type="dataset", revision=revision)
    except Exception as error:  # the libraries below raise errors of many families
        raise _explained(error, location) from error
    return open_file(Path(path), name=name, header=header, quotes=quotes)


def _stream(location: HubLocation, file: str, revision: str | None) -> IO[bytes]:
    from huggingface_hub import HfFileSystem

    at = f"@{revision}" if revision else ""
    try:
        return HfFileSystem().open(f"datasets/{location.id}{at}/{file}", "rb")
    except Exception as error:  # the libraries below raise errors of many families
        raise _explained(error, location) from error


def _network(rows: Rows, location: HubLocation) -> Rows:
    try:
        yield from rows
    except SourceError:
        raise
    except Exception as error:  # the network, in the middle
        raise _explained(error, location) from error


def _some(rows: Rows, location: HubLocation) -> Rows:
    """So many rows as are to be taken, drawn through a buffer."""
    assert location.take is not None
    generator = random.Random(_seed(location))
    return islice(through_buffer(rows, location.shuffle_buffer, generator), location.take)


def through_buffer(rows: Rows, size: int, generator: random.Random) -> Iterator[Row | BadRow]:
    """Shuffle a stream: every row waits in a buffer until chance takes it out."""
    buffer: list[Row | BadRow] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = generator.randrange(size)
        buffer[place], row = row, buffer[place]
        yield row
    generator.shuffle(buffer)
    yield from buffer


# --- Errors ---------------------------------------------------------------------------------------


def _name(location: HubLocation) -> str:
    parts = (location.id, location.config, None if location.files else location.split)
    return " ".join(filter(None, parts))


def _explained(error: Exception, location: HubLocation, when: str = "") -> SourceError:
    """Say what is wrong in the terms of the recipe."""
    if isinstance(error, SourceError):
        return error
    from huggingface_hub import errors

    reason = " ".join(str(error).split())[:300]
    where = _name(location)
    chain = list(_causes(error))

    def is_a(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in chain)

    if is_a(errors.GatedRepoError) or "gated" in reason.lower():
        return SourceError(
            f"{when}the set is gated",
            where=where,
            hint=f"Accept its terms on its page (datasets/{location.id}), then log in with "
            "`hf auth login`",
        )
    if is_a(errors.RevisionNotFoundError):
        return SourceError(f"{when}no revision {location.revision!r}", where=where, hint=_PIN)
    if is_a(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in reason:
        return SourceError(
            f"{when}no such set on the hub, or a private one", where=where, hint=_CHECK_ID
        )
    if is_a(errors.RemoteEntryNotFoundError):
        return SourceError(f"{when}no such file in the set ({reason})", where=where, hint=_PIN)
    if "Dataset scripts are no longer supported" in reason:
        return SourceError(
            f"{when}the set comes with a loading script, which is not run",
            where=where,
            hint="Name its data files under `hub.files`, or give `revision: refs/convert/parquet`",
        )
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        return SourceError(when + reason, where=where, hint="Correct `hub.config`")
    if "Unknown split" in reason or "Bad split" in reason:
        return SourceError(when + reason, where=where, hint="Correct `hub.split`")
    unreachable = is_a(ConnectionError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    if unreachable or type(error).__module__.startswith("httpx"):
        return SourceError(
            f"{when}the hub cannot be reached ({reason})",
            where=where,
            hint="Check the network and run again: what was downloaded is kept. For a local copy "
            "give its folder as `hub.id`",
        )
    return SourceError(
        f"{when}cannot be read ({type(error).__name__}: {reason})", where=where, hint=_CHECK_ID
    )


_PIN = "Has the set changed? Look at its files and correct the recipe"
_CHECK_ID = "Check `hub.id`, and that the set still has the form that the recipe says"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
