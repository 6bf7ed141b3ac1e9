"""Files that earlier commits made are read: models, runs, databases, built sets, vectors."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nvembed import NVEmbed
from nvembed.cli.main import run
from nvembed.kernels import trained

ARCHIVES = sorted((Path(__file__).parents[1] / "kept").glob("*.zip"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_gives_the_vectors_that_it_gave(kept: Path) -> None:
    texts = json.loads((kept / "texts.json").read_text("utf-8"))
    model = NVEmbed.from_pretrained(kept / "run" / "model")
    query = model.encode(texts[:1], prompt="Instruct: find\nQuery: ")
    found = np.concatenate([query, model.encode(texts[1:])])
    np.testing.assert_allclose(found, np.load(kept / "vectors.npy"), atol=1e-5)


def test_a_finished_run_stays_as_it_is(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(kept / "run")
    assert run(["train", "recipe.yaml"]) == 0
    assert "run/model" in capsys.readouterr().out
    assert contents(kept / "run") == before


@pytest.mark.parametrize("drawn_as_then", [True, False])
def test_an_interrupted_run_goes_on(
    kept: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    drawn_as_then: bool,
) -> None:
    if drawn_as_then:  # peft's own forward draws the masks of dropout as they were drawn then
        monkeypatch.setattr(trained, "_adapted", lambda module: None)
    assert run(["train", "recipe.yaml", "output=open-run"]) == 0
    assert "going on after step 5" in capsys.readouterr().out
    for name in ("model.safetensors", "1_LatentAttentionPooling/model.safetensors"):
        whole, resumed = (load_file(kept / each / "model" / name) for each in ("run", "open-run"))
        assert whole.keys() == resumed.keys()
        for key, value in whole.items():
            # With a seed in place of a mask other places are drawn; each of the three steps moves
            # a number by about the rate, 1e-3.
            bound = 1e-5 if drawn_as_then else 3e-3
            np.testing.assert_allclose(resumed[key], value, atol=bound, err_msg=key)


def test_a_database_is_searched_and_grows(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "run/model"]  # the record says where it lay on the machine that made it
    query = ["search", "docs.db", "very b it is", "--top-k", "1", *model]
    assert run([*query, "--where", "year = 2001"]) == 0
    assert "d1" in capsys.readouterr().out
    (kept / "more.jsonl").write_text('{"id": "new", "text": "a new one", "year": 1}\n', "utf-8")
    assert run(["index", "more.jsonl", "--to", "docs.db", *model]) == 0
    assert "25 documents; 1 new, 0 changed" in capsys.readouterr().out
    assert run(["index", "docs.jsonl", "--to", "docs.db", *model]) == 0
    assert "0 new, 0 changed, 24 as they were" in capsys.readouterr().out
    # It was made before there were passages: files stay whole in it.
    (kept / "folder").mkdir()
    (kept / "folder" / "a.md").write_text("# One\n\nwords\n\n# Two\n\n" + "more words " * 400)
    (kept / "folder" / "a.py").write_text("x = 1")
    assert run(["index", "folder", "--to", "docs.db", *model]) == 0
    assert "26 documents; 1 new, 0 changed" in capsys.readouterr().out
    assert run([*query, "--where", "id = 'a.md'"]) == 0
    assert "[a.md]  # One words # Two" in capsys.readouterr().out


def test_a_built_set_is_not_built_again_and_trains(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(kept / "built")
    assert run(["data", "build", "build.yaml"]) == 0
    assert contents(kept / "built") == before
    assert run(["train", "build.yaml"]) == 0
    assert "data: pairs 24, classes 48" in capsys.readouterr().out


def test_vectors_of_a_file_are_replaced_by_the_same(kept: Path) -> None:
    import pyarrow.parquet as pq

    before = pq.read_table(kept / "docs.parquet")
    files = ("--input", "docs.jsonl", "--output", "docs.parquet")
    assert run(["encode", "run/model", *files, "--dtype", "float32"]) == 0
    after = pq.read_table(kept / "docs.parquet")
    assert after.schema == before.schema
    assert after["id"] == before["id"]
    column = before.schema.names[-1]
    np.testing.assert_allclose(after[column].to_pylist(), before[column].to_pylist(), atol=1e-5)
