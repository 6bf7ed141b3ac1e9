"""Filters over the fields of documents: ``year > 2000 AND day < '2024-06-01'``.

In: an expression; out: SQL in which every name is a known column, every value a literal of the
column's type. Nothing of the expression reaches the database as it was written.

    either   = both {OR both}
    both     = one {AND one}
    one      = NOT one | "(" either ")" | field [test]
    test     = (= | != | <> | < | <= | > | >=) value | [NOT] IN "(" value {"," value} ")"
             | [NOT] LIKE text | [NOT] BETWEEN value AND value | IS [NOT] NULL
    value    = text | number | TRUE | FALSE | [DATE | TIMESTAMP | TIME] text

Comparisons are exact: a number between two values of a column is neither of them. A time is a
number too: the days, or parts of a second, that have passed since 1970 or midnight.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

import pyarrow as pa

from nvembed.core.errors import ConfigError
from nvembed.index.fields import JSON, describe, is_number, is_text

MAX_CHARS = 2000
_MAX_DEPTH = 40
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
  | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?!\w)
  | (?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`)
  | (?P<word>[^\W\d]\w*(?:\.\w+)*)
  | (?P<sign><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
_COMPARISONS = {"==": "=", "!=": "<>"} | {s: s for s in ("=", "<>", "<", "<=", ">", ">=")}
_TIMES = ("date", "timestamp", "time")
_KEYWORDS = {"and", "or", "not", "in", "like", "between", "is", "null", "true", "false"}
_EXAMPLES = {
    "text": "such as 'en'",
    "number": "such as 2000",
    "boolean": "true or false",
    "date": "such as '2024-06-01'",
    "timestamp": "such as '2024-06-01 12:30:00'",
    "timestamp with a zone": "such as '2024-06-01T12:30:00Z'",
    "time": "such as '12:30:00'",
}
_Token = tuple[str, str, int]  # kind, text, column from 1


def where_sql(
    expression: str, fields: Mapping[str, pa.DataType], columns: Mapping[str, str] | None = None
) -> str:
    """Check a filter and write it as SQL; one that nothing can ever pass is a ``ConfigError``.

    As in SQL, a test of a field that a document lacks is neither true nor false, and such a
    document is left out, by ``NOT`` too. ``columns`` are those of the table by field, if others.
    """
    if len(expression) > MAX_CHARS:
        raise _error(f"a filter of {len(expression)} characters", f"{MAX_CHARS}")
    return _Parser(_tokens(expression), fields, columns or {}).parse()


def _error(problem: str, expected: str | None = None, hint: str | None = None) -> ConfigError:
    return ConfigError(problem, where="where", expected=expected, hint=hint)


def _tokens(expression: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    end = len(expression.rstrip())
    while position < end:
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _error(
                f"cannot be read from column {position + 1} on: {expression[position:][:20]!r}",
                "such as: year > 2000 AND lang = 'en'",
            )
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind], match.start(kind) + 1))
        position = match.end()
    return [*tokens, ("end", "", end + 1)]


class _Parser:
    def __init__(
        self, tokens: list[_Token], fields: Mapping[str, pa.DataType], columns: Mapping[str, str]
    ) -> None:
        self._tokens, self._fields, self._columns = tokens, fields, columns
        self._next = 0
        self._depth = 0

    def parse(self) -> str:
        sql = self._either()
        if self._peek()[0] != "end":
            raise self._wrong("AND, OR or the end")
        return sql

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][1]

    def _took(self, *wanted: str) -> bool:
        """Take a sign or a keyword, where it is the next."""
        kind, text, _ = self._peek()
        found = kind in ("word", "sign") and text.lower() in wanted
        self._next += found
        return found

    def _expect(self, wanted: str) -> None:
        if not self._took(wanted):
            raise self._wrong(wanted.upper())

    def _wrong(self, expected: str) -> ConfigError:
        kind, text, column = self._peek()
        return _error(f"{'the end' if kind == 'end' else repr(text)} at column {column}", expected)

    def _either(self) -> str:
        return self._joined("or", lambda: self._joined("and", self._one))

    def _joined(self, word: str, part: Callable[[], str]) -> str:
        parts = [part()]
        while self._took(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else f"({f' {word.upper()} '.join(parts)})"

    def _one(self) -> str:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _error("nested too deeply")
        if self._took("not"):
            sql = f"(NOT {self._one()})"
        elif self._took("("):
            sql = self._either()
            self._expect(")")
        else:
            sql = self._test()
        self._depth -= 1
        return sql

    def _test(self) -> str:
        name = self._field()
        type, column = self._fields[name], f"`{self._columns.get(name, name)}`"
        kind, sign, _ = self._peek()
        if kind == "sign" and sign in _COMPARISONS:
            self._take()
            return f"({column} {self._compared(_COMPARISONS[sign], type, name)})"
        if self._took("is"):
            negated = "NOT " if self._took("not") else ""
            self._expect("null")
            return f"({column} IS {negated}NULL)"
        negated = "NOT " if self._took("not") else ""
        if self._took("in"):
            self._expect("(")
            values = [self._compared("=", type, name)[2:]]
            while self._took(","):
                values.append(self._compared("=", type, name)[2:])
            self._expect(")")
            return f"({column} {negated}IN ({', '.join(values)}))"
        if self._took("like"):
            if not (is_text(type) or type == JSON):
                raise _error(f"LIKE of {name}, a {describe(type)}", "a text")
            return f"({column} {negated}LIKE {self._value(pa.string(), name)})"
        if self._took("between"):
            low = self._compared(">=", type, name)
            self._expect("and")
            high = self._compared("<=", type, name)
            if low.startswith(">= ") and high.startswith("<= "):
                return f"({column} {negated}BETWEEN {low[3:]} AND {high[3:]})"
            both = f"(({column} {low}) AND ({column} {high}))"
            return f"(NOT {both})" if negated else both
        if pa.types.is_boolean(type) and not negated:
            return f"({column} = TRUE)"
        raise self._wrong("=, !=, <, <=, >, >=, IN, LIKE, BETWEEN or IS NULL")

    def _field(self) -> str:
        kind, text, _ = self._peek()
        if kind not in ("word", "quoted") or (kind == "word" and text.lower() in _KEYWORDS):
            raise self._wrong("a field")
        self._take()
        name = text[1:-1].replace(2 * text[0], text[0]) if kind == "quoted" else text
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, n=1) or sorted(self._fields)
            raise _error(
                f"no field {name!r} in the database",
                ", ".join(near[:20]) + (", …" if len(near) > 20 else ""),
                'Texts stand in single quotes, names with other signs in double: "my-field"',
            )
        return name

    def _compared(self, sign: str, type: pa.DataType, name: str) -> str:
        """Read the value that a field is compared with by a sign, and write both."""
        value = self._value(type, name)
        if isinstance(value, str):
            return f"{sign} {value}"
        if sign not in ("=", "<>"):
            return _bounded(sign, value, type)
        values = _numbers_of(type)
        if values is not None and not (value.denominator == 1 and value.numerator in values):
            raise _error(
                f"{name}, a {describe(type)} ({type}), is never {self._tokens[self._next - 1][1]}",
                "a value that the field can have, or < or >",
            )
        return f"{sign} {_literal(value, type)}"

    def _value(self, type: pa.DataType, name: str) -> str | Fraction:
        """Read a text or truth as SQL, or a number; a time is the number of its parts."""
        kind, text, _ = self._peek()
        if kind == "text" and is_text(type):
            return self._take()
        if kind == "word" and pa.types.is_boolean(type) and text.lower() in ("true", "false"):
            return self._take().upper()
        if kind == "number" and is_number(type):
            self._take()
            if len(text) > 400:
                raise _error(f"a number of {len(text)} characters")
            mantissa, _, exponent = text.lower().partition("e")
            power = max(-5000, min(5000, int(exponent or 0)))
            number = Fraction(mantissa) * Fraction(10) ** power
            return number * 10**type.scale if pa.types.is_decimal(type) else number
        if is_number(type) or describe(type) in _TIMES:
            self._took(*_TIMES)
            kind, text, _ = self._peek()
        if kind == "text" and describe(type) in _TIMES:
            try:
                found = _parse_time(text[1:-1].strip(), type)
            except (ValueError, OverflowError):
                raise self._unfit(type, name) from None
            self._take()
            return found
        raise self._unfit(type, name)

    def _unfit(self, type: pa.DataType, name: str) -> ConfigError:
        kind = describe(type)
        if kind == "timestamp" and type.tz is not None:
            kind = "timestamp with a zone"
        if kind not in _EXAMPLES:
            expected = "LIKE or IS NULL" if type == JSON else "IS NULL"
            return _error(f"{name}, a {kind}, cannot be compared", expected)
        return self._wrong(f"a {kind} for {name}, {_EXAMPLES[kind]}")


# --- Literals of SQL, exact to the last digit -----------------------------------------------------

_LEAST = -(2**63)  # of 64 bits, whose sign the engine does not read as part of a literal
_UNITS = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EPOCH = datetime.datetime(1970, 1, 1)
_FINER = re.compile(r"(\.\d{6})(\d{1,3})(?!\d)")  # nanoseconds, which datetime does not read


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
    word = "Float" if pa.types.is_floating(type) else "Date" if pa.types.is_date(type) else "Int"
    return f"{'U' if pa.types.is_unsigned_integer(type) else ''}{word}{type.bit_width}"


def _literal(number: Fraction, type: pa.DataType) -> str:
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
    whole = f"arrow_cast('{number}', 'Int64')" if number == _LEAST else str(number)
    return whole if pa.types.is_integer(type) else f"arrow_cast({whole}, '{sql_type(type)}')"


def _numbers_of(type: pa.DataType) -> range | None:
    """The numbers that a column may hold, as of ``_literal``; None of floats."""
    if pa.types.is_floating(type):
        return None
    if pa.types.is_decimal(type):
        return range(1 - 10**type.precision, 10**type.precision)
    if pa.types.is_unsigned_integer(type):
        return range(2**type.bit_width)
    return range(-(2 ** (type.bit_width - 1)), 2 ** (type.bit_width - 1))


def _bounded(sign: str, number: Fraction, type: pa.DataType) -> str:
    """A comparison by ``< <= > >=`` with a number that may lie beside the values of the type."""
    values, below = _numbers_of(type), sign.startswith("<")
    if values is not None:
        whole = math.floor(number) if below else math.ceil(number)
        if whole < values[0]:  # all values are above it
            sign, whole = ("<" if below else ">="), values[0]
        elif whole > values[-1]:
            sign, whole = ("<=" if below else ">"), values[-1]
        elif whole != number:
            sign = f"{sign[0]}="
        number = Fraction(whole)
    return f"{sign} {_literal(number, type)}"


def _parse_time(text: str, type: pa.DataType) -> Fraction:
    """Days or parts of a second; a ``ValueError`` where the type has a zone and the text none."""
    below = Fraction(0)
    if finer := _FINER.search(text):
        below = Fraction(int(finer[2].ljust(3, "0")), 10**9)
        text = text[: finer.end(1)] + text[finer.end() :]
    zone = None
    if pa.types.is_date(type):
        day = datetime.date.fromisoformat(text)
        moment = datetime.datetime.combine(day, datetime.time())
    elif pa.types.is_time(type):
        moment = datetime.datetime.combine(_EPOCH, datetime.time.fromisoformat(text))
    else:
        moment, zone = datetime.datetime.fromisoformat(text), type.tz
        if moment.tzinfo is None and zone in ("UTC", "Z", "+00:00"):
            moment = moment.replace(tzinfo=datetime.UTC)
    if (moment.tzinfo is None) is not (zone is None):
        raise ValueError(text)
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    passed = Fraction((moment - _EPOCH) // datetime.timedelta(microseconds=1), 10**6) + below
    if pa.types.is_date(type):
        return passed / 86_400 if type == pa.date32() else passed * 1000
    return passed * _PER_SECOND[type.unit]
