"""Fields of documents: an Arrow type each, and values that go in and come out as they are.

A value is held by a type or it is not (``Misfit``): nothing is rounded, cut or spelled otherwise.
Where a type has too little room, ``wider_type`` says which one holds both. Next file:
``index/where.py``.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

# Lists and objects of JSON, which may have another form in every row: kept as their JSON.
JSON = pa.json_(pa.string())

_KIND = b"nvembed"  # of a column's metadata: what a text column holds
_ESCAPED = re.compile(r"[%.`\x00-\x1f\x7f]|^_")
_OWN = ("id", "text", "text_hash", "vector")
_INT64 = range(-(2**63), 2**63)
_UINT64 = range(2**64)
# Zeros in front and a plus make a name of what looks like a number (an article, a telephone).
_WHOLE = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)


class Misfit(Exception):  # noqa: N818 - caught where the place of the value is known
    """A type does not hold a value."""


# --- Names ----------------------------------------------------------------------------------------


def column_name(name: str, generation: int = 1) -> str:
    """Name the column of a field: itself, where the engine takes that.

    Args:
        name: of the field, any text.
        generation: counts up where the type of a field was made wider.
    """
    column = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", name) or "%"
    if name in _OWN:
        column = f"%{ord(name[0]):02X}{name[1:]}"
    return column if generation == 1 else f"{column}%~{generation}"


def field_name(column: str) -> tuple[str, int]:
    """Field and generation of a column; see ``column_name``."""
    column, _, generation = column.partition("%~")
    return ("" if column == "%" else unquote(column)), int(generation or 1)


# --- Types ----------------------------------------------------------------------------------------


def to_column(name: str, type: pa.DataType) -> pa.Field:
    """The column of a field in the table."""
    if type == JSON:
        return pa.field(column_name(name), pa.string(), metadata={_KIND: b"json"})
    return pa.field(column_name(name), type)


def type_of_column(column: pa.Field) -> pa.DataType:
    """The type of the field that a column of the table holds."""
    return JSON if (column.metadata or {}).get(_KIND) == b"json" else column.type


def kept_type(type: pa.DataType) -> pa.DataType:
    """The type under which a column of a file is kept: its own, but for other codings of it.

    A map is a list of keys and values, which is what Arrow makes of it too.
    """
    if pa.types.is_dictionary(type) or pa.types.is_run_end_encoded(type):
        return kept_type(type.value_type)
    if isinstance(type, pa.BaseExtensionType) and type != JSON:
        return kept_type(type.storage_type)
    if type in (pa.string_view(), pa.binary_view()):
        return pa.string() if type == pa.string_view() else pa.binary()
    if pa.types.is_decimal(type):
        precision, scale = type.precision - min(type.scale, 0), max(type.scale, 0)
        return _decimal(precision, scale)
    if pa.types.is_map(type):
        pair = [("key", _inner_type(type.key_type)), ("value", _inner_type(type.item_type))]
        return pa.list_(pa.struct(pair))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _inner_type(field.type)) for field in type])
    if pa.types.is_fixed_size_list(type):
        return pa.list_(_inner_type(type.value_type), type.list_size)
    if pa.types.is_large_list(type):
        return pa.large_list(_inner_type(type.value_type))
    if pa.types.is_list(type) or pa.types.is_list_view(type) or pa.types.is_large_list_view(type):
        return pa.list_(_inner_type(type.value_type))
    return type


def _inner_type(type: pa.DataType) -> pa.DataType:
    """The type of what a list or object holds; the engine has no columns of nothing in them."""
    return pa.string() if pa.types.is_null(type) else kept_type(type)


def _pairs(value: Any) -> Any:
    """Replace the tuples that stand for the entries of a map."""
    if isinstance(value, dict):
        return {name: _pairs(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_pairs(inner) for inner in value]
    if isinstance(value, tuple) and len(value) == 2:
        return {"key": _pairs(value[0]), "value": _pairs(value[1])}
    return value


def _decimal(precision: int, scale: int) -> pa.DataType:
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def type_of(value: Any) -> pa.DataType:
    """The type of a value that comes without one.

    Raises:
        Misfit: no type holds it.
    """
    if isinstance(value, list | dict):
        return JSON
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, int) and not isinstance(value, bool):
        if value in _INT64:
            return pa.int64()
        if value in _UINT64:
            return pa.uint64()
        raise Misfit("a number that 64 bits do not hold")
    try:
        return pa.scalar(value).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise Misfit(f"of no type that is known ({type(value).__name__})") from error


def type_of_texts(texts: Iterable[str]) -> pa.DataType:
    """The type of a column of CSV: of numbers, where every cell is one that the type holds."""
    numbers: list[int | float] = []
    for text in texts:
        if not _NUMBER.fullmatch(text):
            return pa.string()
        number = from_text(text, pa.float64())
        if isinstance(number, str) or not math.isfinite(number):
            return pa.string()
        numbers.append(number)
    whole = all(isinstance(number, int) for number in numbers)
    candidates = (pa.int64(), pa.uint64()) if whole else (pa.float64(),)
    for type in candidates:
        try:
            for number in numbers:
                kept_value(number, type)
        except Misfit:
            continue
        return type
    return pa.string()


def from_text(text: str, type: pa.DataType) -> Any:
    """Read a cell of CSV as a value for a type; the text itself where it is none."""
    if is_text(type):
        return text
    if is_number(type):
        if _WHOLE.fullmatch(text) and text != "-0":
            return int(text) if len(text) < 100 else text
        if _NUMBER.fullmatch(text):
            return Decimal(text) if pa.types.is_decimal(type) else float(text)
        return text
    if pa.types.is_boolean(type) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if pa.types.is_temporal(type) and not pa.types.is_duration(type):
        try:
            return pa.scalar(text).cast(type).as_py()
        except (pa.ArrowException, ValueError):
            return text
    return text


def is_text(type: pa.DataType) -> bool:
    """Whether values are texts."""
    return type in (pa.string(), pa.large_string())


def is_number(type: pa.DataType) -> bool:
    """Whether values are numbers."""
    return pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)


def describe(type: pa.DataType) -> str:
    """What a type holds, in a word."""
    if is_text(type):
        return "text"
    if is_number(type):
        return "number"
    for word, check in (
        ("boolean", pa.types.is_boolean),
        ("date", pa.types.is_date),
        ("timestamp", pa.types.is_timestamp),
        ("time", pa.types.is_time),
        ("duration", pa.types.is_duration),
    ):
        if check(type):
            return word
    return "JSON value" if type == JSON else str(type)


def integer_range(type: pa.DataType) -> range:
    """The values of an integer type."""
    bits = type.bit_width
    signed = pa.types.is_signed_integer(type)
    return range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else range(2**bits)


# --- Values ---------------------------------------------------------------------------------------


def kept_value(value: Any, type: pa.DataType) -> Any:
    """The value as it comes back from a column of a type; None for NaN, which is no value.

    Raises:
        Misfit: the type does not hold it.
    """
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if isinstance(value, bool) != pa.types.is_boolean(type):
        raise Misfit
    if type == JSON:
        return _json_value(value)
    if is_number(type):
        return _number(value, type)
    try:
        if isinstance(value, str):
            value.encode("utf-8")
        value = _pairs(value)
        got = pa.scalar(value, type).as_py()
    except UnicodeEncodeError as error:
        raise Misfit("half a character (a lone surrogate)") from error
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise Misfit from error
    if not same(got, value):
        raise Misfit
    return got


def _json_value(value: Any) -> Any:
    if not isinstance(value, list | dict):
        raise Misfit
    try:
        to_json(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Misfit("half a character (a lone surrogate)") from error
    except (TypeError, ValueError) as error:
        raise Misfit from error
    return value


def to_json(value: Any) -> str:
    """The text under which a list or an object is kept."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _number(value: Any, type: pa.DataType) -> int | float | Decimal:
    if not isinstance(value, int | float | Decimal):
        raise Misfit
    if pa.types.is_floating(type):
        try:
            number = float(value)
        except OverflowError as error:
            raise Misfit from error
        if type != pa.float64():
            with np.errstate(over="ignore"):
                number = float(np.float32(number) if type == pa.float32() else np.float16(number))
        if number != value:
            raise Misfit
        return number
    if not math.isfinite(value):
        raise Misfit
    if pa.types.is_integer(type):
        if value != int(value) or int(value) not in integer_range(type):
            raise Misfit
        return int(value)
    try:
        exact = Decimal(value) if not isinstance(value, float) else Decimal(repr(value))
        got: Decimal = pa.scalar(exact, type).as_py()
    except (pa.ArrowException, ValueError) as error:
        raise Misfit from error
    return got


