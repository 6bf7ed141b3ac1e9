"""Documents by the million, at 300: planted documents are found, fits are right, kills harmless."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale
from scale_parts import corpus, cost, measure
from scale_parts.place import DOCUMENTS, OF_MODELS, PARTS, QUERIES, VECTORS, Place

from hash_encoder import HashEncoder
from nvembed.core.files import write_jsonl
from nvembed.model import bulk, workers

PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")


def made_sentences(count: int) -> list[str]:
    choose = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "nrst"]
    return [f"S{n} {' '.join(choose.choice(words, 6))}." for n in range(count)]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    sentences = made_sentences(120)
    whole = [" ".join(sentences[n : n + 3]) for n in range(0, 60, 3)]
    write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in whole])
    more = [[" ".join(sentences[n : n + 6])] for n in range(60, 120, 6)]
    write_jsonl(tmp_path / "two.jsonl.gz", [{"query": "q", "positive": text} for text in more])
    return [tmp_path / "one.jsonl", tmp_path / "two.jsonl.gz"]


# --- Documents ------------------------------------------------------------------------------------


def test_sentences_are_found_again_when_they_are_joined() -> None:
    text = "The first is\n here. no capital. It has  3.5 parts! Too short. Is this one a question?"
    assert corpus.sentences_of(text) == [
        "The first is here. no capital.",
        "It has 3.5 parts!",
        "Is this one a question?",
    ]
    sentences = made_sentences(50)
    assert corpus.sentences_of(" ".join(sentences)) == sentences


def test_all_documents_that_can_be_made_are_distinct(texts: list[Path]) -> None:
    pool = corpus.read_pool(texts, limit=12)
    # Of each file an equal share, its texts whole, in their order.
    expected = [f"S{n}" for n in (*range(6), *range(60, 66))]
    assert [sentence.split()[0] for sentence in pool.sentences] == expected
    assert sorted(pool.lengths) == [3, 3, 6]
    made = [corpus.document(pool, n, seed=3) for n in range(pool.capacity)]
    assert len({row["text"] for row in made}) == len({row["id"] for row in made}) == 12 * 11
    known = {*pool.sentences}
    lengths = set()
    for row in made:
        parts = corpus.sentences_of(row["text"])
        assert {*parts} <= known
        lengths.add(len(parts))
    assert lengths == {3, 6}
    with pytest.raises(ValueError, match="12 sentences make 132 documents, not 133"):
        corpus.document(pool, 132, seed=3)


def test_a_document_has_one_place_and_one_right_query(texts: list[Path]) -> None:
    pool = corpus.read_pool(texts)
    assert len(pool.sentences) == 120
    numbers = corpus.planted(40, 300, seed=1)
    assert len({*numbers}) == 40
    assert max(numbers) > 200
    documents = [corpus.document(pool, n, seed=1)["text"] for n in range(300)]
    assert documents[7] != corpus.document(pool, 7, seed=2)["text"]
    for number in numbers:
        words = corpus.query(pool, number, seed=1)["text"].split()
        begin = " ".join(corpus.sentences_of(documents[number])[:2]).split()
        places = iter(begin)
        assert all(word in places for word in words)  # in their order
        assert 0 < len(words) < len(begin)
    vectors = HashEncoder(256).encode_document(documents)
    asked = HashEncoder(256).encode_query([corpus.query(pool, n, seed=1)["text"] for n in numbers])
    best = np.argsort(-(asked @ vectors.T), axis=1)[:, :10]
    assert np.mean([n in row for n, row in zip(numbers, best, strict=True)]) > 0.9
    assert np.mean([n + 1 in row for n, row in zip(numbers, best, strict=True)]) < 0.2


# --- The cost model -------------------------------------------------------------------------------

FORMS = {
    "power": lambda n: 3e-4 * n**1.3,
    "line": lambda n: 7.0 + 2e-3 * n,
    "line log": lambda n: 0.5 + 1e-6 * n * math.log2(n),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(10**4, 10**5), (10**4, 10**5, 10**6)])
def test_a_fit_gives_back_the_function(form: cost.Form, sizes: tuple[int, ...]) -> None:
    function = FORMS[form]
    fitted = cost.fit(form, sizes, [function(n) for n in sizes])
    for n in (10**3, 10**6, 10**9):
        assert fitted.at(n) == pytest.approx(function(n), rel=1e-6)
    limit = function(12_345_678)
    assert cost.largest(fitted, limit) == pytest.approx(12_345_678, rel=1e-6)
    assert fitted.at(cost.largest(fitted, limit) * 1.01) > limit


def test_a_fit_weighs_sizes_alike_and_is_never_below_zero() -> None:
    # Errors of ten per cent at either end move the curve alike.
    sizes, values = [10.0, 1000.0, 100_000.0], [2.2, 110.0, 9_000.0]
    fitted = cost.fit("line", sizes, values)
    errors = [abs(fitted.at(n) / y - 1) for n, y in zip(sizes, values, strict=True)]
    assert max(errors) < 0.2
    falling = cost.fit("line", [100.0, 1000.0], [5.0, 4.0])
    assert (falling.b, falling.a) == (0.0, pytest.approx(4.39, abs=0.01))
    steep = cost.fit("line", [100.0, 1000.0], [1.0, 100.0])  # would begin below zero
    assert steep.a == 0.0
    assert steep.b == pytest.approx(110 / 10_100)
    assert cost.largest(falling, 5.0) == math.inf
    with pytest.raises(ValueError, match="two sizes"):
        cost.fit("line", [10, 10], [1.0, 2.0])


def made_rows(*sizes: int) -> list[dict]:
    rows = []
    for n in sizes:
        encode = {"seconds": 5 + n / 100, "tokens": 120 * n, "bytes": 1024 * n}
        encode["peak_anonymous"] = 4e8 + 90 * n
        index = {
            "write_seconds": 1e-4 * n**1.1,
            "bytes": 2000 * n,
            "peak_anonymous": 3e8 + 1000 * n,
        }
        rows += [{"part": "encode", "documents": n, **encode}]
        rows += [{"part": "index", "documents": n, **index}]
    return rows


def test_a_size_is_predicted_from_smaller_ones_only() -> None:
    rows = made_rows(10**4, 10**5)
    wrong = [{**row, "seconds": 2 * (5 + 10**4)} for row in made_rows(10**6)]
    found = {row["quantity"]: row for row in cost.predictions([*rows, *wrong], 10**6)}
    assert found["encode, one process"]["predicted"] == pytest.approx(10_005)
    assert found["encode, one process"]["error"] == pytest.approx(-0.5)
    assert found["index: write"]["error"] == pytest.approx(0, abs=1e-9)
    assert {row["measured"] for row in cost.predictions(rows, 10**6)} == {None}
    assert "| 2.78 h | 5.56 h | -50% |" in scale.predicted([*rows, *wrong], 10**6)


def test_tables_show_what_was_measured_and_what_breaks_first() -> None:
    rows = made_rows(10**4, 10**5)
    hardware = cost.Hardware(
        devices=10, device_tokens=2000.0, device="GPU", memory_gb=10, disk_gb=1
    )
    searched = {"part": "search", "documents": 10**5, "recall_at_10": 0.98765}
    table = cost.size_table([*rows, searched], hardware)
    assert "| recall@10 of approximate search | … | **0.988** | … | … | … |" in table
    assert "| vectors, bytes | **10.2 MB** | **102 MB** | 1.02 GB | 102 GB | 1.02 TB |" in table
    assert (
        "| encode, one process | **105 s** | **16.8 min** | 2.78 h | 11.6 days | 116 days |"
        in table
    )
    # 120 tokens each, 20,000 a second.
    assert "10 × GPU of 2,000 tokens/s | 60 s | 10 min | 100 min | 6.94 days | 69.4 days |" in table
    assert "| mining | … | … | … | … | … |" in table
    lines = cost.limit_table(rows, hardware).splitlines()[2:]
    assert lines[0] == "| 500,000 | database, bytes | 1 GB |"
    assert lines[1] == "| 980,000 | vectors, bytes | 1 GB |"
    assert lines[2] == "| 9,700,000 | index, memory | 10 GB |"
    assert cost.value_shown("p50_ms", 1000.0) == "1 s"
    assert cost.limit_table([], hardware).splitlines()[2:] == ["| … | … | … |"]


def test_tables_are_put_into_their_places() -> None:
    assert re.findall("<!-- table: (.*) -->", PAGE) == ["prediction", "sizes", "limits"]
    filled = cost.replaced(PAGE, lambda name: f"the {name}")
    assert cost.replaced(filled, lambda name: f"the {name}") == filled
    assert "<!-- table: sizes -->\nthe sizes\n<!-- end -->" in filled
    assert "To be filled" not in filled
    assert len(filled.splitlines()) <= len(PAGE.splitlines())


# --- What is watched ------------------------------------------------------------------------------


def test_memory_and_seconds_are_those_of_all_processes_and_attempts(tmp_path: Path) -> None:
    hold = "import time; held = bytearray(50_000_000); time.sleep(0.7)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}]); {hold}"
    command = [sys.executable, "-c", program]
    begun = tmp_path / "begun.json"
    code, taken = measure.watch(command, tmp_path / "log", begun)
    assert code == 0
    assert 50e6 < taken.peak_anonymous < 100e6
    assert taken.peak_anonymous < taken.peak_rss
    assert taken.seconds > 1.4
    kept = json.loads(begun.read_text())
    assert 1.0 < kept["seconds"] <= taken.seconds
    code, again = measure.watch([sys.executable, "-c", "exit(3)"], tmp_path / "log", begun)
    assert (code, again.attempts) == (3, 2)
    assert again.seconds > kept["seconds"]
    assert again.peak_anonymous == kept["peak_anonymous"]


# --- The run --------------------------------------------------------------------------------------


@pytest.fixture
def place(
    tmp_path: Path, texts: list[Path], tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
    from nvembed.index import build, database

    monkeypatch.setattr(bulk, "WINDOW_TEXTS", 128)
    monkeypatch.setattr(build, "WINDOW_TEXTS", 128)
    # Replaced by the parts, in a process of their own.
    monkeypatch.setattr(database, "_PROBES", database._PROBES)
    monkeypatch.setattr(workers, "load_encoder", workers.load_encoder)
    named = tuple(map(str, texts))
    settings = {"dtype": "float32", "queries": 10, "mine_queries": 20}
    return Place(tmp_path, 300, named, str(tiny_decoder_dir), **settings)


def test_a_rehearsal(place: Place) -> None:
    from scale_parts import children

    from nvembed.encoding import files

    made = children.make(place)
    assert made == {"bytes": place.at(DOCUMENTS).stat().st_size, "sentences": 120}
    rows = [json.loads(line) for line in place.at(DOCUMENTS).read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"d{n}" for n in range(300)]

    found, own = children.encode(place), files.embed
    lengths = [min(len(row["text"].encode()), 256) for row in rows]  # a token is a byte
    assert sum(lengths) < found["tokens"] <= sum(lengths) + 2 * 300
    assert found["bytes"] == place.at(VECTORS).stat().st_size == 128 + 300 * 32 * 4
    children.queries(place)
    assert files.embed is own

    found = children.index(place)
    assert found["bytes"] > 300 * 32 * 4
    assert {"write_seconds", "again_seconds", "vector_index_seconds"} < found.keys()
    assert "write_seconds" not in children.index(place)  # nothing is left to write

    found = children.search(place)
    assert found["exact_is_brute_force"] == 1.0
    assert found["recall_at_10"] == found["recall_by_probes"]["20"] > 0.9
    assert 0 < found["exact_p50_ms"] <= found["exact_p95_ms"]

    found = children.mine(place)
    assert found["queries"] == 20
    assert found["positives_among_negatives"] == 0
    mined = [json.loads(line) for line in place.at("mined.jsonl").read_text().splitlines()]
    assert sum(len(row["negative"]) for row in mined) == found["negatives"] > 0
    asked = [json.loads(line) for line in place.at(QUERIES).read_text().splitlines()]
    by_id = {row["id"]: row["text"] for row in rows}
    assert [row["positive"] for row in mined] == [by_id[row["document"]] for row in asked]


def test_shares_that_were_found() -> None:
    from scale_parts.children import overlap

    assert overlap([["a", "b"], ["c", "d"]], [["b", "x"], ["d", "c"]]) == 0.75
    assert overlap([["a", "b"], ["c", "d"]], [["b"], ["x"]]) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["model", "hash"])
def test_the_whole_run_is_killed_and_goes_on(place: Place, vectors: str) -> None:
    out = place.folder / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--out", str(out)]
    command += ["--texts", *place.texts, "--model", place.model, "--dtype", "float32"]
    command += ["--window", "64", "--kill-documents", "192", "--queries", "10"]
    command += ["--mine-queries", "20", "--vectors", vectors]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for sizes in (["300"], ["300", "600"]):
        done = [*command, "--documents", *sizes]
        subprocess.run(done, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = scale.known_rows(out)
    expected = [p for p in PARTS if p != "ray" and not (vectors == "hash" and p in OF_MODELS)]
    assert [(row["documents"], row["part"]) for row in rows] == [
        (size, part) for size in (300, 600) for part in expected
    ]
    assert {row["vectors"] for row in rows} == {vectors}
    by_part = {(row["documents"], row["part"]): row for row in rows}
    killed = [row for row in rows if row["part"].startswith("kill")]
    for row in killed:
        assert row["equal"], row
        assert 0 < row["kept"] < row["of_documents"]
    assert {row["of_documents"] for row in killed} >= {300, 600}
    for size in (300, 600):
        assert by_part[size, "encode"]["peak_anonymous"] > 20e6
        assert by_part[size, "search"]["exact_is_brute_force"] == 1.0
        assert by_part[size, "mine"]["positives_among_negatives"] == 0
        if vectors == "model":
            assert by_part[size, "processes"]["largest_difference"] < 1e-5
        else:
            assert by_part[size, "search"]["planted_found_exactly"] > 0.8
    assert "| index: write |" in scale.predicted(rows, 1000)
    other = subprocess.run(
        [*command, "--documents", "300", "--seed", "1"], env=environment, capture_output=True
    )
    assert other.returncode == 1
    assert b"was made with other settings" in other.stderr
