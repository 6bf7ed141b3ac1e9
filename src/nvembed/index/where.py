"""Filters over the fields of documents: ``year > 2000 AND day < '2024-06-01'``.

In: an expression; out: SQL in which every name is a known column, every value a literal of the
column's type. Nothing of the expression reaches the database as it was written.

    either   = both {OR both}
    both     = one {AND one}
    one      = NOT one | "(" either ")" | field [test]
    test     = (= | != | <> | < | <= | > | >=) value | [NOT] IN "(" value {"," value} ")"
             | [NOT] LIKE text | [NOT] BETWEEN value AND value | IS [NOT] NULL
    value    = text | number | TRUE | FALSE | [DATE | TIMESTAMP | TIME] text

Comparisons are exact: a number between two values of a column is neither of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from fractions import Fraction

import pyarrow as pa

from nvembed.core.errors import ConfigError
from nvembed.index.fields import JSON, describe, is_number, is_text
from nvembed.index.literals import bounded, column_numbers, is_ordered, parse_time, sql_number

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
_COMPARISONS = {"=": "=", "==": "=", "!=": "<>", "<>": "<>"} | {
    s: s for s in ("<", "<=", ">", ">=")
}
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
    expression: str,
    fields: Mapping[str, pa.DataType],
    columns: Mapping[str, str] | None = None,
) -> str:
    """Check a filter and write it as SQL.

    As in SQL, a test of a field that a document lacks is neither true nor false, and such a
    document is left out, by ``NOT`` too; ``IS NULL`` finds it.

    Args:
        expression: see the top of this file.
        fields: what may be named, and the Arrow types.
        columns: of the table, by field, where they are not called like it.

    Raises:
        ConfigError: it is none, or names a field that is not there, or compares it with a value
            that it can never have.
    """
    if len(expression) > MAX_CHARS:
        raise ConfigError(
            f"a filter of {len(expression)} characters", where="where", expected=f"{MAX_CHARS}"
        )
    return _Parser(expression, fields, columns or {}).parse()


class _Parser:
    def __init__(
        self, expression: str, fields: Mapping[str, pa.DataType], columns: Mapping[str, str]
    ) -> None:
        self._fields = fields
        self._columns = columns
        self._tokens = _tokens(expression)
        self._next = 0
        self._depth = 0

    def parse(self) -> str:
        sql = self._either()
        if self._peek()[0] != "end":
            raise self._wrong("AND, OR or the end")
        return sql

    def _either(self) -> str:
        parts = [self._both()]
        while self._take_word("or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def _both(self) -> str:
        parts = [self._one()]
        while self._take_word("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else f"({' AND '.join(parts)})"

    def _one(self) -> str:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ConfigError("nested too deeply", where="where")
        if self._take_word("not"):
            sql = f"(NOT {self._one()})"
        elif self._take_sign("("):
            sql = self._either()
            self._expect_sign(")")
        else:
            sql = self._test()
        self._depth -= 1
        return sql

    def _test(self) -> str:
        name = self._field()
        type, column = self._fields[name], f"`{self._columns.get(name, name)}`"
        if self._peek()[1] in _COMPARISONS and self._peek()[0] == "sign":
            return self._compared(column, _COMPARISONS[self._take()[1]], type, name)
        if self._take_word("is"):
            negated = "NOT " if self._take_word("not") else ""
            self._expect_word("null")
            return f"({column} IS {negated}NULL)"
        negated = "NOT " if self._take_word("not") else ""
        if self._take_word("in"):
            self._expect_sign("(")
            values = [self._equal(type, name)]
            while self._take_sign(","):
                values.append(self._equal(type, name))
            self._expect_sign(")")
            return f"({column} {negated}IN ({', '.join(values)}))"
        if self._take_word("like"):
            if not (is_text(type) or type == JSON):
                raise ConfigError(
                    f"LIKE of {name}, a {describe(type)}", where="where", expected="a text"
                )
            return f"({column} {negated}LIKE {self._equal(pa.string(), name)})"
        if self._take_word("between"):
            return self._between(column, negated, type, name)
        if pa.types.is_boolean(type) and not negated:
            return f"({column} = TRUE)"
        raise self._wrong("=, !=, <, <=, >, >=, IN, LIKE, BETWEEN or IS NULL")

    def _compared(self, column: str, sign: str, type: pa.DataType, name: str) -> str:
        if sign in ("=", "<>") or not is_ordered(type):
            return f"({column} {sign} {self._equal(type, name)})"
        return f"({column} {bounded(sign, self._number(type, name), type)})"

    def _between(self, column: str, negated: str, type: pa.DataType, name: str) -> str:
        if not is_ordered(type):
            low = self._equal(type, name)
            self._expect_word("and")
            return f"({column} {negated}BETWEEN {low} AND {self._equal(type, name)})"
        low_number = self._number(type, name)
        self._expect_word("and")
        low, high = (
            bounded(sign, number, type)
            for sign, number in ((">=", low_number), ("<=", self._number(type, name)))
        )
        if low.startswith(">= ") and high.startswith("<= "):
            return f"({column} {negated}BETWEEN {low[3:]} AND {high[3:]})"
        both = f"(({column} {low}) AND ({column} {high}))"
        return f"(NOT {both})" if negated else both

    def _field(self) -> str:
        kind, text, _ = self._peek()
        if kind not in ("word", "quoted") or (kind == "word" and text.lower() in _KEYWORDS):
            raise self._wrong("a field")
        self._take()
        name = text[1:-1].replace(2 * text[0], text[0]) if kind == "quoted" else text
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, n=1) or sorted(self._fields)
            raise ConfigError(
                f"no field {name!r} in the database",
                where="where",
                expected=", ".join(near[:20]) + (", …" if len(near) > 20 else ""),
                hint='Texts stand in single quotes, names with other signs in double: "my-field"',
            )
        return name

    def _equal(self, type: pa.DataType, name: str) -> str:
        """Read a value that a field is compared with for equality, or a text or truth."""
        got, text, _ = self._peek()
        if got == "text" and is_text(type):
            return self._take()[1]
        if got == "word" and pa.types.is_boolean(type) and text.lower() in ("true", "false"):
            return self._take()[1].upper()
        if not is_ordered(type):
            raise self._unfit(type, name)
        number, values = self._number(type, name), column_numbers(type)
        if values is not None and not (number.denominator == 1 and number.numerator in values):
            raise ConfigError(
                f"{name}, a {describe(type)} ({type}), is never {self._tokens[self._next - 1][1]}",
                where="where",
                expected="a value that the field can have, or < or >",
            )
        return sql_number(number, type)

    def _number(self, type: pa.DataType, name: str) -> Fraction:
        """Read a number, or a time as so many days or parts of a second since its zero."""
        got, text, _ = self._peek()
        if got == "number" and is_number(type):
            self._take()
            if len(text) > 400:
                raise ConfigError(f"a number of {len(text)} characters", where="where")
            mantissa, _, exponent = text.lower().partition("e")
            power = max(-5000, min(5000, int(exponent or 0)))
            number = Fraction(mantissa) * Fraction(10) ** power
            return number * 10**type.scale if pa.types.is_decimal(type) else number
        if got == "word" and text.lower() in ("date", "timestamp", "time"):
            self._take()
            got, text, _ = self._peek()
        if got == "text" and pa.types.is_temporal(type):
            try:
                found = parse_time(text[1:-1].strip(), type)
            except ValueError:
                raise self._unfit(type, name) from None
            self._take()
            return found
        raise self._unfit(type, name)

    def _unfit(self, type: pa.DataType, name: str) -> ConfigError:
        kind = describe(type)
        if kind == "timestamp" and type.tz is not None:
            kind = "timestamp with a zone"
        example = _EXAMPLES.get(kind)
        if example is None:
            return ConfigError(
                f"{name}, a {kind}, cannot be compared",
                where="where",
                expected="LIKE or IS NULL" if type == JSON else "IS NULL",
            )
        return self._wrong(f"a {kind} for {name}, {example}")

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _take_word(self, word: str) -> bool:
        found = self._peek()[0] == "word" and self._peek()[1].lower() == word
        self._next += found
        return found

    def _take_sign(self, sign: str) -> bool:
        found = self._peek()[:2] == ("sign", sign)
        self._next += found
        return found

    def _expect_word(self, word: str) -> None:
        if not self._take_word(word):
            raise self._wrong(word.upper())

    def _expect_sign(self, sign: str) -> None:
        if not self._take_sign(sign):
            raise self._wrong(sign)

    def _wrong(self, expected: str) -> ConfigError:
        kind, text, column = self._peek()
        found = "the end" if kind == "end" else repr(text)
        return ConfigError(f"{found} at column {column}", where="where", expected=expected)


def _tokens(expression: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    end = len(expression.rstrip())
    while position < end:
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ConfigError(
                f"cannot be read from column {position + 1} on: {expression[position:][:20]!r}",
                where="where",
                expected="such as: year > 2000 AND lang = 'en'",
            )
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind], match.start(kind) + 1))
        position = match.end()
    return [*tokens, ("end", "", end + 1)]
