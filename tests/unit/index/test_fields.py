"""Fields end to end: what a file holds comes back from the database, and filters find it."""

from __future__ import annotations

import datetime as dt
import json
import operator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_jsonl
from nvembed.index.build import IndexOptions, IndexReport, index_documents
from nvembed.index.database import Database
from nvembed.index.fields import (
    JSON,
    Misfit,
    column_name,
    field_name,
    kept_value,
    plain,
    type_of_texts,
    wider_type,
)

UTC = dt.UTC


def index(folder: Path, *files: Path, **options: Any) -> IndexReport:
    return index_documents(
        folder / "db", files, model=HashEncoder(8), options=IndexOptions(**options)
    )


def fields_of(folder: Path) -> dict[str, dict[str, Any]]:
    database = Database.open(folder / "db")
    rows = database.get("id", [str(n) for n in range(200)])
    return {row["id"]: row["fields"] for row in rows}


def parquet(folder: Path, columns: dict[str, pa.Array], name: str = "docs.parquet") -> Path:
    count = len(next(iter(columns.values())))
    ids = {"id": [str(n) for n in range(count)], "text": [f"text {n}" for n in range(count)]}
    pq.write_table(pa.table(ids | columns), folder / name)
    return folder / name


MOMENT = dt.datetime(2024, 2, 29, 12, 30, 5, 678901)
TYPED = {
    "bool": pa.array([True, False, None]),
    "int8": pa.array([1, -128, None], pa.int8()),
    "uint64": pa.array([2**64 - 1, 0, None], pa.uint64()),
    "int64": pa.array([2**53 + 1, -(2**63), None]),
    "float16": pa.array([0.5, None, None], pa.float16()),
    "float32": pa.array([0.5, 2.5, None], pa.float32()),
    "float64": pa.array([0.1, float("inf"), None]),
    "decimal": pa.array([Decimal("1.50"), Decimal("-99999999.99"), None], pa.decimal128(10, 2)),
    "long decimal": pa.array([Decimal("1" * 40 + ".5"), None, None], pa.decimal256(50, 2)),
    "date": pa.array([MOMENT.date(), dt.date(1, 1, 1), None]),
    "date64": pa.array([MOMENT.date(), dt.date(1900, 1, 1), None], pa.date64()),
    "seconds": pa.array([MOMENT.replace(microsecond=0), None, None], pa.timestamp("s")),
    "moment": pa.array([MOMENT, dt.datetime(1900, 1, 1), None]),
    "utc": pa.array([MOMENT.replace(tzinfo=UTC), None, None], pa.timestamp("us", "UTC")),
    "zone": pa.array([MOMENT.replace(tzinfo=UTC), None, None], pa.timestamp("us", "Asia/Kolkata")),
    "time": pa.array([dt.time(1, 2, 3, 4), dt.time(0), None]),
    "time32": pa.array([dt.time(1, 2, 3), dt.time(0), None], pa.time32("s")),
    "duration": pa.array([dt.timedelta(days=1, microseconds=7), None, None]),
    "binary": pa.array([b"\x00\xff", b"", None]),
    "fixed": pa.array([b"ab", b"cd", None], pa.binary(2)),
    "large": pa.array(["é", "", None], pa.large_string()),
    "list": pa.array([["a", None], [], None]),
    "lists": pa.array([[[1], []], [], None]),
    "vector": pa.array([[1.0, 2.0], None, None], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": 1, "b": [MOMENT]}, {"a": None, "b": []}, None]),
}  # fmt: skip


def test_arrow_types_end_to_end(tmp_path: Path) -> None:
    index(tmp_path, parquet(tmp_path, TYPED))
    database = Database.open(tmp_path / "db")
    stored = pq.read_schema(tmp_path / "docs.parquet")  # which has no seconds, but milliseconds
    assert database.fields == {name: stored.field(name).type for name in TYPED}
    found = fields_of(tmp_path)
    for number in range(3):
        row = {name: array[number].as_py() for name, array in TYPED.items()}
        assert found[str(number)] == {n: value for n, value in row.items() if value is not None}
    report = index(tmp_path, tmp_path / "docs.parquet")
    assert (report.unchanged, report.updated) == (3, 0)
    for name in TYPED:
        assert database.count(f'"{name}" IS NULL') == TYPED[name].null_count
    json.dumps({n: plain(v) for n, v in found["1"].items()}, allow_nan=False)


def test_lists_and_objects_of_nothing(tmp_path: Path) -> None:
    nothing = {"l": pa.array([[], None]), "o": pa.array([{"a": None, "b": 1}, None])}
    nothing["nan"] = pa.array([[float("nan")], None])
    index(tmp_path, parquet(tmp_path, nothing))
    found = fields_of(tmp_path)
    assert (found["0"]["l"], found["0"]["o"], found["1"]) == ([], {"a": None, "b": 1}, {})
    assert index(tmp_path, tmp_path / "docs.parquet").unchanged == 2


def test_other_codings_are_kept_as_their_values(tmp_path: Path) -> None:
    categories = [f"c{n}" for n in range(120)]
    coded = pa.DictionaryArray.from_arrays(pa.array(range(120), pa.int8()), categories)
    more = pa.DictionaryArray.from_arrays(
        pa.array(range(120), pa.int8()), [f"d{n}" for n in range(120)]
    )
    pairs = pa.array([[("k", 1)], *[None] * 119], pa.map_(pa.string(), pa.int8()))
    index(tmp_path, parquet(tmp_path, {"kind": coded, "empty": pa.nulls(120), "pairs": pairs}))
    assert fields_of(tmp_path)["0"] == {"kind": "c0", "pairs": [{"key": "k", "value": 1}]}
    pq.write_table(
        pa.table({"id": [f"n{n}" for n in range(120)], "text": categories, "kind": more}),
        tmp_path / "more.parquet",
    )
    index(tmp_path, tmp_path / "more.parquet")  # together more categories than 8 bits count
    database = Database.open(tmp_path / "db")
    assert database.fields["kind"] == pa.string()
    assert "empty" not in database.fields
    assert database.count("kind = 'c7'") == database.count("kind = 'd7'") == 1


VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any], Any]] = {
    "int8": (pa.int8(), st.integers(-128, 127), str),
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1), str),
    "uint64": (pa.uint64(), st.integers(0, 2**64 - 1), str),
    "float": (pa.float64(), st.floats(allow_nan=False, allow_infinity=False), repr),
    "decimal": (pa.decimal128(20, 3), st.decimals(-(10**16), 10**16, places=3), "{:f}".format),
    "date": (pa.date32(), st.dates(), "'{}'".format),
    "moment": (pa.timestamp("us"), st.datetimes(), "'{}'".format),
    "nano": (
        pa.timestamp("ns"),
        st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1)),
        "timestamp '{}'".format,
    ),
    "utc": (
        pa.timestamp("ms", "UTC"),
        st.datetimes(dt.datetime(2, 1, 1), dt.datetime(9998, 1, 1)).map(
            lambda t: t.replace(microsecond=t.microsecond // 1000 * 1000, tzinfo=UTC)
        ),
        "'{}'".format,
    ),
    "time": (pa.time64("us"), st.times(), "time '{}'".format),
    "word": (
        pa.string(),
        st.text(max_size=4).filter(str.isprintable),
        lambda v: "'" + v.replace("'", "''") + "'",
    ),
}  # fmt: skip
SIGNS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
         ">": operator.gt, ">=": operator.ge}  # fmt: skip


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_values_come_back_and_filters_are_python(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fields")
    drawn = {
        name: data.draw(st.lists(st.none() | values, min_size=4, max_size=4), label=name)
        for name, (_, values, _) in VALUES.items()
    }
    columns = {name: pa.array(drawn[name], VALUES[name][0]) for name in VALUES}
    index(folder, parquet(folder, columns))
    found = fields_of(folder)
    database = Database.open(folder / "db")
    for name, (_, _, literal) in VALUES.items():
        there = {n: value for n, value in enumerate(drawn[name]) if value is not None}
        assert {n: found[str(n)].get(name) for n in there} == there
        if not there:
            continue
        sign = data.draw(st.sampled_from(sorted(SIGNS)))
        asked = next(iter(there.values()))
        where = f"{name} {sign} {literal(asked)}"
        passing = sum(SIGNS[sign](value, asked) for value in there.values())
        assert database.count(where) == passing, where
        assert database.count(f"NOT ({where})") == len(there) - passing, where
        assert database.count(f"{name} IN ({literal(asked)})") == sum(
            value == asked for value in there.values()
        )


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> Database:
    folder = tmp_path_factory.mktemp("typed")
    index(folder, parquet(folder, TYPED))
    return Database.open(folder / "db")


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("int8 < 1000", 2), ("int8 > 1000", 0), ("int8 >= -1e99", 2), ("NOT (int8 < -1000)", 2),
        ("int8 > 0.5", 1), ("int8 <= -127.5", 1), ("int8 BETWEEN -1000 AND 0.5", 1),
        ("int8 NOT BETWEEN -1000 AND 1000", 0), ("int8 BETWEEN 2 AND 1000", 0),
        ("int64 = 9007199254740993", 1), ("int64 = 9007199254740992", 0),
        ("int64 = 9007199254740993.0", 1), ("uint64 = 18446744073709551615", 1),
        ("int64 = -9223372036854775808", 1), ("uint64 > -1", 2),
        ("float64 > 1e400", 0), ("float64 < 1e400", 1), ("float32 = 5e-1", 1), ("float16 = 0.5", 1),
        ("decimal = 1.5", 1), ("decimal > 1.499", 1), ("decimal < -99999999.985", 1),
        ("decimal IN (1.5, 2)", 1), ("decimal BETWEEN 1.4999 AND 1.5", 1), ("decimal < 1e99", 2),
        ("\"long decimal\" = 1111111111111111111111111111111111111111.5", 1),
        ("date = '2024-02-29'", 1), ("date > date '2024-02-28'", 1), ("date64 < '1950-01-01'", 1),
        ("date IN ('2024-02-29')", 1), ("date BETWEEN '0001-01-01' AND '2024-02-28'", 1),
        ("seconds > '2024-02-29 12:30:04.9'", 1), ("seconds < '2024-02-29 12:30:05.000000001'", 1),
        ("moment = '2024-02-29T12:30:05.678901'", 1), ("moment >= '2024-02-29'", 1),
        ("utc = '2024-02-29 12:30:05.678901'", 1), ("utc = '2024-02-29T13:30:05.678901+01:00'", 1),
        ("zone = '2024-02-29T12:30:05.678901Z'", 1), ("zone < '2024-02-29T12:30:05.678901Z'", 0),
        ("time = '01:02:03.000004'", 1), ("time32 > '00:00:00.5'", 1), ("bool", 1),
        ("large = 'é'", 1), ("large LIKE ''", 1), ("struct IS NOT NULL", 2), ("vector IS NULL", 2),
    ],
)  # fmt: skip
def test_filters_by_type(typed: Database, where: str, count: int) -> None:
    assert typed.count(where) == count


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("int8 = 1.5", "int8, a number (int8), is never 1.5"),
        ("int8 = 1000", "is never 1000"),
        ("int8 IN (1, 1000)", "is never 1000"),
        ("uint64 = -1", "is never -1"),
        ("decimal = 1.501", "decimal, a number (decimal128(10, 2)), is never 1.501"),
        ("seconds = '2024-02-29 12:30:05.0005'", "is never '2024-02-29 12:30:05.0005'"),
        ("int8 = '1'", "expected a number for int8"),
        ("date = 2024", "expected a date for date, such as '2024-06-01'"),
        ("date = '29.2.2024'", "expected a date for date"),
        ("date > 'soon'", "expected a date"),
        ("moment > '2024-02-29T00:00:00Z'", "expected a timestamp for moment"),
        ("zone > '2024-02-29'", "a timestamp with a zone for zone, such as '2024-06-01T12:30:00Z'"),
        ("time > '2024-02-29'", "expected a time"),
        ("date LIKE '2024%'", "LIKE of date, a date"),
        ("list = 'a'", "list, a list<item: string>, cannot be compared; expected IS NULL"),
        ("binary = 'a'", "binary, a binary, cannot be compared"),
        ("duration > 5", "cannot be compared"),
        ("struct > 1", "cannot be compared"),
        ("dat = '2024-02-29'", "no field 'dat' in the database; expected date"),
    ],
)
def test_filters_that_could_never_match(typed: Database, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed.count(where)
    assert message in str(caught.value)


NAMES = ["日本", "a.b", "", "__index_level_0__", "_rowid", "_score", "vector", "text_hash", "a%2Eb",
         "%", "q`x", 'q"x', "it's", " ", "Year", "year", "a\nb", "x%~2", "_id"]  # fmt: skip


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    assert len({column_name(name).lower() for name in NAMES if name != "Year"}) == len(NAMES) - 1
    assert [field_name(column_name(n, g)) for n in NAMES for g in (1, 3)] == [
        (n, g) for n in NAMES for g in (1, 3)
    ]
    path = parquet(tmp_path, {n: pa.array([k, None]) for k, n in enumerate(NAMES)})
    index(tmp_path, path, columns={"id": "id"})
    assert fields_of(tmp_path) == {"0": {n: k for k, n in enumerate(NAMES)}, "1": {}}
    database = Database.open(tmp_path / "db")
    for k, name in enumerate(NAMES):
        quoted = '"' + name.replace('"', '""') + '"'
        assert database.count(f"{quoted} = {k}") == 1, name
        assert database.count(f"{quoted} = {k + 1}") == 0, name
    assert database.count("日本 = 0 AND a.b = 1") == 1


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 20))
def test_any_name_has_a_column_of_its_own(name: str, generation: int) -> None:
    column = column_name(name, generation)
    assert field_name(column) == (name, generation)
    assert not set(column) & {".", "`"}
    assert not column.startswith("_")
    assert column not in ("", "id", "text", "text_hash", "vector")


