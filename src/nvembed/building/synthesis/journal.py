"""The journal: every answer that was paid for, in the order it came.

One JSON object per line, appended and handed to the system at once: a process that is killed loses
no answer that had arrived. The last line may be half written then; it is cut off when the journal
is opened again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nvembed.core.errors import ConfigError, DataError, UserError

# How the first line begins, which says what the run asks for: the mark of a journal.
_BEGINNING = b'{"run": {'


class JournalRow(BaseModel):
    """What became of a request: a valid answer, or the last text and why it was rejected.

    Tokens are counted over all attempts; ``uncounted`` are the answers without counts.
    """

    id: str
    answer: dict[str, Any] | None = None
    rejected: str | None = None
    text: str | None = None
    attempts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0


class Journal:
    """Rows by their names; holds their places in memory, not the rows. To be closed.

    ``run`` is what the run asks for. A journal of another run is not gone on with.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a write that fails leaves nothing behind that closing would write again.
            self._out = open(path, "ab", buffering=0)
            self._in = open(path, "rb")
        except OSError as error:
            raise UserError(
                f"cannot open: {error.strerror or error}",
                where=str(path),
                hint="Choose a folder that can be written",
            ) from error
        try:
            self._read(run)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._in.close()
        self._out.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, row: JournalRow) -> None:
        """Append a row under a name that is not there yet."""
        assert row.id not in self._places
        self._places[row.id] = self._append(row.model_dump(exclude_none=True))

    def __getitem__(self, name: str) -> JournalRow:
        self._in.seek(self._places[name])
        return JournalRow.model_validate_json(self._in.readline())

    def rows(self) -> Iterator[JournalRow]:
        """Yield all rows by their names, sorted."""
        for name in sorted(self._places):
            yield self[name]

    def _append(self, row: dict[str, Any]) -> int:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place = self._out.seek(0, 2)
        try:
            written = self._out.write(line)
            if written == len(line):
                return place
            problem = "no space left"
        except OSError as error:
            problem = error.strerror or str(error)
        self._out.truncate(place)  # half a line in the midst would spoil those after it
        raise UserError(
            f"cannot write: {problem}",
            where=str(self._path),
            hint="What was written is kept; free space and run the command again",
        )

    def _read(self, run: dict[str, Any]) -> None:
        place = 0
        for number, line in enumerate(self._in, start=1):
            torn = not line.endswith(b"\n")
            if torn and (number > 1 or line.startswith(_BEGINNING[: len(line)])):
                break  # half written when the process died
            try:
                if torn:
                    raise ValueError
                if number == 1:
                    before = json.loads(line)["run"]
                else:
                    self._places[JournalRow.model_validate_json(line).id] = place
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    "is no line of a journal",
                    where=f"{self._path}:{number}",
                    hint="Delete the line, or choose another folder",
                ) from error
            if number == 1 and before != run:
                known = before if isinstance(before, dict) else run
                changed = ", ".join(key for key in run if known.get(key) != run[key])
                raise ConfigError(
                    "the folder holds a synthesis with other settings"
                    + (f" ({changed})" if changed else ""),
                    where=str(self._path),
                    hint="Choose another folder, or the settings of before",
                )
            place += len(line)
        self._out.truncate(place)
        if place == 0:
            self._append({"run": run})
