"""Fields of documents: an Arrow type each, and values that go in and come out as they are.

A type holds a value or it does not (``Misfit``): nothing is rounded, cut or spelled otherwise.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from nvembed.core.errors import DataError
from nvembed.data.sources.rows import Table

# Lists and objects of JSON, which may have another form in every row: kept as their JSON.
JSON = pa.json_(pa.string())
Fields = dict[str, Any]  # by name
OWN_COLUMNS = ("id", "text", "text_hash", "vector")

_KIND = b"nvembed"  # of a column's metadata: what a text column holds
_ESCAPED = re.compile(r"[%.`\x00-\x1f\x7f]|^_")
# Zeros in front and a plus make a name of what looks like a number (an article, a telephone).
_WHOLE = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)


class Misfit(Exception):  # noqa: N818 - caught where the place of the value is known
    """A type does not hold a value."""


def column_name(name: str, generation: int = 1) -> str:
    """Name a field's column like it, but for signs that the engine does not take."""
    column = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", name) or "%"
    if name in OWN_COLUMNS:
        column = f"%{ord(name[0]):02X}{name[1:]}"
    return column if generation == 1 else f"{column}%~{generation}"


def field_name(column: str) -> tuple[str, int]:
    """Field and generation of a column: a wider type is another generation."""
    column, _, generation = column.partition("%~")
    return ("" if column == "%" else unquote(column)), int(generation or 1)


def to_column(name: str, type: pa.DataType) -> pa.Field:
    """The column of a field in the table."""
    if type == JSON:
        return pa.field(column_name(name), pa.string(), metadata={_KIND: b"json"})
    return pa.field(column_name(name), type)


def type_of_column(column: pa.Field) -> pa.DataType:
    """The type of the field that a column of the table holds."""
    return JSON if (column.metadata or {}).get(_KIND) == b"json" else column.type


def is_text(type: pa.DataType) -> bool:
    """Whether values are texts."""
    return type in (pa.string(), pa.large_string())


def is_number(type: pa.DataType) -> bool:
    """Whether values are numbers."""
    return pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)


_KINDS: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("text", is_text),
    ("number", is_number),
    ("boolean", pa.types.is_boolean),
    ("date", pa.types.is_date),
    ("timestamp", pa.types.is_timestamp),
    ("time", pa.types.is_time),
    ("duration", pa.types.is_duration),
    ("JSON value", JSON.equals),
)


def describe(type: pa.DataType) -> str:
    """What a type holds, in a word."""
    return next((word for word, check in _KINDS if check(type)), str(type))


def kept_type(type: pa.DataType) -> pa.DataType:
    """The type under which a column of a file is kept: its own, but for other codings of it."""
    if pa.types.is_dictionary(type) or pa.types.is_run_end_encoded(type):
        return kept_type(type.value_type)
    if isinstance(type, pa.BaseExtensionType) and type != JSON:
        return kept_type(type.storage_type)
    if type in (pa.string_view(), pa.binary_view()):
        return pa.string() if type == pa.string_view() else pa.binary()
    if pa.types.is_decimal(type):
        return _decimal(type.precision - min(type.scale, 0), max(type.scale, 0))
    if pa.types.is_map(type):
        pair = [("key", _inner_type(type.key_type)), ("value", _inner_type(type.item_type))]
        return pa.list_(pa.struct(pair))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _inner_type(field.type)) for field in type])
    if hasattr(type, "value_type"):  # a list of one of five kinds
        inner = _inner_type(type.value_type)
        if pa.types.is_large_list(type):
            return pa.large_list(inner)
        return pa.list_(inner, getattr(type, "list_size", -1))
    return type


def _inner_type(type: pa.DataType) -> pa.DataType:
    """The type of what a list or object holds; the engine has no columns of nothing in them."""
    return pa.string() if pa.types.is_null(type) else kept_type(type)


def _decimal(precision: int, scale: int) -> pa.DataType:
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def type_of(value: Any) -> pa.DataType:
    """The type of a value that comes without one; a ``Misfit`` where none holds it."""
    if isinstance(value, list | dict):
        return JSON
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, int) and not isinstance(value, bool):
        if (found := _first_that_holds([value], (pa.int64(), pa.uint64()))) is None:
            raise Misfit("a number that 64 bits do not hold")
        return found
    try:
        return pa.scalar(value).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise Misfit(f"of no type that is known ({type(value).__name__})") from error


def type_of_texts(texts: Iterable[str]) -> pa.DataType:
    """The type of a column of CSV: of numbers, where every cell is one that the type holds."""
    numbers = [from_text(text, pa.float64()) for text in texts]
    candidates: tuple[pa.DataType, ...] = ()
    if all(isinstance(number, int) for number in numbers):
        candidates = (pa.int64(), pa.uint64())
    elif all(not isinstance(number, str) and math.isfinite(number) for number in numbers):
        candidates = (pa.float64(),)
    return _first_that_holds(numbers, candidates) or pa.string()


