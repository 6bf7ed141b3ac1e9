"""The types of the fields of some documents: known ones, those of their files, those of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

Fields = dict[str, Any]


class FieldTypes:
    """Settles the types of fields: known ones, those of files, those of values.

    ``found`` are the types so far, at first those of the fields that the database has.
    """

    def __init__(self, known: Mapping[str, pa.DataType]) -> None:
        self.found = dict(known)
        self._of_cells: dict[str, pa.DataType] = {}

    def settle(
        self,
        rows: Sequence[tuple[Fields, Table | None]],
        refuse: Callable[[int, DataError], object],
    ) -> list[Fields | None]:
        """The values of rows under the types that hold all of them.

        Rows come with the table that they are of. ``refuse`` is told the number of a row that no
        type suits, for which None is returned.
        """
        known = dict(self.found)
        cells: dict[str, list[str]] = {}  # a column of CSV has one type for all of them
        for values, table in rows:
            if table is not None and table.textual:
                for name, text in values.items():
                    if text != "" and name not in known:
                        cells.setdefault(name, []).append(text)
        self._of_cells = {name: type_of_texts(texts) for name, texts in cells.items()}
        kept: list[Fields | None] = [{} for _ in rows]
        for widen in (True, False):
            for number, (values, table) in enumerate(rows):
                if kept[number] is not None:
                    try:
                        kept[number] = self._kept(values, table, widen)
                    except DataError as error:
                        kept[number] = None
                        refuse(number, error)
            if self.found == known:
                break  # else what was read before a type was found or made wider is read again
        return kept

    def _kept(self, values: Fields, table: Table | None, widen: bool) -> Fields:
        types: dict[str, pa.DataType] = {}
        kept: Fields = {}
        textual = table is not None and table.textual
        for name, value in values.items():
            type = self.found.get(name)
            if type is None and widen:
                type = self._first_type(name, value, table)
            if type is None:
                continue
            _check_name(name)
            if textual:
                value = None if value == "" else from_text(value, type)
            types[name] = type
            try:
                got = kept_value(value, type)
            except Misfit as misfit:
                wider = wider_type(type, value) if widen else None
                if wider is None:
                    raise _mismatch(name, value, type, misfit) from misfit
                types[name] = wider
            else:
                if got is not None:
                    kept[name] = got
        self.found |= types
        return kept

    def _first_type(self, name: str, value: Any, table: Table | None) -> pa.DataType | None:
        """The type of a field that is new; None where nothing says it yet."""
        if table is not None and table.textual:
            return self._of_cells.get(name)
        if table is not None and table.schema is not None:
            types = [kept_type(column.type) for column in table.schema if column.name == name]
            return None if not types or pa.types.is_null(types[-1]) else types[-1]
        if value is None or value != value:
            return None
        try:
            return type_of(value)
        except Misfit as misfit:
            raise DataError(f'"{name}" is {misfit}', expected="a text") from misfit


def _check_name(name: str) -> None:
    if name in ("id", "text"):
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
    problem = f"is a {kind}, in the documents before it a {describe(type)}"
    if kind == describe(type):
        problem = (
            f"is {repr(value)[:60]}, which {type}, the type of the documents before it, "
            "does not hold"
        )
    return DataError(
        f'"{name}" {problem}', hint="Make them alike, or keep other fields only with --fields"
    )
