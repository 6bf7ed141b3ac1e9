"""Every command with a tiny random model, checked against the Python call that it stands for."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from nvembed.cli.main import run
from nvembed.core.files import read_jsonl, write_jsonl
from nvembed.model.embedder import NVEmbed
from task_folders import write_task

DOCUMENTS = ["a cat sleeps on the mat", "the moon turns around the earth", "bread\nand soup"]

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(
        tmp_path / "docs.jsonl",
        [{"_id": f"d{i}", "text": text} for i, text in enumerate(DOCUMENTS)],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_encode(place, tiny_decoder_dir, capsys):
    command = ["encode", str(tiny_decoder_dir), "--input", "docs.jsonl", "--output", "v.npy"]
    command += ["--dtype", "float32"]
    assert run(command) == 0
    model = NVEmbed.from_pretrained(tiny_decoder_dir)
    expected = model.encode_document(DOCUMENTS)
    np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)
    assert json.loads(Path("v.npy.ids.json").read_text()) == ["d0", "d1", "d2"]
    assert "3 vectors of width 32: v.npy" in capsys.readouterr().out

    assert run([*command, "--task", "Find the animal"]) == 0
    as_queries = model.encode_query(DOCUMENTS, task="Find the animal")
    np.testing.assert_allclose(np.load("v.npy"), as_queries, atol=1e-6)
    assert not np.allclose(as_queries, expected, atol=1e-3)

    assert run([*command, "--task", "FiQA2018"]) == 0  # the name of an MTEB task
    task = "Given a financial question, retrieve relevant passages that answer the query"
    np.testing.assert_allclose(
        np.load("v.npy"), model.encode_query(DOCUMENTS, task=task), atol=1e-6
    )
    capsys.readouterr()
    assert run([*command, "--task", "FiQA2019"]) == 2
    assert "perhaps FiQA2018" in capsys.readouterr().err


def test_search(place, tiny_decoder_dir, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))  # where the cache of document vectors goes
    query, task = "what does the moon do", "Find it"
    command = ["search", str(tiny_decoder_dir), query, "--documents", "docs.jsonl"]
    command += ["--dtype", "float32"]
    assert run([*command, "--task", task, "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = NVEmbed.from_pretrained(tiny_decoder_dir)
    scores = model.encode_document(DOCUMENTS) @ model.encode_query([query], task=task)[0]
    best = np.argsort(-scores)[:2]
    assert lines == [
        f"{rank:>3}  {scores[i]:.4f}  [d{i}]  {' '.join(DOCUMENTS[i].split())}"
        for rank, i in enumerate(best, start=1)
    ]


def test_search_shortens_long_texts(place, tiny_decoder_dir, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    write_jsonl("long.jsonl", [{"text": "word " * 100}])
    assert run(["search", str(tiny_decoder_dir), "q", "--documents", "long.jsonl"]) == 0
    line = capsys.readouterr().out.rstrip("\n")
    assert line.endswith("…")
    assert len(line) < 200


def test_evaluate_several_folders(place, tiny_decoder_dir, capsys):
    write_task(place / "tasks" / "one", "STS")
    write_task(place / "tasks" / "two", "Clustering")
    command = ["evaluate", str(tiny_decoder_dir), "--tasks", "tasks/one", "tasks/two"]
    assert run([*command, "--output", "out/scores.json"]) == 0
    results = json.loads(Path("out/scores.json").read_text())
    types = {value["type"]: value for value in results.values()}
    assert set(types) == {"STS", "Clustering"}
    out = capsys.readouterr().out
    for result in results.values():
        assert {"type", "main_score_name", "main_score"} <= set(result)
        assert f"{100 * result['main_score']:.2f}" in out


def test_mine(place, tiny_decoder_dir, capsys):
    pairs = [{"query": f"q{i}", "positive": text} for i, text in enumerate(DOCUMENTS)]
    write_jsonl("pairs.jsonl", pairs)
    command = ["mine", "pairs.jsonl", "mined.jsonl", "--teacher", str(tiny_decoder_dir)]
    assert run([*command, "num_negatives=1", "strategy=top_k", "near_duplicate=null"]) == 0
    rows = [row for _, row in read_jsonl("mined.jsonl")]
    assert [row["query"] for row in rows] == ["q0", "q1", "q2"]
    for row in rows:
        assert len(row["negative"]) == 1
        assert row["negative"][0] in set(DOCUMENTS) - {row["positive"]}
    assert "3 records, 3 negatives among 3 documents" in capsys.readouterr().out


@pytest.fixture
def recipe(place, tiny_decoder_dir) -> str:
    folder = place / "recipes"
    rows = [{"query": f"word {i}", "positive": f"text of {i * 7 % 16}"} for i in range(16)]
    write_jsonl(folder / "pairs.jsonl", rows)
    config = {
        "output": "runs/one",
        "model": {"backbone": str(tiny_decoder_dir), "max_tokens": 64, "pooling": {"kind": "mean"}},
        "datasets": [
            {
                "name": "pairs",
                "path": "pairs.jsonl",
                "kind": "retrieval",
                "instruction": None,
                "stages": [1],
            }
        ],
        "stages": [{"name": "one", "steps": 3, "batch_size": 4, "in_batch_negatives": True}],
    }
    (folder / "one.yaml").write_text(yaml.safe_dump(config))
    return "recipes/one.yaml"


def test_train_with_overrides_then_again_then_fresh(recipe, capsys):
    command = ["train", recipe, "stages.0.steps=2", "seed=7", "output=runs/two"]
    assert run(command) == 0
    assert capsys.readouterr().out.endswith("model: runs/two/model\n")
    saved = yaml.safe_load(Path("runs/two/config.yaml").read_text())
    assert saved["seed"] == 7
    steps = [row["step"] for _, row in read_jsonl("runs/two/metrics.jsonl")]
    assert steps == [1, 2]
    assert np.isfinite(NVEmbed.from_pretrained("runs/two/model").encode(["x"])).all()

    written = Path("runs/two/metrics.jsonl").stat().st_mtime_ns
    assert run(command) == 0  # finished: nothing to do
    assert Path("runs/two/metrics.jsonl").stat().st_mtime_ns == written

    assert run(["train", recipe, "seed=8", "output=runs/two"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert run(["train", recipe, "seed=8", "output=runs/two", "--fresh"]) == 0
    steps = [row["step"] for _, row in read_jsonl("runs/two/metrics.jsonl")]
    assert steps == [1, 2, 3]


def test_demo_passes_its_options(monkeypatch):
    seen = []
    module = pytest.importorskip("pydocs.run")
    monkeypatch.setattr(module, "run_demo", lambda *given, **named: seen.append((given, named)))
    program = runpy.run_path(str(ROOT / "examples" / "pydocs" / "__main__.py"))["program"]
    assert run(["--minutes", "3", "--backbone", "x/y", "--output", "here"], program) == 0
    assert seen == [((3.0, "x/y", Path("here")), {})]
    assert run([], program) == 0
    assert seen[1] == ((10.0, None, Path("runs/demo")), {})


def test_a_folder_is_indexed_in_passages(place, tiny_decoder_dir, capsys):
    pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
    shutil.copytree(tiny_decoder_dir, "model")
    Path("docs").mkdir()
    Path("docs/a.md").write_text(f"# Moon\n\n{'It is bright. ' * 9}\n\n## Orbit\n\nIt turns.\n")
    Path("docs/a.png").write_bytes(b"")
    index = ["index", "docs", "--to", "db", "--model", "model", "--dtype", "float32"]
    for wrong in ("0.5", "-1", "all", "²"):
        assert run([*index, "--passages", wrong]) == 2
        assert "--passages" in capsys.readouterr().err
    assert run([*index, "--passages", "90"]) == 0
    done = capsys.readouterr()
    assert done.out.splitlines() == [
        "db: 3 passages; 3 new, 0 changed, 0 as they were, 0 deleted; 3 texts embedded",
        "1 document in passages of at most 90 tokens",
    ]
    assert "1 file left out: 1 of other kinds (.png 1)" in done.err
    assert run(["search", "db", "turns", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any("]  line 5 · Moon > Orbit  ## Orbit It turns." in line for line in lines)
    assert (
        run(["search", "db", "turns", "--dtype", "float32", "--where", "line = 5", "--json"]) == 0
    )
    hit = json.loads(capsys.readouterr().out)
    assert hit["fields"] == {
        "file": str(place / "docs" / "a.md"), "heading": "Moon > Orbit",
        "start": hit["fields"]["start"], "end": hit["fields"]["end"], "line": 5,
    }  # fmt: skip
    assert run([*index, "--passages", "none"]) == 2
    assert "passages is none, the database has passages of 90" in capsys.readouterr().err
    assert run(["index", "docs", "--to", "whole", *index[4:], "--passages", "none"]) == 0
    assert "whole: 1 documents; 1 new" in capsys.readouterr().out


def test_index_and_search_of_a_database(place, tiny_decoder_dir, capsys):
    pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
    rows = [{"_id": f"d{i}", "text": text, "year": 2000 + i} for i, text in enumerate(DOCUMENTS)]
    write_jsonl("docs.jsonl", rows)
    shutil.copytree(tiny_decoder_dir, "model")
    index = ["index", "docs.jsonl", "--to", "db", "--dtype", "float32"]
    assert run(index) == 2
    assert "a new database needs a model" in capsys.readouterr().err
    assert run([*index, "--model", "model", "--task", "Find it"]) == 0
    assert "db: 3 documents; 3 new, 0 changed" in capsys.readouterr().out

    model = NVEmbed.from_pretrained(tiny_decoder_dir)
    query = "what does the moon do"
    scores = model.encode_document(DOCUMENTS) @ model.encode_query([query], task="Find it")[0]
    search = ["search", "db", query, "--dtype", "float32"]
    capsys.readouterr()
    assert run([*search, "--where", "year > 2000"]) == 0
    best = [i for i in np.argsort(-scores) if i > 0]
    assert capsys.readouterr().out.splitlines() == [
        f"{rank:>3}  {scores[i]:.4f}  [d{i}]  {' '.join(DOCUMENTS[i].split())}"
        for rank, i in enumerate(best, start=1)
    ]
    assert run([*search, "--json", "--top-k", "1", "--where", "year = 2001"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "rank": 1,
        "cosine": pytest.approx(float(scores[1]), abs=1e-6),
        "fused": None,
        "id": "d1",
        "text": DOCUMENTS[1],
        "fields": {"year": 2001},
    }
    assert run([*search, "--hybrid", "--top-k", "1"]) == 0
    assert (
        f"{1 / 61 + 1 / (61 + list(np.argsort(-scores)).index(1)):.4f}" in capsys.readouterr().out
    )

    Path("bad.jsonl").write_text('{"_id": "x", "text": "new"}\n{"_id": "y"}\n')
    Path("gone.txt").write_text("d1\n")
    more = ["index", "bad.jsonl", "--to", "db", "--dtype", "float32", "--keep-going"]
    assert run([*more, "--delete", "d0", "--delete-file", "gone.txt"]) == 0
    done = capsys.readouterr()
    assert "db: 2 documents; 1 new, 0 changed, 0 as they were, 2 deleted; 1 texts" in done.out
    assert "bad.jsonl:2" in done.err

    for words, message in (
        ([*search, "--where", "yaer > 1"], "no field 'yaer'"),
        ([*search, "--documents", "docs.jsonl", "--hybrid"], "are of databases"),
        (["search", "model", query], "give --documents FILE"),
    ):
        assert run(words) == 2
        assert message in capsys.readouterr().err

    # The same files in another place are the same model; other weights there are not.
    shutil.move("model", "moved")
    assert run(search) == 2
    assert "no longer at" in capsys.readouterr().err
    assert run(["search", "db", " "]) == 2  # told before the model is looked for
    assert "the query is empty" in capsys.readouterr().err
    assert run([*search, "--model", "moved"]) == 0
    config = json.loads(Path("moved/config.json").read_text())
    Path("moved/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    capsys.readouterr()
    assert run([*search, "--model", "moved"]) == 2
    assert "that this database was made with" in capsys.readouterr().err
