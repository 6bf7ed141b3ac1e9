"""Filters over the fields of documents: ``year > 2000 AND lang IN ('en', 'de')``.

In: an expression; out: SQL in which every name is a known column, every value a literal of the
column's type. Nothing of the expression reaches the database as it was written.

    either   = both {OR both}
    both     = one {AND one}
    one      = NOT one | "(" either ")" | field [test]
    test     = (= | != | <> | < | <= | > | >=) value | [NOT] IN "(" value {"," value} ")"
             | [NOT] LIKE text | [NOT] BETWEEN value AND value | IS [NOT] NULL
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Literal

from nvembed.core.errors import ConfigError

FieldType = Literal["text", "number", "boolean"]

MAX_CHARS = 2000
_MAX_DEPTH = 40
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
  | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?!\w)
  | (?P<quoted>"[^"`]+"|`[^"`]+`)
  | (?P<word>[^\W\d]\w*)
  | (?P<sign><=|>=|<>|!=|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
_COMPARISONS = {"=": "=", "==": "=", "!=": "<>", "<>": "<>"} | {
    s: s for s in ("<", "<=", ">", ">=")
}
_KEYWORDS = {"and", "or", "not", "in", "like", "between", "is", "null", "true", "false"}
_Token = tuple[str, str, int]  # kind, text, column from 1


def where_sql(expression: str, fields: Mapping[str, FieldType]) -> str:
    """Check a filter and write it as SQL.

    As in SQL, a test of a field that a document lacks is neither true nor false, and such a
    document is left out, by ``NOT`` too; ``IS NULL`` finds it.

    Args:
        expression: see the top of this file.
        fields: the columns and what they hold.

    Raises:
        ConfigError: it is none, or names a field that is not there, or compares it with a value of
            another kind.
    """
    if len(expression) > MAX_CHARS:
        raise ConfigError(
            f"a filter of {len(expression)} characters", where="where", expected=f"{MAX_CHARS}"
        )
    return _Parser(expression, fields).parse()


class _Parser:
    def __init__(self, expression: str, fields: Mapping[str, FieldType]) -> None:
        self._fields = fields
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
        kind, column = self._fields[name], f"`{name}`"
        if self._peek()[1] in _COMPARISONS and self._peek()[0] == "sign":
            return f"({column} {_COMPARISONS[self._take()[1]]} {self._value(kind, name)})"
        if self._take_word("is"):
            negated = "NOT " if self._take_word("not") else ""
            self._expect_word("null")
            return f"({column} IS {negated}NULL)"
        negated = "NOT " if self._take_word("not") else ""
        if self._take_word("in"):
            self._expect_sign("(")
            values = [self._value(kind, name)]
            while self._take_sign(","):
                values.append(self._value(kind, name))
            self._expect_sign(")")
            return f"({column} {negated}IN ({', '.join(values)}))"
        if self._take_word("like"):
            if kind != "text":
                raise ConfigError(f"LIKE of {name}, a {kind}", where="where", expected="a text")
            return f"({column} {negated}LIKE {self._value(kind, name)})"
        if self._take_word("between"):
            low = self._value(kind, name)
            self._expect_word("and")
            return f"({column} {negated}BETWEEN {low} AND {self._value(kind, name)})"
        if kind == "boolean" and not negated:
            return f"({column} = TRUE)"
        raise self._wrong("=, !=, <, <=, >, >=, IN, LIKE, BETWEEN or IS NULL")

    def _field(self) -> str:
        kind, text, _ = self._peek()
        if kind not in ("word", "quoted") or (kind == "word" and text.lower() in _KEYWORDS):
            raise self._wrong("a field")
        self._take()
        name = text[1:-1] if kind == "quoted" else text
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, n=1) or sorted(self._fields)
            raise ConfigError(
                f"no field {name!r} in the database",
                where="where",
                expected=", ".join(near[:20]),
                hint='Texts stand in single quotes, names with other signs in double: "my-field"',
            )
        return name

    def _value(self, kind: FieldType, name: str) -> str:
        got, text, _ = self._peek()
        if got == "text" and kind == "text":
            return self._take()[1]
        if got == "number" and kind == "number":
            # A decimal point makes it a float, as the column is; 1e400 would be infinite.
            return repr(float(self._take()[1])).replace("inf", "1e308")
        if got == "word" and kind == "boolean" and text.lower() in ("true", "false"):
            return self._take()[1].upper()
        example = {"text": "such as 'en'", "number": "such as 2000", "boolean": "true or false"}
        raise self._wrong(f"a {kind} for {name}, {example[kind]}")

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