def test_csv_of_pandas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        ",text,docid,n,ratio,phone,big,mixed\n"
        "0,one,0,9007199254740993,1.5,+4912,18446744073709551615,1\n"
        "1,two,1,-9223372036854775808,2,+4913,0,x\n"
        "2,three,2,,,,,\n"
    )
    index(tmp_path, tmp_path / "a.csv")
    database = Database.open(tmp_path / "db")
    assert {name: str(type) for name, type in database.fields.items()} == {
        "Unnamed: 0": "int64", "n": "int64", "ratio": "double", "phone": "string",
        "big": "uint64", "mixed": "string",
    }  # fmt: skip
    assert fields_of(tmp_path) == {
        "0": {"Unnamed: 0": 0, "n": 2**53 + 1, "ratio": 1.5, "phone": "+4912",
              "big": 2**64 - 1, "mixed": "1"},
        "1": {"Unnamed: 0": 1, "n": -(2**63), "ratio": 2.0, "phone": "+4913",
              "big": 0, "mixed": "x"},
        "2": {"Unnamed: 0": 2},
    }  # fmt: skip
    assert database.count("n = 9007199254740993") == 1


@pytest.mark.parametrize(
    ("texts", "type"),
    [
        (["1", "2"], pa.int64()),
        (["1", str(2**63)], pa.uint64()),
        (["-1", str(2**63)], pa.string()),
        ([str(2**64)], pa.string()),
        (["1", "0.5"], pa.float64()),
        ([str(2**53 + 1), "0.5"], pa.string()),
        (["007"], pa.string()),
        (["1e5"], pa.float64()),
        (["1e999"], pa.string()),
        (["nan"], pa.string()),
        (["1" * 5000], pa.string()),
    ],
)
def test_columns_of_csv(texts: list[str], type: pa.DataType) -> None:
    assert type_of_texts(texts) == type


