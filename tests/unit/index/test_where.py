"""Filters: what they let through against plain Python, and what they refuse."""

from __future__ import annotations

import pyarrow as pa
import pytest

from nvembed.core.errors import ConfigError
from nvembed.index.where import where_sql

FIELDS = {
    "year": pa.float64(),
    "lang": pa.string(),
    "open": pa.bool_(),
    "my-field": pa.string(),
}


@pytest.mark.parametrize(
    ("expression", "sql"),
    [
        ("year > 2000", "(`year` > 2000.0)"),
        ("year == -1.5e3", "(`year` = -1500.0)"),
        (
            "year < 1e400 or year > -1e400",
            "((`year` < arrow_cast('inf', 'Float64')) OR (`year` > arrow_cast('-inf', 'Float64')))",
        ),
        ("lang = 'it''s'", "(`lang` = 'it''s')"),
        ("open", "(`open` = TRUE)"),
        ("NOT open", "(NOT (`open` = TRUE))"),
        ("open != false", "(`open` <> FALSE)"),
        ("lang not in ('a','b')", "(`lang` NOT IN ('a', 'b'))"),
        ("lang LIKE 'a%'", "(`lang` LIKE 'a%')"),
        ('"my-field" is not null', "(`my-field` IS NOT NULL)"),
        ("`my-field` is null", "(`my-field` IS NULL)"),
        (
            "year between 1 and 2 and lang='a' or open",
            "(((`year` BETWEEN 1.0 AND 2.0) AND (`lang` = 'a')) OR (`open` = TRUE))",
        ),
        ("(open or open) and open", "(((`open` = TRUE) OR (`open` = TRUE)) AND (`open` = TRUE))"),
    ],
)
def test_sql(expression, sql):
    assert where_sql(expression, FIELDS) == sql


def test_many_tests_side_by_side_are_not_nested():
    sql = where_sql(" or ".join(["(not open)"] * 100), FIELDS)
    assert sql == "(" + " OR ".join(["(NOT (`open` = TRUE))"] * 100) + ")"
    deep = "(" * 15 + "open" + ")" * 15
    assert where_sql(f"{deep} and {deep}", FIELDS) == "((`open` = TRUE) AND (`open` = TRUE))"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "where: the end at column 1; expected a field"),
        ("yaer > 2000", "no field 'yaer' in the database; expected year"),
        ("year > '2000'", "at column 8; expected a number for year"),
        ("lang = 3", "expected a text for lang, such as 'en'"),
        ("lang = en", "'en' at column 8; expected a text"),
        ('lang = "en"', "expected a text"),
        ("year > 1; DROP TABLE documents", "cannot be read from column 9"),
        ("year > 1 -- x", "cannot be read"),
        ("year > 1 OR 1=1", "'1' at column 13; expected a field"),
        ("length(lang) > 1", "no field 'length'"),
        ("lang = 'a' 'b'", "expected AND, OR or the end"),
        ("lang = 'a", "cannot be read"),
        ("(year > 1", "expected )"),
        ("year like '2%'", "LIKE of year, a number"),
        ("year", "expected =, !="),
        ("year > 1x", "cannot be read from column 7"),
        ("(" * 50 + "open" + ")" * 50, "nested too deeply"),
        ("open or " * 400 + "open", "a filter of 3204 characters"),
        ("`ye``ar` > 1", "no field 'ye`ar'"),
    ],
)
def test_refused(expression, message):
    with pytest.raises(ConfigError) as error:
        where_sql(expression, FIELDS)
    assert message in str(error.value)