def same(got: Any, value: Any) -> bool:
    """Equality in which NaN equals itself."""
    if isinstance(got, list | tuple) and isinstance(value, list | tuple):
        return len(got) == len(value) and all(map(same, got, value))
    if isinstance(got, dict) and isinstance(value, dict):
        return got.keys() == value.keys() and all(same(got[key], value[key]) for key in got)
    if isinstance(got, float) and isinstance(value, float) and math.isnan(got):
        return math.isnan(value)
    return bool(got == value) and isinstance(got, bool) is isinstance(value, bool)


def wider_type(type: pa.DataType, value: Any) -> pa.DataType | None:
    """The type of a field that has held ``type`` and is to hold a value too; None if there is none.

    Whole numbers get more room and then fractions, decimals more digits, times more of a second.
    """
    candidates: list[pa.DataType] = []
    if pa.types.is_integer(type):
        candidates = [pa.float64()] if isinstance(value, int | float) else []
        if type != pa.uint64():
            candidates.insert(0, pa.int64())
        if not pa.types.is_signed_integer(type):
            candidates.insert(0, pa.uint64())
    elif pa.types.is_floating(type) and isinstance(value, int | float):
        candidates = [pa.float64()]
    elif pa.types.is_decimal(type) and isinstance(value, int | Decimal):
        candidates = _more_digits(type, value)
    elif pa.types.is_timestamp(type) and isinstance(value, datetime.datetime):
        candidates = [pa.timestamp(unit, type.tz) for unit in ("ms", "us", "ns")]
    for candidate in candidates:
        try:
            kept_value(value, candidate)
        except Misfit:
            continue
        return candidate
    return None


def _more_digits(type: pa.DataType, value: int | Decimal) -> list[pa.DataType]:
    _, digits, exponent = Decimal(value).as_tuple()
    if not isinstance(exponent, int):  # infinite
        return []
    scale = max(type.scale, -exponent)
    whole = max(type.precision - type.scale, len(digits) + exponent)
    return [_decimal(whole + scale, scale)] if whole + scale <= 76 else []


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
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