def test_json_values(tmp_path: Path) -> None:
    rows = [
        {"n": None, "x": 1, "tags": ["a", 1, None], "o": {"b": {"c": []}}, "f": float("nan")},
        {"n": 2**53 + 1, "x": 1.5, "tags": [], "o": None, "f": 0.5},
        {"n": 7, "x": None, "tags": {"other": "form"}, "o": {}, "f": float("inf"), "": 1},
    ]
    documents = [{"id": str(n), "text": "x"} | row for n, row in enumerate(rows)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    index(tmp_path, tmp_path / "a.jsonl")
    database = Database.open(tmp_path / "db")
    assert database.fields == {
        "n": pa.int64(), "x": pa.float64(), "tags": JSON, "o": JSON, "f": pa.float64(),
        "": pa.int64(),
    }  # fmt: skip
    rows[0]["f"] = None  # NaN is no value
    expected = [{n: v for n, v in row.items() if v is not None} for row in rows]
    assert fields_of(tmp_path) == {str(n): row for n, row in enumerate(expected)}
    assert database.count("tags LIKE '%\"a\"%'") == 1
    with pytest.raises(ConfigError, match="cannot be compared; expected LIKE or IS NULL"):
        database.count("tags = 'a'")
    assert index(tmp_path, tmp_path / "a.jsonl").unchanged == 3


def one(folder: Path, name: str, id: int, value: Any) -> Path:
    write_jsonl(folder / name, [{"id": str(id), "text": f"t{id}", "v": value}])
    return folder / name


def test_whole_numbers_get_fractions_in_a_later_run(tmp_path: Path) -> None:
    index(tmp_path, one(tmp_path, "a.jsonl", 0, 2**53))
    index(tmp_path, one(tmp_path, "b.jsonl", 1, 0.5))
    assert Database.open(tmp_path / "db").fields == {"v": pa.float64()}
    assert fields_of(tmp_path) == {"0": {"v": 2**53}, "1": {"v": 0.5}}
    assert Database.open(tmp_path / "db").count("v < 1") == 1
    assert index(tmp_path, tmp_path / "a.jsonl").unchanged == 1


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (2**53 + 1, 0.5, '"v" holds whole numbers beyond 2^53, and now fractions'),
        (0.5, 2**53 + 1, '"v" is 9007199254740993, which double, the type of the documents before'),
        (1, "late", '"v" is a text, in the documents before it a number'),
        ("late", 1, '"v" is a number, in the documents before it a text'),
        (True, 1, '"v" is a number, in the documents before it a boolean'),
        (1, True, '"v" is a boolean, in the documents before it a number'),
        ("a", ["a"], '"v" is a JSON value, in the documents before it a text'),
        (["a"], "a", '"v" is a text, in the documents before it a JSON value'),
    ],
)
def test_another_type_in_a_later_run_is_told(
    tmp_path: Path, first: Any, then: Any, message: str
) -> None:
    index(tmp_path, one(tmp_path, "a.jsonl", 0, first))
    later = one(tmp_path, "b.jsonl", 1, then)
    with pytest.raises(DataError) as caught:
        index(tmp_path, later)
    assert message in str(caught.value)
    assert fields_of(tmp_path) == {"0": {"v": first}}


