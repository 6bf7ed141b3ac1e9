"""Literals of SQL for numbers and times, exact to the last digit.

A time is a number: the days, or parts of a second, that have passed since 1970 or midnight.
"""

from __future__ import annotations

import datetime
import math
import re
from fractions import Fraction
from math import ceil, floor

import pyarrow as pa

from nvembed.index.fields import describe, integer_range, is_number

_LEAST = -(2**63)  # of 64 bits, whose sign the engine does not read as part of a literal
_UNITS = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def sql_type(type: pa.DataType) -> str:
    """The name of a type of numbers or times in the engine's ``arrow_cast``."""
    if pa.types.is_timestamp(type):
        # The zone is a text of the file: no quote of it may end a text of the engine.
        zone = "None" if type.tz is None else f'Some("{re.sub("[^A-Za-z0-9_+:/-]", "", type.tz)}")'
        return f"Timestamp({_UNITS[type.unit]}, {zone})"
    if pa.types.is_time(type):
        return f"Time{type.bit_width}({_UNITS[type.unit]})"
    if pa.types.is_decimal(type):
        return f"Decimal{type.bit_width}({type.precision}, {type.scale})"
    if pa.types.is_floating(type):
        return f"Float{type.bit_width}"
    if pa.types.is_integer(type):
        return f"{'' if pa.types.is_signed_integer(type) else 'U'}Int{type.bit_width}"
    return "Date32" if type == pa.date32() else "Date64"


def sql_number(number: int | Fraction | float, type: pa.DataType) -> str:
    """A literal: a number, or how many days or parts of a second have passed, of a type."""
    if pa.types.is_floating(type):
        try:
            value = float(number)
        except OverflowError:
            value = math.inf if number > 0 else -math.inf
        if math.isfinite(value) and type == pa.float64():
            return repr(value)
        return f"arrow_cast('{value!r}', '{sql_type(type)}')"
    if pa.types.is_decimal(type):
        digits = f"{abs(int(number)):0{type.scale + 1}d}"
        point = len(digits) - type.scale
        text = f"{'-' if number < 0 else ''}{digits[:point]}.{digits[point:]}"
        return f"arrow_cast('{text}', '{sql_type(type)}')"
    if pa.types.is_integer(type):
        least = number == _LEAST  # whose sign is not read as part of it
        return f"arrow_cast('{number}', 'Int64')" if least else str(number)
    if number == _LEAST:
        return f"arrow_cast(arrow_cast('{number}', 'Int64'), '{sql_type(type)}')"
    return f"arrow_cast({number}, '{sql_type(type)}')"


_EPOCH = datetime.datetime(1970, 1, 1)
_FINER = re.compile(r"(\.\d{6})(\d{1,3})(?!\d)")


def is_ordered(type: pa.DataType) -> bool:
    """Whether values are numbers or times, which ``sql_number`` writes."""
    return is_number(type) or describe(type) in ("date", "timestamp", "time")


def column_numbers(type: pa.DataType) -> range | None:
    """The numbers that a column may hold, as of ``sql_number``; None of floats."""
    if pa.types.is_floating(type):
        return None
    if pa.types.is_integer(type):
        return integer_range(type)
    if pa.types.is_decimal(type):
        return range(1 - 10**type.precision, 10**type.precision)
    return range(-(2 ** (type.bit_width - 1)), 2 ** (type.bit_width - 1))


def bounded(sign: str, number: Fraction, type: pa.DataType) -> str:
    """A comparison by ``< <= > >=`` with a number that may lie beside the values of the type."""
    values = column_numbers(type)
    if values is None:
        return f"{sign} {sql_number(number, type)}"
    whole = floor(number) if sign.startswith("<") else ceil(number)
    if whole != number:
        sign = f"{sign[0]}="
    least, greatest = values[0], values[-1]
    if whole < least:  # all values are above it
        sign, whole = ("<" if sign.startswith("<") else ">="), least
    elif whole > greatest:
        sign, whole = ("<=" if sign.startswith("<") else ">"), greatest
    return f"{sign} {sql_number(whole, type)}"


def parse_time(text: str, type: pa.DataType) -> Fraction:
    """Days or parts of a second of a date or time.

    Raises:
        ValueError: it is none, or brings a zone that the field lacks, or the other way round.
    """
    finer = _FINER.search(text)  # nanoseconds, which datetime does not read
    below = Fraction(0)
    if finer:
        below = Fraction(int(finer[2].ljust(3, "0")), 10**9)
        text = text[: finer.end(1)] + text[finer.end() :]
    if pa.types.is_date(type):
        days = (datetime.date.fromisoformat(text) - _EPOCH.date()).days
        return Fraction(days) if type == pa.date32() else Fraction(days * 86_400_000)
    if pa.types.is_time(type):
        time = datetime.time.fromisoformat(text)
        if time.tzinfo is not None:
            raise ValueError(text)
        moment = datetime.datetime.combine(_EPOCH.date(), time)
    elif pa.types.is_timestamp(type):
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None and type.tz in ("UTC", "Z", "+00:00"):
            moment = moment.replace(tzinfo=datetime.UTC)
        if (moment.tzinfo is None) is not (type.tz is None):
            raise ValueError(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    else:
        raise ValueError(text)
    passed = moment - _EPOCH
    seconds = passed.days * 86_400 + passed.seconds + Fraction(passed.microseconds, 10**6)
    return (seconds + below) * PER_SECOND[type.unit]
