"""Columns: the values that a layout asks for, found in a row under the names of the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nvembed.core.errors import SourceError
from nvembed.data.records import RowError
from nvembed.data.sources.config import Column
from nvembed.data.sources.rows import Table, Values

# Columns that an id may have where nothing says which: BEIR, the usual one, Tevatron.
ID_NAMES = ("_id", "id", "docid")

MISSING = object()
# What stands for the values of a column while columns are looked for without rows.
UNKNOWN = object()


class Columns:
    """Looks values up by the names of the layout.

    Args:
        names: columns of the source by name of the layout; a name that is not there is its own
            column.
    """

    def __init__(self, names: Mapping[str, Column]) -> None:
        self._names = names
        self._getters = {name: _getter(column) for name, column in names.items()}

    def names(self, name: str) -> bool:
        """Whether the recipe says where the value is found."""
        return name in self._names

    def taken(self, name: str) -> str:
        """The column that the value is the whole of; its own name where it is a part or a join."""
        column = self._names.get(name, name)
        return column if isinstance(column, str) else name

    def find(self, values: Values, name: str) -> Any:
        """The value, ``MISSING`` where the row has no such column."""
        getter = self._getters.get(name)
        return values.get(name, MISSING) if getter is None else getter(values)

    def need(self, values: Values, name: str) -> Any:
        """The value.

        Raises:
            RowError: the row has no such column; says which it has.
        """
        value = self.find(values, name)
        if value is MISSING:
            raise RowError(f"{self._no_column(name)}; found: {', '.join(values) or 'none'}")
        return value

    def check(self, table: Table, needed: tuple[str, ...]) -> None:
        """Look for the columns before any row is read, where the table says which it has.

        Raises:
            SourceError: columns are not there.
        """
        if table.columns is None:
            return
        stand_in = dict.fromkeys(table.columns, UNKNOWN)
        asked = dict.fromkeys((*needed, *self._names))
        absent = [name for name in asked if self.find(stand_in, name) is MISSING]
        if absent:
            example = table.columns[0] if table.columns else "NAME"
            raise SourceError(
                " and ".join(self._no_column(name) for name in absent),
                where=table.name,
                expected=f"one of the columns found: {', '.join(table.columns)}",
                hint="Say under `columns` what they are called there, as in "
                f"`columns: {{{absent[0]}: {example}}}` or --column {absent[0]}={example}",
            )

    def _no_column(self, name: str) -> str:
        column = self._names.get(name)
        if column is None:
            return f'no column "{name}"'
        shown = column if isinstance(column, str) else " + ".join(column)
        return f'no column "{shown}" for "{name}"'


def _getter(column: Column) -> Callable[[Values], Any]:
    if isinstance(column, tuple):
        return _joined([_getter(part) for part in column])
    root, *path = column.split(".")

    def get(values: Values) -> Any:
        value = values.get(column, MISSING)
        if value is not MISSING or not path:
            return value
        return _inside(values.get(root, MISSING), path)

    return get


def _inside(value: Any, path: list[str]) -> Any:
    """Follow a path: of objects the key, of lists the item, of texts the word."""
    for step in path:
        if value is UNKNOWN or value is MISSING:
            return value
        if isinstance(value, str):
            value = value.split()
        if isinstance(value, dict):
            value = value.get(step, MISSING)
        elif isinstance(value, list):
            value = value[int(step)] if step.isdecimal() and int(step) < len(value) else MISSING
        else:
            return MISSING
    return value


def _joined(getters: list[Callable[[Values], Any]]) -> Callable[[Values], Any]:
    def get(values: Values) -> Any:
        parts = [getter(values) for getter in getters]
        if any(part is MISSING for part in parts):
            return MISSING
        if any(part is UNKNOWN for part in parts):
            return UNKNOWN
        texts = [part for part in parts if part is not None]
        if not all(isinstance(text, str) for text in texts):
            raise RowError("columns to be joined hold something else than texts")
        return " ".join(filter(None, map(str.strip, texts)))

    return get