def wider_type(type: pa.DataType, value: Any) -> pa.DataType | None:
    """The type of a field that has held ``type`` and is to hold a value too, if any."""
    candidates: list[pa.DataType] = []
    if pa.types.is_integer(type):
        candidates = [] if pa.types.is_signed_integer(type) else [pa.uint64()]
        candidates += [] if type == pa.uint64() else [pa.int64()]
    if pa.types.is_integer(type) or pa.types.is_floating(type):
        candidates += [pa.float64()] if isinstance(value, int | float) else []
    elif pa.types.is_decimal(type) and isinstance(value, int | Decimal):
        _, digits, exponent = Decimal(value).as_tuple()
        if isinstance(exponent, int):  # a letter where it is infinite
            scale = max(type.scale, -exponent)
            whole = max(type.precision - type.scale, len(digits) + exponent)
            candidates = [_decimal(whole + scale, scale)] if whole + scale <= 76 else []
    elif pa.types.is_timestamp(type) and isinstance(value, datetime.datetime):
        candidates = [pa.timestamp(unit, type.tz) for unit in ("ms", "us", "ns")]
    return _first_that_holds([value], candidates)


def _first_that_holds(
    values: Sequence[Any], candidates: Iterable[pa.DataType]
) -> pa.DataType | None:
    for type in candidates:
        try:
            for value in values:
                kept_value(value, type)
        except Misfit:
            continue
        return type
    return None


def kept_value(value: Any, type: pa.DataType) -> Any:
    """The value as it comes back from a column of a type; None for NaN, which is no value."""
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if isinstance(value, bool) != pa.types.is_boolean(type):
        raise Misfit
    try:
        if type == JSON:
            if not isinstance(value, list | dict):
                raise Misfit
            to_json(value).encode("utf-8")
            return value
        if is_number(type):
            value = _as_number(value, type)
        elif isinstance(value, str):
            value.encode("utf-8")
        else:
            value = _with_pairs(value)
        got = pa.scalar(value, type).as_py()
    except UnicodeEncodeError as error:
        raise Misfit("half a character (a lone surrogate)") from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise Misfit from error
    if not same(got, value):
        raise Misfit
    return got


def _as_number(value: Any, type: pa.DataType) -> int | float | Decimal:
    """A number as Python has those of a type."""
    if not isinstance(value, int | float | Decimal):
        raise Misfit
    if pa.types.is_decimal(type):
        return Decimal(repr(value) if isinstance(value, float) else value)
    number = float(value) if pa.types.is_floating(type) else int(value)
    if number != value:
        raise Misfit
    return number


def _with_pairs(value: Any) -> Any:
    """Replace the tuples that stand for the entries of a map."""
    if isinstance(value, dict):
        return {name: _with_pairs(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_pairs(inner) for inner in value]
    if isinstance(value, tuple) and len(value) == 2:
        return {"key": _with_pairs(value[0]), "value": _with_pairs(value[1])}
    return value


def same(got: Any, value: Any) -> bool:
    """Equality in which NaN equals itself."""
    if isinstance(got, list | tuple) and isinstance(value, list | tuple):
        return len(got) == len(value) and all(map(same, got, value))
    if isinstance(got, dict) and isinstance(value, dict):
        return got.keys() == value.keys() and all(same(got[key], value[key]) for key in got)
    if isinstance(got, float) and isinstance(value, float) and math.isnan(got):
        return math.isnan(value)
    return bool(got == value) and isinstance(got, bool) is isinstance(value, bool)


def to_json(value: Any) -> str:
    """The text under which a list or an object is kept."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def from_text(text: str, type: pa.DataType) -> Any:
    """Read a cell of CSV as a value for a type; the text itself where it is none."""
    if is_number(type):
        if _WHOLE.fullmatch(text) and text != "-0":
            return int(text) if len(text) < 100 else text
        if _NUMBER.fullmatch(text):
            return Decimal(text) if pa.types.is_decimal(type) else float(text)
    elif pa.types.is_boolean(type) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif pa.types.is_temporal(type) and not pa.types.is_duration(type):
        try:
            return pa.scalar(text).cast(type).as_py()
        except (pa.ArrowException, ValueError):
            pass
    return text


def plain(value: Any) -> Any:
    """A value as JSON has it: times by ISO 8601, decimals by their digits, bytes by base64."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


class FieldTypes:
    """Settles the types of fields; ``found`` are those so far, at first those of the database."""

    def __init__(self, known: Mapping[str, pa.DataType]) -> None:
        self.found = dict(known)
        self._of_cells: dict[str, pa.DataType] = {}

    def settle(
        self,
        rows: Sequence[tuple[Fields, Table | None]],
        refuse: Callable[[int, DataError], object],
    ) -> list[Fields | None]:
        """The values of rows (of tables) under types that hold all; None where one is refused."""
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
    problem = f"a field cannot be called {name!r}"
    if name in ("id", "text"):
        hint = f"--column {name}=NAME says which column that is, --fields which others to keep"
        raise DataError(f"{problem}: the document's own is", hint=hint)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(problem, expected="whole characters") from error


def _mismatch(name: str, value: Any, type: pa.DataType, misfit: Misfit) -> DataError:
    if str(misfit):
        return DataError(f'"{name}" holds {misfit}')
    try:
        kind = describe(type_of(value))
    except Misfit as unknown:
        return DataError(f'"{name}" is {unknown}', expected="a text")
    problem = f"is a {kind}, in the documents before it a {describe(type)}"
    if kind == describe(type):
        shown = repr(value)[:60]
        problem = f"is {shown}, which {type}, the type of the documents before it, does not hold"
    hint = "Make them alike, or keep other fields only with --fields"
    return DataError(f'"{name}" {problem}', hint=hint)