def test_parquet_of_another_schema(tmp_path: Path) -> None:
    columns = {
        "n": pa.array([1], pa.int32()), "d": pa.array([Decimal("1.5")], pa.decimal128(3, 1)),
        "t": pa.array([MOMENT.replace(microsecond=0)], pa.timestamp("s")),
        "year": pa.array([2000], pa.int64()),
    }  # fmt: skip
    index(tmp_path, parquet(tmp_path, columns))
    wider = {
        "n": pa.array([2**40, 1]), "d": pa.array([Decimal("12345.678"), None]),
        "t": pa.array([MOMENT, None]), "year": pa.array([float("nan"), 1999.0]),
    }  # fmt: skip
    index(tmp_path, parquet(tmp_path, wider, "wider.parquet"))
    assert {n: str(t) for n, t in Database.open(tmp_path / "db").fields.items()} == {
        "n": "int64", "d": "decimal128(8, 3)", "t": "timestamp[us]", "year": "int64",
    }  # fmt: skip
    assert fields_of(tmp_path) == {
        "0": {"n": 2**40, "d": Decimal("12345.678"), "t": MOMENT}, "1": {"n": 1, "year": 1999},
    }  # fmt: skip
    texts = {"t": pa.array(["2024-02-29"])}
    with pytest.raises(DataError, match='"t" is a text, in the documents before it a timestamp'):
        index(tmp_path, parquet(tmp_path, texts, "texts.parquet"))


