"""The database against a dictionary, brute force, Python filters and fusion by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, DataError, ModelError
from nvembed.core.files import write_jsonl
from nvembed.core.ownership import mark_growing
from nvembed.index import search
from nvembed.index.build import IndexOptions, index_documents
from nvembed.index.database import Database, DatabaseRecord, writing
from nvembed.index.search import SearchOptions, find, map_of, recorded_encoder, search_database
from nvembed.model.encoder import load_encoder
from oracles.index import fuse, nearest

WORDS = ["red", "green", "blue", "tree", "moon", "river", "stone", "bread", "sail", "lamp"]


class Counting(HashEncoder):
    """Counts the documents that it embeds."""

    def __init__(self, dimension: int = 64) -> None:
        super().__init__(dimension)
        self.embedded: list[str] = []

    def encode_document(self, texts, *, task=None):
        if "bread 42" not in texts:  # the probe
            self.embedded += texts
        return super().encode_document(texts, task=task)


def made_rows(count: int) -> list[dict]:
    choose = np.random.default_rng(0)
    rows = []
    for number in range(count):
        row = {"_id": f"d{number:04d}", "text": " ".join(choose.choice(WORDS, size=6))}
        if number % 7:
            row |= {"year": 1980 + number % 50, "lang": ["en", "de", "it's"][number % 3]}
        row["open"] = number % 2 == 0
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return made_rows(300)


@pytest.fixture(scope="module")
def database(tmp_path_factory, rows) -> Database:
    folder = tmp_path_factory.mktemp("index")
    write_jsonl(folder / "docs.jsonl", rows)
    index_documents(folder / "db", [folder / "docs.jsonl"], model=HashEncoder(64), task="Find it")
    return Database.open(folder / "db")


def test_exact_search_is_brute_force(database, rows):
    encoder = HashEncoder(64)
    vectors = encoder.encode_document([row["text"] for row in rows])
    for query in ("red tree", "moon river bread", "sail"):
        found = search_database(database, encoder, query, SearchOptions(top_k=20))
        asked = encoder.encode_query([query], task="Find it")[0]  # the database's own task
        expected = nearest([row["_id"] for row in rows], vectors, asked)
        np.testing.assert_allclose(
            [hit.cosine for hit in found], [s for _, s in expected[:20]], atol=1e-6
        )
        by_id = dict(expected)
        for hit in found:  # equal cosines may come in either order at the end of the list
            assert hit.cosine == pytest.approx(by_id[hit.id], abs=1e-6)
            assert hit.text == next(r["text"] for r in rows if r["_id"] == hit.id)
        assert [hit.rank for hit in found] == list(range(1, 21))


def test_the_task_of_a_query(database, rows):
    encoder = HashEncoder(64)
    for task, used in ((None, "Find it"), ("", None), ("Another", "Another")):
        hit = search_database(database, encoder, "red", SearchOptions(task=task, top_k=1))[0]
        asked = encoder.encode_query(["red"], task=used)[0]
        assert hit.cosine == pytest.approx(float(hit.vector @ asked), abs=1e-6)
    assert len({h.cosine for h in search_database(database, encoder, "red", SearchOptions())}) > 1


FILTERS = [
    ("year > 2000", lambda r: "year" in r and r["year"] > 2000),
    ("NOT (year > 2000)", lambda r: "year" in r and not r["year"] > 2000),
    ("year IS NULL", lambda r: "year" not in r),
    ("lang = 'it''s' AND open", lambda r: r.get("lang") == "it's" and r["open"]),
    ("lang IN ('en','de') OR year BETWEEN 1980 AND 1985",
     lambda r: r.get("lang") in ("en", "de") or 1980 <= r.get("year", 0) <= 1985),
    ("lang NOT IN ('en')", lambda r: r.get("lang") not in ("en", None)),
    ("lang LIKE '%e%' AND open = false", lambda r: "e" in r.get("lang", "") and not r["open"]),
    ("id < 'd0010'", lambda r: r["_id"] < "d0010"),
    ("text LIKE '%moon%'", lambda r: "moon" in r["text"]),
    ("year != 1990", lambda r: "year" in r and r["year"] != 1990),
]  # fmt: skip


@pytest.mark.parametrize(("where", "passes"), FILTERS, ids=[where for where, _ in FILTERS])
@pytest.mark.parametrize("hybrid", [False, True])
def test_filters_are_python_filters(database, rows, where, passes, hybrid):
    expected = {row["_id"] for row in rows if passes(row)}
    assert 0 < len(expected) < len(rows)
    options = SearchOptions(top_k=300, where=where, hybrid=hybrid)
    found = search_database(database, HashEncoder(64), "red moon", options)
    assert {hit.id for hit in found} == expected
    assert database.count(where) == len(expected)


def test_hybrid_is_reciprocal_rank_fusion(database):
    encoder = HashEncoder(64)
    for query in ("red tree", "moon lamp stone"):
        vector = encoder.encode_query([query])[0]
        near = [h.id for h in find(database, query, vector, SearchOptions(top_k=100))]
        words = [row["id"] for row in database.by_words(query, 100, where=None)]
        expected = fuse([near, words])[:15]
        options = SearchOptions(top_k=15, hybrid=True)
        found = find(database, query, vector, options)
        assert [hit.id for hit in found] == [id for id, _ in expected]
        np.testing.assert_allclose([hit.fused for hit in found], [s for _, s in expected])
        assert near[:15] != [hit.id for hit in found]


def test_words_are_ranked_as_bm25_says(database, rows):
    found = database.by_words("moon", 300, where=None)
    counts = [row["text"].split().count("moon") for row in found]
    # All texts are of one length, so the score grows with the count alone.
    assert counts == sorted(counts, reverse=True)
    assert {row["id"] for row in found} == {r["_id"] for r in rows if "moon" in r["text"].split()}


def test_approximate_search_finds_what_exact_search_finds(tmp_path):
    choose = np.random.default_rng(0)
    centres = choose.normal(size=(40, 32))
    vectors = centres[choose.integers(0, 40, 3000)] + 0.5 * choose.normal(size=(3000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    write_jsonl(tmp_path / "one.jsonl", [{"_id": "x", "text": "x"}])
    path = tmp_path / "db"
    index_documents(path, [tmp_path / "one.jsonl"], model=HashEncoder(32))
    database = Database.open(path)
    database.delete(["x"])
    ids = [f"d{n}" for n in range(3000)]
    database.upsert(ids[:2500], ids[:2500], [{}] * 2500, vectors[:2500])
    database.tidy(ann_above=3000)
    assert not database.approximate
    database.tidy(ann_above=2000)
    assert database.approximate
    database.upsert(ids[2500:], ids[2500:], [{}] * 500, vectors[2500:])  # not in the index yet
    queries = vectors[choose.integers(0, 3000, 50)] + 0.1 * choose.normal(size=(50, 32))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    shares, late = [], 0
    for query in queries:
        best = np.argsort(-(vectors @ query), kind="stable")[:10]
        found = find(database, "q", query, SearchOptions(top_k=10))
        exact = find(database, "q", query, SearchOptions(top_k=10, exact=True))
        assert [hit.id for hit in exact] == [ids[n] for n in best]
        shares.append(len({hit.id for hit in found} & {ids[n] for n in best}) / 10)
        late += sum(int(hit.id[1:]) >= 2500 for hit in found)
    assert np.mean(shares) >= 0.95
    assert late > 30
    database.tidy(ann_above=10_000)  # few again: exact
    assert not database.approximate


DOCUMENT = st.tuples(st.sampled_from("abcd'"), st.sampled_from(WORDS), st.integers(0, 3))
STEP = st.tuples(st.lists(DOCUMENT, min_size=1, max_size=5), st.lists(st.sampled_from("abcd'x")))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(STEP, min_size=1, max_size=3))
def test_upserts_and_deletes_are_those_of_a_dictionary(steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    kept: dict[str, tuple[str, int]] = {}
    encoder = Counting()
    seen: set[str] = set()
    for number, (documents, deleted) in enumerate(steps):
        path = folder / f"{number}.jsonl"
        write_jsonl(path, [{"id": i, "text": t, "year": y} for i, t, y in documents])
        new = {i: (t, y) for i, t, y in documents}
        report = index_documents(folder / "db", [path], model=encoder, delete=deleted)
        assert report.added == len(new.keys() - kept.keys())
        assert report.unchanged == sum(kept.get(i) == value for i, value in new.items())
        assert report.updated == len(new) - report.added - report.unchanged
        kept |= new
        assert report.deleted == len(kept.keys() & set(deleted))
        kept = {i: value for i, value in kept.items() if i not in deleted}
        assert report.total == len(kept)
        database = Database.open(folder / "db")
        rows = database.get("id", list("abcd'x"))
        assert {row["id"]: (row["text"], row["fields"]["year"]) for row in rows} == kept
        for row in rows:
            expected = HashEncoder(64).encode_document([row["text"]])[0]
            np.testing.assert_allclose(row["vector"], expected, atol=1e-6)
        if not deleted:
            seen |= {t for t, _ in new.values()}
            assert set(encoder.embedded) >= seen
    if not any(deleted for _, deleted in steps):
        assert len(encoder.embedded) <= len(WORDS)


def test_what_is_written_is_indexed_while_more_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("nvembed.index.database._CHANGES", 4)
    record = DatabaseRecord(model=None, fingerprint=None, dimension=2, task=None, probe=())
    with writing(tmp_path / "db"):
        database = Database.create(tmp_path / "db", record)
        for number in range(11):
            ids = [f"d{number}", f"d{number // 2}"] if number else ["d0"]
            texts = [f"{id} of change {number}" for id in ids]
            vectors = np.full((len(ids), 2), number, dtype=np.float32)
            database.upsert(ids, texts, [{}] * len(ids), vectors)
        stats = [database._table.index_stats(f"{name}_idx") for name in ("id", "text_hash")]
        # Of changes 9 to 11: d8, d9, d10, d4 and d5.
        assert [each.num_unindexed_rows for each in stats] == [5, 5]
        last = {f"d{number}": number for number in range(11)}
        last |= {f"d{number // 2}": number for number in range(1, 11)}
        found = {row["id"]: row for row in database.get("id", [*last, "none"])}
        assert {id: row["text"] for id, row in found.items()} == {
            id: f"{id} of change {number}" for id, number in last.items()
        }
        assert all(row["vector"].tolist() == [last[id]] * 2 for id, row in found.items())
        assert database.count() == 11


def test_only_new_texts_are_embedded(tmp_path):
    encoder, path = Counting(), tmp_path / "docs.jsonl"
    rows = [{"id": i, "text": ["same", "other"][i == 2], "year": 2000} for i in range(3)]
    write_jsonl(path, rows)
    report = index_documents(tmp_path / "db", [path], model=encoder)
    assert (encoder.embedded, report.embedded, report.added) == (["same", "other"], 2, 3)
    rows[0]["year"] = 2001  # a field only
    rows[1] |= {"text": "third", "note": "new field"}
    rows.append({"id": "renamed", "text": "other"})
    write_jsonl(path, rows)
    report = index_documents(tmp_path / "db", [path], model=encoder)
    assert encoder.embedded == ["same", "other", "third"]
    assert (report.added, report.updated, report.unchanged) == (1, 2, 1)
    database = Database.open(tmp_path / "db")
    assert database.fields == {"year": pa.int64(), "note": pa.string()}
    found = {row["id"]: row["fields"] for row in database.get("id", ["0", "1", "2"])}
    assert found == {
        "0": {"year": 2001},
        "1": {"year": 2000, "note": "new field"},
        "2": {"year": 2000},
    }
    report = index_documents(tmp_path / "db", [path], model=encoder)
    assert (report.embedded, report.unchanged, report.total) == (0, 4, 4)


def test_documents_without_ids_and_tables(tmp_path):
    (tmp_path / "a.csv").write_text(
        "text,year,code,open\nfirst,2001,007,true\nsecond,,12,false\nfirst,2001,007,true\n"
    )
    report = index_documents(tmp_path / "db", [tmp_path / "a.csv"], model=HashEncoder(8))
    assert report.total == 2
    database = Database.open(tmp_path / "db")
    # A number with zeros in front is a name.
    assert database.fields == {"year": pa.int64(), "code": pa.string(), "open": pa.string()}
    assert database.count("year = 2001 AND code = '007'") == 1
    assert database.count("year IS NULL") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 3, "text": "x", "year": "late"}', '"year" is a text, in the documents before'),
        ('{"_id": 3, "id": 4, "text": "x"}', "a field cannot be called 'id'"),
        ('{"id": 3, "text": "x", "n": "\\ud83d"}', '"n" holds half a character'),
        ('{"id": 3, "text": "x", "n": 36893488147419103233}', "64 bits do not hold"),
        ('{"id": 3}', "text"),
        ("{broken", "JSON"),
    ],
)
def test_bad_lines_are_named_or_left_out(tmp_path, line, message):
    path = tmp_path / "docs.jsonl.gz"
    good = [json.dumps({"id": i, "text": f"t{i}", "year": 2000}) for i in range(2)]
    path.write_bytes(gzip.compress("\n".join([good[0], line, good[1]]).encode()))
    with pytest.raises(DataError) as error:
        index_documents(tmp_path / "db", [path], model=HashEncoder(8))
    assert message in str(error.value)
    assert f"{path}:2" in str(error.value)
    options = IndexOptions(keep_going=True)
    report = index_documents(tmp_path / "db", [path], model=HashEncoder(8), options=options)
    assert (report.total, report.skipped.count) == (2, 1)
    assert report.skipped.first[0].place == f"{path}:2"


def test_another_model_is_refused(tmp_path, database):
    write_jsonl(tmp_path / "docs.jsonl", [{"id": 1, "text": "x"}])
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(64))

    class Other(HashEncoder):
        def encode_document(self, texts, *, task=None):
            return -super().encode_document(texts, task=task)

    for wrong in (HashEncoder(32), HashEncoder(65), Other(64)):
        with pytest.raises(ModelError, match="this database was made with"):
            index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=wrong)
        with pytest.raises(ModelError, match="this database was made with"):
            recorded_encoder(database.record, wrong, None, "db")
    with pytest.raises(ModelError, match="does not know its model"):
        index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=None)


def test_settings_of_a_database_are_fixed(tmp_path):
    path, docs = tmp_path / "db", [tmp_path / "docs.jsonl"]
    write_jsonl(docs[0], [{"id": 1, "text": "red moon"}, {"id": 2, "text": "tree"}])
    encoder = HashEncoder(64)
    with pytest.raises(ConfigError, match="1 to 64"):
        index_documents(path, docs, model=encoder, truncate_dim=65)
    index_documents(path, docs, model=encoder, truncate_dim=16, task="Find")
    for wrong in ({"truncate_dim": 8}, {"task": "Other"}):
        with pytest.raises(ConfigError, match="fixed when a database is made"):
            index_documents(path, docs, model=encoder, **wrong)
    hit = search_database(Database.open(path), encoder, "moon", SearchOptions(top_k=1))[0]
    first = encoder.encode_document(["red moon"])[0][:16]
    np.testing.assert_allclose(hit.vector, first / np.linalg.norm(first), atol=1e-6)


def test_wrong_places(tmp_path):
    with pytest.raises(DataError, match="no database"):
        Database.open(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    write_jsonl(tmp_path / "docs.jsonl", [{"id": 1, "text": "x"}])
    with pytest.raises(ConfigError, match="not empty, and no database"):
        index_documents(tmp_path / "full", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    with pytest.raises(DataError, match="no such file"):
        index_documents(tmp_path / "new", [tmp_path / "gone.jsonl"], model=HashEncoder(8))
    with pytest.raises(ConfigError, match="needs a model"):
        index_documents(tmp_path / "new", [tmp_path / "docs.jsonl"], model=None)
    assert not Path(tmp_path / "new").exists()


def test_what_a_killed_first_run_left_is_no_database(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", [{"id": 1, "text": "x"}])
    (tmp_path / "db" / "documents.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "db" / "documents.lance" / "_versions" / ".tmp1").write_text("half")
    with pytest.raises(DataError, match="no database"):
        Database.open(tmp_path / "db")
    # Only the mark tells it from a folder of the user's.
    with pytest.raises(ConfigError, match="nvembed did not make it"):
        index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    assert (tmp_path / "db" / "documents.lance" / "_versions" / ".tmp1").read_text() == "half"
    mark_growing(tmp_path / "db" / "documents.lance", "index")
    done = index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    assert done.total == 1


def test_one_process_writes(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", [{"id": 1, "text": "x"}])
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    with (
        writing(tmp_path / "db"),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        index_documents(tmp_path / "db", [], model=None, delete=["1"])
    assert index_documents(tmp_path / "db", [], model=None, delete=["1"]).total == 0


def test_what_a_killed_writer_left_goes(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", [{"id": 1, "text": "x"}])
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    table = tmp_path / "db" / "documents.lance"
    left = [
        table / "data" / f"{'0' * 40}.lance",
        table / "_indices" / str(UUID(int=1)) / "page.lance",
    ]
    left[1].parent.mkdir()
    for path in left:
        path.write_bytes(b"cut off")
    assert (
        index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8)).total == 1
    )
    assert not any(path.exists() for path in left)


def test_a_reader_while_a_field_gets_wider(tmp_path, monkeypatch):
    rows = [{"id": n, "text": f"text {n}", "year": n} for n in range(5)]
    write_jsonl(tmp_path / "docs.jsonl", rows)
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(8))
    reader, writer = Database.open(tmp_path / "db"), Database.open(tmp_path / "db")
    vector, written = HashEncoder(8).encode_query(["text 3"])[0], Database._sql
    after: list[int] = []

    def widened(self, where):
        sql = written(self, where)
        if self is reader and len(after) % 2 == 0:  # every first attempt comes too late
            writer.widen("year", pa.float64())
        after.append(1)
        return sql

    monkeypatch.setattr(Database, "_sql", widened)
    assert reader.count("year >= 3") == 2
    for read in (
        lambda: reader.nearest(vector, 5, where="year >= 3", exact=True),
        lambda: reader.by_words("text", 5, where="year >= 3"),
    ):
        assert {(row["id"], row["fields"]["year"]) for row in read()} == {("3", 3.0), ("4", 4.0)}
    assert len(after) == 6
    monkeypatch.undo()
    query = reader._table.search(vector, vector_column_name="vector")

    class Late:
        def to_arrow(self):
            found = query.to_arrow()
            writer.widen("year", pa.float64())
            return found

    assert all(set(row["fields"]) == {"year"} for row in reader._rows(Late()))
    with pytest.raises(ConfigError, match="no field"):
        reader.count("month > 1")


def test_map_is_the_plane_of_principal_components():
    vectors = np.random.default_rng(1).normal(size=(12, 6)).astype(np.float32)
    found = map_of(vectors)
    directions = np.linalg.eigh(np.cov(vectors.astype(np.float64).T))[1][:, [-1, -2]]
    expected = (vectors - vectors.astype(np.float64).mean(axis=0)) @ directions
    expected /= np.abs(expected).max()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)
    np.testing.assert_array_equal(map_of(vectors[:1]), [[0.0, 0.0]])
    assert map_of(vectors[:2])[:, 1].tolist() == [0.0, 0.0]
    assert np.isfinite(map_of(np.ones((4, 3), dtype=np.float32))).all()


def test_all_documents_of_a_database_are_of_one_type(tmp_path, tiny_decoder_dir, monkeypatch):
    """The machine measures otherwise the second time: the database keeps its type."""
    loaded = []
    monkeypatch.setattr(
        search,
        "load_encoder",
        lambda name, dtype: (loaded.append(dtype), load_encoder(name, dtype))[1],
    )

    def index(text, measured, dtype="auto"):
        monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured)
        write_jsonl(tmp_path / "docs.jsonl", [{"id": text, "text": text}])
        return index_documents(
            tmp_path / "db", [tmp_path / "docs.jsonl"], model=str(tiny_decoder_dir), dtype=dtype
        )

    index("red moon", "float32")
    index("blue tree", "bfloat16")
    database = Database.open(tmp_path / "db")
    assert database.record.dtype == "float32"
    with pytest.raises(ConfigError, match="dtype is 'bfloat16', the database has 'float32'"):
        index("green stone", "bfloat16", "bfloat16")
    encoder = recorded_encoder(database.record, None, "auto", "db")
    assert loaded == ["float32"] * 3
    (row,) = database.get("id", ["blue tree"])
    assert np.array_equal(row["vector"], encoder.encode_document(["blue tree"])[0])


def test_a_database_of_an_earlier_version_has_no_type():
    values = {"model": None, "fingerprint": None, "dimension": 2, "task": None, "probe": [[1, 0]]}
    assert DatabaseRecord.model_validate(values).dtype is None
