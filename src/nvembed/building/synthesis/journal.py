"""The journal: every answer that was paid for, in the order it came.

One JSON object per line, appended and handed to the system at once: a process that is killed loses
no answer that had arrived. The last line may be half written then; it is cut off when the journal
is opened again. Next file: ``run.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from nvembed.core.errors import ConfigError, DataError, UserError

# Of the first line, which says what the run asks for: the mark of a journal.
_BEGINNING = b'{"run": {'


class Journal:
    """Rows with an ``id`` each; holds their places in memory, not the rows.

    Args:
        path: of the file; made where there is none.
        run: what the run asks for. A journal of another run is not gone on with.

    Raises:
        ConfigError: the journal is of another run.
        UserError: the file cannot be made.
        DataError: a line in its midst cannot be read.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a write that fails leaves nothing behind that closing would write again.
            self._out = open(path, "ab", buffering=0)
            self._in: BinaryIO = open(path, "rb")
        except OSError as error:
            raise UserError(
                f"cannot open: {error.strerror or error}",
                where=str(path),
                hint="Choose a folder that can be written",
            ) from error
        try:
            self._open(run)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row under a name that is not there yet."""
        assert name not in self._places
        self._places[name] = self._append({"id": name, **row})

    def get(self, name: str) -> dict[str, Any] | None:
        """Return the row of a name."""
        place = self._places.get(name)
        if place is None:
            return None
        self._in.seek(place)
        row: dict[str, Any] = json.loads(self._in.readline())
        return row

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._places)

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

    def _close(self) -> None:
        self._in.close()
        self._out.close()

    def _open(self, run: dict[str, Any]) -> None:
        place = 0
        for number, line in enumerate(self._in, start=1):
            if not line.endswith(b"\n"):
                if number == 1 and not line.startswith(_BEGINNING[: len(line)]):
                    raise self._no_line(number)
                break  # half written when the process died
            try:
                row = json.loads(line)
                if number == 1:
                    before = row["run"]
                else:
                    self._places[row["id"]] = place
            except (ValueError, KeyError, TypeError) as error:
                raise self._no_line(number) from error
            if number == 1:
                self._check(before, run)
            place += len(line)
        self._out.truncate(place)
        if place == 0:
            self._append({"run": run})

    def _no_line(self, number: int) -> DataError:
        return DataError(
            "is no line of a journal",
            where=f"{self._path}:{number}",
            hint="Delete the line, or choose another folder",
        )

    def _check(self, before: Any, run: dict[str, Any]) -> None:
        if before == run:
            return
        changed = (
            [key for key in run if before.get(key) != run[key]] if isinstance(before, dict) else []
        )
        raise ConfigError(
            "the folder holds a synthesis with other settings"
            + (f" ({', '.join(changed)})" if changed else ""),
            where=str(self._path),
            hint="Choose another folder, or the settings of before",
        )