def test_a_wider_column_stands_even_if_the_former_was_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path, one(tmp_path, "a.jsonl", 0, 1))
    database = Database.open(tmp_path / "db")
    with monkeypatch.context() as killed:
        killed.setattr(Database, "_drop_former", lambda self: None)
        database.widen("v", pa.float64())
    assert Database.open(tmp_path / "db").fields == {"v": pa.float64()}
    assert fields_of(tmp_path) == {"0": {"v": 1.0}}
    index(tmp_path, one(tmp_path, "b.jsonl", 1, 0.5))
    assert fields_of(tmp_path) == {"0": {"v": 1.0}, "1": {"v": 0.5}}


def test_bad_values_are_left_out_alone(tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": "x", "v": v} for n, v in enumerate([2**53 + 1, 0.5, 3, "no"])]
    write_jsonl(tmp_path / "a.jsonl", rows)
    report = index(tmp_path, tmp_path / "a.jsonl", keep_going=True)
    assert [bad.place.rpartition(":")[2] for bad in report.skipped.first] == ["4", "1"]
    assert fields_of(tmp_path) == {"1": {"v": 0.5}, "2": {"v": 3.0}}


def test_fields_to_keep_that_are_nowhere_are_told(tmp_path: Path) -> None:
    path = one(tmp_path, "a.jsonl", 0, 1)
    report = index(tmp_path, path, fields=("v", "yaer"))
    assert report.absent_fields == {"yaer"}
    assert fields_of(tmp_path) == {"0": {"v": 1}}


@pytest.mark.parametrize(
    ("type", "value", "wider"),
    [
        (pa.int8(), 200, pa.int64()), (pa.uint8(), 300, pa.uint64()), (pa.uint8(), -1, pa.int64()),
        (pa.uint64(), -1, pa.float64()), (pa.int64(), 0.5, pa.float64()), (pa.int64(), "a", None),
        (pa.int64(), Decimal("0.5"), None), (pa.float32(), 0.1, pa.float64()),
        (pa.decimal128(3, 1), 12345, pa.decimal128(6, 1)),
        (pa.decimal128(38, 0), Decimal("0.5"), pa.decimal256(39, 1)),
        (pa.decimal128(3, 1), 0.55, None), (pa.date32(), MOMENT, None),
        (pa.timestamp("s", "UTC"), MOMENT, None), (pa.bool_(), 1, None),
    ],
)  # fmt: skip
def test_wider_types(type: pa.DataType, value: Any, wider: pa.DataType | None) -> None:
    with pytest.raises(Misfit):
        kept_value(value, type) if type != pa.decimal128(3, 1) or value != 0.5 else kept_value(
            "", type
        )
    assert wider_type(type, value) == wider
