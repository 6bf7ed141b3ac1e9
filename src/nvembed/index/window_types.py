"""The types of the fields of some documents: known ones, those of their files, those of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from nvembed.core.errors import DataError
from nvembed.data.sources.rows import Table
from nvembed.index.fields import (
    Misfit,
    describe,
    from_text,
    kept_type,
    kept_value,
    type_of,
    type_of_texts,
    wider_type,
)

_OF_DOCUMENTS = ("id", "text")


class WindowTypes:
    """Settles the types of fields, row by row.

    Attributes:
        found: the types so far.

    Args:
        known: types of the fields that the database has.
    """

    def __init__(self, known: Mapping[str, pa.DataType]) -> None:
        self.found = dict(known)
        self._of_tables: dict[int, dict[str, pa.DataType]] = {}
        self._of_cells: dict[str, pa.DataType] = {}

    def read_tables(self, rows: Iterable[tuple[Table, dict[str, Any]]]) -> None:
        """Look at what files say: the schema of Parquet; of a column of CSV all cells together."""
        cells: dict[str, list[str]] = {}
        for table, values in rows:
            if table.schema is not None and id(table) not in self._of_tables:
                types = {column.name: kept_type(column.type) for column in table.schema}
                self._of_tables[id(table)] = types
            elif table.textual:
                for name, text in values.items():
                    if text != "" and name not in self.found:
                        cells.setdefault(name, []).append(text)
        self._of_cells = {name: type_of_texts(texts) for name, texts in cells.items()}

    def take(self, values: dict[str, Any], table: Table | None) -> None:
        """Find the types of a row's fields, and make them wider where they hold too little.

        Raises:
            DataError: a field cannot have this name, or its value no type that the others have.
        """
        types: dict[str, pa.DataType] = {}
        for name, value in values.items():
            type = self.found.get(name) or self._first_type(name, value, table)
            if type is None:
                continue
            _check_name(name)
            given = self._read(value, type, table)
            try:
                kept_value(given, type)
            except Misfit as misfit:
                wider = wider_type(type, given)
                if wider is None:
                    raise _mismatch(name, given, type, misfit) from misfit
                type = wider
            types[name] = type
        self.found |= types

    def kept(self, values: dict[str, Any], table: Table | None) -> dict[str, Any]:
        """The values of a row's fields under the types that were found.

        Raises:
            DataError: the type that another row has made of a field does not hold the value.
        """
        kept: dict[str, Any] = {}
        for name, value in values.items():
            type = self.found.get(name)
            if type is None:
                continue
            given = self._read(value, type, table)
            try:
                value = kept_value(given, type)
            except Misfit as misfit:
                raise _mismatch(name, given, type, misfit) from misfit
            if value is not None:
                kept[name] = value
        return kept

    def _first_type(self, name: str, value: Any, table: Table | None) -> pa.DataType | None:
        """The type of a field that is new; None where nothing says it yet."""
        if table is not None and table.textual:
            return self._of_cells.get(name)
        if table is not None and id(table) in self._of_tables:
            type = self._of_tables[id(table)].get(name)
            return None if type is None or pa.types.is_null(type) else type
        if value is None or value != value:
            return None
        try:
            return type_of(value)
        except Misfit as misfit:
            raise DataError(f'"{name}" is {misfit}', expected="a text") from misfit

    def _read(self, value: Any, type: pa.DataType, table: Table | None) -> Any:
        if table is None or not table.textual:
            return value
        return None if value == "" else from_text(value, type)


def _check_name(name: str) -> None:
    if name in _OF_DOCUMENTS:
        raise DataError(
            f"a field cannot be called {name!r}: the document's own is",
            hint=f"--column {name}=NAME says which column that is, --fields which others to keep",
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a field cannot be called {name!r}", expected="whole characters"
        ) from error


def _mismatch(name: str, value: Any, type: pa.DataType, misfit: Misfit) -> DataError:
    if str(misfit):
        return DataError(f'"{name}" holds {misfit}')
    try:
        kind = describe(type_of(value))
    except Misfit as unknown:
        return DataError(f'"{name}" is {unknown}', expected="a text")
    if kind == describe(type):
        return DataError(
            f'"{name}" is {repr(value)[:60]}, which {type}, the type of the documents before it, '
            "does not hold",
            hint="Make them alike, or keep other fields only with --fields",
        )
    return DataError(
        f'"{name}" is a {kind}, in the documents before it a {describe(type)}',
        hint="Make them alike, or keep other fields only with --fields",
    )
