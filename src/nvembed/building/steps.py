"""Steps of a build: each is finished as a whole or not at all, and is not repeated.

A step is a folder named after the step and a key: a hash of everything that decides its contents,
the key of the step before it included. So what is there is right, and what a killed process left
half written has another name and is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.cache import content_hash
from nvembed.core.errors import DataError
from nvembed.core.files import atomic_folder, tidy, write_json
from nvembed.core.ownership import remove_named
from nvembed.core.store import STORED
from nvembed.core.text_files import read_json_object
from nvembed.data.built_sets import read_shards
from nvembed.data.records import Converted, Kind

# Of the intermediate files; the files of the set itself are as long as the recipe says.
STEP_ROWS = 250_000
COUNTS = "counts.json"
_NAME = re.compile(r"(read|distinct|decontaminate|mine)-[0-9a-f]{16}")
# What the steps leave, the miner's files among them.
_FILES = re.compile(
    rf"{COUNTS}|part-\d+\.parquet|(refused|contaminated|in|further|documents|out)\.jsonl"
    rf"|out\.jsonl\.report\.json|spilled/\d+\.jsonl|{STORED.pattern}"
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished step: its folder, with shards of records and other files, and what it counted."""

    folder: Path
    kind: Kind
    counts: dict[str, Any]

    def __call__(self) -> Iterator[Converted]:
        """Walk the records."""
        return read_shards(self.folder, self.kind)


class Steps:
    """The folder in which the steps of one set lie until the set is done.

    Args:
        folder: of this set alone.
        kind: of its records.
    """

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self._kind: Kind = kind

    def tidy(self, names: Sequence[str]) -> None:
        """Delete what was half written, and all steps but those named (as by ``name_of``)."""
        if not self._folder.is_dir():
            return
        tidy(self._folder, "*")
        for path in self._folder.iterdir():
            if path.name not in names and _NAME.fullmatch(path.name) and path.is_dir():
                remove_named(path, _FILES)

    def run(self, name: str, make: Callable[[Path], dict[str, Any]]) -> Finished:
        """Do a step, unless it is done.

        Args:
            name: of the step, as by ``name_of``.
            make: fills the folder that it is given and returns its counts.
        """
        target = self._folder / name
        counts: dict[str, Any] | None = None
        with suppress(DataError):  # not done, or damaged since
            counts = read_json_object(target / COUNTS, "the counts of a step")
        if counts is None:
            with atomic_folder(target) as temporary:
                counts = make(temporary)
                write_json(temporary / COUNTS, counts)
        return Finished(target, self._kind, counts)

    def remove(self) -> None:
        """Delete all steps; what else somebody put into the folder stays."""
        if self._folder.is_dir():
            self.tidy([])
        for folder in (self._folder, self._folder.parent):
            with suppress(OSError):  # there is none, or other sets are not done yet
                folder.rmdir()


def name_of(step: str, *key: Any) -> str:
    """Name of the folder of a step."""
    return f"{step}-{content_hash(*key)[:16]}"
