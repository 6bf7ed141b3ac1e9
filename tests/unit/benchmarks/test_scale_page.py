"""docs/scale.md: its commands are accepted, other engines take the vectors with its code."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale
from scale_parts.place import PARTS

from nvembed.cli.main import run
from nvembed.core.files import write_jsonl

PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    for line in "".join(blocks("bash")).splitlines():
        yield shlex.split(line, comments=True)


def test_the_commands_of_the_guide_are_accepted() -> None:
    found = [words[2:] for words in commands() if words[:2] == ["python", "benchmarks/scale.py"]]
    assert len(found) == 5
    for words in found:
        given = scale.option_parser().parse_args(words)
        assert given.documents or given.predict or given.table
    for part in PARTS:
        assert f"`{part}`" in PAGE.split("## The cost model")[0]


def test_what_is_missing_is_told(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    for words, said in (
        (["--documents", "9"], "made of --texts"),
        ([], "nothing to do"),
        (["--texts", "x", "--documents", "9", "--parts", "ray"], "--ray 2"),
        (["--fill", "--out", "nowhere"], "no results in nowhere"),
    ):
        monkeypatch.setattr(sys, "argv", ["scale.py", *words])
        with pytest.raises(SystemExit, match="2"):
            scale.main()
        assert said in capsys.readouterr().err


# Libraries, and what stands in their block of code only.
NEEDS = {"ray.data": "ray.data.", "lancedb": "import lancedb", "faiss": "import faiss"}
NEEDS |= {"numpy": "vectors.fbin"}


@pytest.mark.slow
@pytest.mark.parametrize("library", NEEDS)
def test_other_engines_take_the_vectors(
    library: str, tmp_path: Path, tiny_decoder_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip(library)
    (code,) = [block for block in blocks("python") if NEEDS[library] in block]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_decoder_dir, "MODEL")
    rows = [{"id": f"d{n}", "text": f"the text of number {n} is {n * n % 997}"} for n in range(400)]
    for number, (start, end) in enumerate(pairwise((0, 200, 400))):
        write_jsonl(tmp_path / "shards" / f"000{number + 6}.jsonl", rows[start:end])
    write_jsonl(tmp_path / "docs.jsonl", rows)
    for words in commands():
        if words[0] == "nvembed" and "ray" not in words:
            assert run(words[1:]) == 0, capsys.readouterr().err
    if library != "ray.data":
        rest = ["--input", "shards/0006.jsonl", "--output", "vectors/0006.parquet"]
        assert run(["encode", "MODEL", *rest]) == 0
    for name in ("vectors", "queries"):
        assert run(["encode", "MODEL", "--input", "docs.jsonl", "--output", f"{name}.npy"]) == 0
    vectors = np.load("vectors.npy")
    names: dict = {"__name__": "page"}
    capsys.readouterr()
    exec(compile(code.replace("IVF65536,PQ32", "IVF4,PQ8"), "scale.md", "exec"), names)
    best = [f"d{n}" for n in np.argsort(-(vectors @ vectors[0]))[:10]]
    if library == "lancedb":
        found = re.findall(r"d\d+", capsys.readouterr().out)
        assert len({*found} & {*best}) >= 9
        assert found[0] == "d0"
    elif library == "faiss":
        assert len({f"d{n}" for n in names["rows"][0]} & {*best}) >= 5
    elif library == "numpy":
        count, width = np.fromfile("vectors.fbin", dtype=np.uint32, count=2)
        assert (count, width) == vectors.shape
        held = np.fromfile("vectors.fbin", dtype=np.float32, offset=8).reshape(count, width)
        np.testing.assert_array_equal(held, vectors)
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table("vectors").sort_by("id")
        by_id = {name: vectors[n] for n, name in enumerate(row["id"] for row in rows)}
        for name, vector in zip(*table.to_pydict().values(), strict=True):
            np.testing.assert_allclose(vector, by_id[name], atol=1e-5)
