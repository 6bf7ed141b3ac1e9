from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.core.errors import ConfigError, DataError
from nvembed.core.files import write_jsonl
from nvembed.encoding import file_search as search
from nvembed.encoding.file_search import search_file

ROWS = [
    {"_id": "a", "title": "List", "text": "sort the list in place"},
    {"_id": "b", "text": "open a file and read it"},
    {"_id": "c", "text": "sort the list in place"},
    {"_id": "d", "text": "SORT the list in place"},
]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    write_jsonl(path, ROWS)
    return path


class Loads:
    """Stands in for ``load_encoder``; counts the documents that are encoded."""

    def __init__(self) -> None:
        self.encoded = 0

    def __call__(self, name: str, dtype: str | None) -> HashEncoder:
        counter = self

        class Counting(HashEncoder):
            def encode_document(self, texts, *, task=None):  # type: ignore[no-untyped-def]
                counter.encoded += len(texts)
                return super().encode_document(texts, task=task)

        return Counting()


def test_hits_are_the_nearest_in_order(documents: Path) -> None:
    hits = search_file(HashEncoder(), documents, "sort the list in place", task=None, top_k=3)
    # c and d have the same vector as the query and tie: file order.
    assert [(hit.rank, hit.id) for hit in hits] == [(1, "c"), (2, "d"), (3, "a")]
    texts = ["sort the list in place", "SORT the list in place", "List sort the list in place"]
    assert [hit.text for hit in hits] == texts
    query = HashEncoder().encode_query([texts[0]])[0].astype(np.float64)
    expected = HashEncoder().encode_document(texts).astype(np.float64) @ query
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-6)
    assert len(search_file(HashEncoder(), documents, "x", task=None, top_k=99)) == 4


def test_the_task_moves_the_query_only(documents: Path) -> None:
    class Strong(HashEncoder):
        def __init__(self) -> None:
            super().__init__(instruction_weight=5.0)

    without = search_file(Strong(), documents, "place", task=None, top_k=1)
    steered = search_file(Strong(), documents, "place", task="open a file and read it", top_k=1)
    assert (without[0].id, steered[0].id) == ("c", "b")


def test_vectors_are_cached_by_contents(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    monkeypatch.setattr(search, "load_encoder", loads)
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")

    def find(query: str = "sort the list") -> list[str | None]:
        hits = search_file(str(model), documents, query, task=None, top_k=2, cache=cache)
        return [hit.id for hit in hits]

    first = find()
    assert loads.encoded == 4
    assert find() == first
    assert find("open a file and read it")[0] == "b"
    assert loads.encoded == 4
    # A copy under another name has the same contents.
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(documents.read_bytes())
    search_file(str(model), copy, "x", task=None, top_k=1, cache=cache)
    assert loads.encoded == 4
    # Other contents, other weights: encoded anew.
    write_jsonl(documents, [*ROWS, {"_id": "e", "text": "sort the list"}])
    assert find()[0] == "e"
    assert loads.encoded == 9
    os.utime(model / "config.json", ns=(1, 1))
    find()
    assert loads.encoded == 14
    # Damaged files are written again.
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    find()
    find()
    assert loads.encoded == 19


def test_a_cache_that_cannot_be_written_stops_nothing(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    monkeypatch.setattr(search, "load_encoder", loads)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be", encoding="utf-8")
    hits = search_file("o/m", documents, "open a file", task=None, top_k=1, cache=blocked)
    assert hits[0].id == "b"
    search_file("o/m", documents, "open a file", task=None, top_k=1, cache=None)
    assert loads.encoded == 8


def test_a_loaded_encoder_is_not_cached(documents: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    search_file(HashEncoder(), documents, "x", task=None, top_k=1, cache=cache)
    assert not cache.exists()


def test_bad_input(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="query is empty"):
        search_file("no/model", documents, "  ", task=None, top_k=1)
    with pytest.raises(ConfigError, match="0 hits asked for"):
        search_file("no/model", documents, "x", task=None, top_k=0)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no texts"):
        search_file("no/model", tmp_path / "empty.jsonl", "x", task=None, top_k=1)


def test_tables_and_folders_are_searched_too(documents: Path, tmp_path: Path) -> None:
    wanted = search_file(HashEncoder(), documents, "open a file", task=None, top_k=4)
    table = tmp_path / "docs.csv"
    lines = [f"{row['_id']},{row.get('title', '')},{row['text']}\n" for row in ROWS]
    table.write_text("_id,title,text\n" + "".join(lines), encoding="utf-8")
    assert search_file(HashEncoder(), table, "open a file", task=None, top_k=4) == wanted
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.md").write_text("open a file and read it", encoding="utf-8")
    (tmp_path / "folder" / "c.txt").write_text("sort the list", encoding="utf-8")
    hits = search_file(HashEncoder(), tmp_path / "folder", "open a file", task=None, top_k=4)
    assert [hit.id for hit in hits] == ["b.md", "c.txt"]
    table.write_text("_id,text\na,\n", encoding="utf-8")
    with pytest.raises(DataError, match='docs\\.csv:2: "text" is empty') as caught:
        search_file(HashEncoder(), table, "x", task=None, top_k=1)
    assert "--keep-going" not in str(caught.value)


def test_vectors_of_another_type_are_not_taken_from_the_cache(
    documents: Path, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by ``auto``, which settles on another type the next time."""
    loaded: list[str | None] = []
    load = search.load_encoder

    def noted(name: str, dtype: str | None) -> object:
        loaded.append(dtype)
        return load(name, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "load_encoder", noted)

    def scores(measured: str, dtype: str = "auto") -> list[float]:
        monkeypatch.setattr("nvembed.kernels.machine.fastest_precision", lambda device: measured)
        model = str(tiny_decoder_dir)
        found = search_file(
            model, documents, "sort", task=None, top_k=4, dtype=dtype, cache=tmp_path / "cache"
        )
        return [hit.score for hit in found]

    wide = scores("float32")
    assert scores("bfloat16") == scores("float32", "bfloat16") != wide
    assert scores("float32") == wide
    assert loaded == ["float32", "bfloat16", "bfloat16", "float32"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_default_cache_is_that_of_the_package(
    documents: Path, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    search_file(str(tiny_decoder_dir), documents, "sort", task=None, top_k=1)
    assert len(list((tmp_path / "cache" / "search").glob("*.npy"))) == 1
