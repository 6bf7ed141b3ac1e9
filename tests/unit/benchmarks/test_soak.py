"""The soak: what it judges by, and both parts with a tiny model for some seconds."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")
pytest.importorskip("uvicorn", reason="needs the extra nvembed[serve]")

import soak
from soak_parts import index, rude
from soak_parts.checks import Bound, account, drift, quantiles
from soak_parts.clients import Reference
from soak_parts.run import Run
from soak_parts.texts import real_texts


def test_drift_is_the_rise_of_a_line_through_the_second_half() -> None:
    assert drift([0, 50, 90, 100, 100, 100, 100, 100]) == 0  # it was filled, then it was flat
    assert drift([5, 5, 5, 5, 0, 2, 4, 6]) == pytest.approx(6)
    assert drift([0, 0, 0, 0, 3, 1, 3, 1]) == pytest.approx(-1.2)  # a slope of -0.4, by hand
    assert drift([1, 2]) == drift([]) == 0
    rng = np.random.default_rng(0)
    curve = 100 + 0.5 * np.arange(60) + rng.normal(size=60)
    slope = np.polyfit(np.arange(30), curve[30:], 1)[0]
    assert drift(curve.tolist()) == pytest.approx(29 * slope)
    assert Bound(0.1, 2.0).of([0, 0, 100, 100]) == pytest.approx(10)
    assert Bound(0.1, 2.0).of([0, 0, 1, 1]) == 2


def test_quantiles_are_numbers_that_were_seen() -> None:
    found = quantiles([number / 1000 for number in range(100, 0, -1)])
    assert found == {"p50": 51, "p95": 96, "p99": 100}
    assert set(quantiles([]).values()) == {None}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda rows: rows[1:], "lost"),
        (lambda rows: [*rows, rows[0]], "twice"),
        (lambda rows: [*rows, ("d", "text")], "extra"),
        (lambda rows: [("a", "another"), *rows[1:]], "changed"),
    ],
)
def test_one_document_that_is_wrong_is_noticed(change, kind: str) -> None:
    expected = {"a": "text a", "b": "text b", "c": "text c"}
    rows = list(expected.items())
    assert account(expected, rows).right
    found = account(expected, change(rows))
    assert not found.right
    wrong = {name: places for name, places in vars(found).items() if places}
    assert wrong == {kind: ["d" if kind == "extra" else "a"]}


def test_an_answer_for_another_text_is_noticed() -> None:
    vectors = np.eye(4, 8, dtype=np.float32)
    reference = Reference(list("abcd"), vectors, 0.999)

    def body(rows: list[int], noise: float = 0.0) -> bytes:
        packed = [base64.b64encode((vectors[row] + noise).astype("<f4")).decode() for row in rows]
        return json.dumps({"data": [{"embedding": one} for one in packed]}).encode()

    assert reference.fits([2, 0], body([2, 0]))
    assert not reference.fits([2, 0], body([0, 2]))
    assert not reference.fits([2, 0], body([2]))
    assert not reference.fits([2], body([2], noise=-0.01))


def test_texts_are_real_distinct_and_of_many_lengths() -> None:
    texts = real_texts(200, 400)
    lengths = [len(text.split()) for text in texts]
    assert len(set(texts)) == 200
    assert min(lengths) < 10
    assert 150 < max(lengths) <= 400
    assert texts == real_texts(200, 400)


def test_certain_is_what_no_run_in_progress_can_change(tmp_path: Path) -> None:
    writer = index.Writer(Run("index", "", tmp_path, tmp_path, 1.0), 0, index.Seen())
    assert writer.certain()[1] == []
    for _ in range(3):
        writer.change()
    before, writer.settled = writer.state.copy(), writer.state.copy()
    generation, whole = writer.certain()
    assert len(whole) == len(before.files) + len(before.rows) > 4
    writer.change()
    later, certain = writer.certain()
    assert later > generation
    kept = {text for name, text in before.files.items() if writer.state.files.get(name) == text}
    kept |= {row.text for id, row in before.rows.items() if writer.state.rows.get(id) == row}
    assert {text for text, _ in certain} == kept
    assert 0 < len(certain) < len(whole)
    # The folder holds what the writer says it holds.
    on_disk = {path.relative_to(writer.folder).as_posix() for path in writer.folder.rglob("*.txt")}
    assert on_disk == writer.state.files.keys()
    rows = (writer.folder / "rows.jsonl").read_text().split()
    assert len(re.findall('"id":', " ".join(rows))) == len(writer.state.rows)


def checks_of(out: Path) -> dict[str, bool]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["name"]: row["holds"] for row in rows if row["row"] == "check"}


def test_the_server_part(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    words = ["--part", "server", "--rehearse", "--minutes", "0.01", "--out", str(tmp_path / "out")]
    assert soak.main([*words, "--model", str(tiny_decoder_dir)]) == 0
    checks = checks_of(tmp_path / "out")
    assert {f"rude: {kind}" for kind in rude.KINDS} < checks.keys()
    assert f"clients of {len(rude.KINDS)} kinds" in (soak.__doc__ or "")
    assert {"good requests that failed", "sockets when all have left", "SIGTERM: exit code"} < set(
        checks
    )
    assert (tmp_path / "out" / "soak.png").stat().st_size > 1000
    tables = (tmp_path / "out" / "results.md").read_text()
    assert tables.count("\n| rude: ") == len(rude.KINDS)


def test_the_index_part(tiny_decoder_dir: Path, tmp_path: Path) -> None:
    words = ["--part", "index", "--rehearse", "--minutes", "0.01", "--out", str(tmp_path / "out")]
    assert soak.main([*words, "--model", str(tiny_decoder_dir)]) == 0
    checks = checks_of(tmp_path / "out")
    assert {"documents", "texts not found by themselves", "writer 1 again"} < checks.keys()
