"""``nvembed index`` under kill -9: the same command again, and all is there once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="needs the extra nvembed[index]")

from hash_encoder import HashEncoder
from nvembed.core.files import write_jsonl
from nvembed.index.build import index_documents
from nvembed.index.database import Database
from nvembed.index.search import SearchOptions, search_database

DRIVER = """
import sys, time
from pathlib import Path
from nvembed.index import build
from hash_encoder import HashEncoder
build.WINDOW_TEXTS = 8

class Slow(HashEncoder):
    def encode_document(self, texts, *, task=None):
        time.sleep(0.005)
        return super().encode_document(texts, task=task)

docs, db, gone = sys.argv[1:]
print("ready", flush=True)
report = build.index_documents(
    Path(db), [docs], model=Slow(32), delete=build.read_ids(Path(gone)),
    options=build.IndexOptions(ann_above=300),
)
print(report.embedded, flush=True)
"""


# Less than what 75 windows take.
SECONDS = 0.8


def attempt(arguments: list[str], kill_after: float | None) -> tuple[int, str]:
    """Exit code and output."""
    command = [sys.executable, "-c", DRIVER, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd="/", env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -9), err
    return process.returncode, out


def contents(path: Path, ids: list[str]) -> dict[str, tuple]:
    rows = Database.open(path).get("id", ids)
    assert len({row["id"] for row in rows}) == len(rows)
    assert Database.open(path).count() == len(rows)
    return {
        row["id"]: (
            row["text"],
            row["fields"].get("year"),
            row["fields"].get("note"),
            row["vector"].tobytes(),
        )
        for row in rows
    }


def killed_until_done(folder: Path, kills: int, seed: int) -> None:
    choose = random.Random(seed)
    old = [{"id": f"d{i}", "text": f"old text {i}", "year": i} for i in range(0, 600, 2)]
    new = [{"id": f"d{i}", "text": f"text {i % 200}", "year": i} for i in range(600)]
    new[300]["note"] = "a field that comes late"
    write_jsonl(folder / "old.jsonl", old)
    write_jsonl(folder / "new.jsonl", new)
    (folder / "gone.txt").write_text("d7\nd8\nnone\n")
    (folder / "nothing.txt").write_text("")
    ids = [row["id"] for row in new]
    whole, path = folder / "whole", folder / "db"
    for name, gone in (("old.jsonl", "nothing.txt"), ("new.jsonl", "gone.txt")):
        index_documents(
            whole,
            [folder / name],
            model=HashEncoder(32),
            delete=[line for line in (folder / gone).read_text().split("\n") if line],
        )
    expected = contents(whole, ids)
    assert len(expected) == 598
    index_documents(path, [folder / "old.jsonl"], model=HashEncoder(32))
    arguments = [str(folder / "new.jsonl"), str(path), str(folder / "gone.txt")]
    died, embedded = 0, None
    while died < kills:
        code, out = attempt(arguments, choose.uniform(0, SECONDS))
        if code == 0:
            break
        died += 1
        found = Database.open(path)  # whatever moment it was
        rows = found.get("id", ids)
        assert len({row["id"] for row in rows}) == len(rows) >= 298
        old_texts = {row["id"]: row["text"] for row in old}
        new_texts = {row["id"]: row["text"] for row in new}
        for row in rows:
            assert row["text"] in (old_texts.get(row["id"]), new_texts[row["id"]])
            expected_vector = HashEncoder(32).encode_document([row["text"]])[0]
            np.testing.assert_array_equal(row["vector"], expected_vector)
    else:
        code, out = attempt(arguments, None)
        assert code == 0
    embedded = int(json.loads(out))
    assert died >= 1
    assert embedded < 200  # what the killed ones had embedded is not embedded again
    assert contents(path, ids) == expected
    database = Database.open(path)
    assert database.approximate
    assert database.has_words
    other = Database.open(whole)
    found, expected_hits = (
        search_database(base, HashEncoder(32), "text 7", SearchOptions(exact=True))
        for base in (database, other)
    )
    assert [hit.cosine for hit in found] == [hit.cosine for hit in expected_hits]
    words = [
        {row["id"] for row in base.by_words("7", 600, where=None)} for base in (database, other)
    ]
    assert words[0] == words[1] == {"d207", "d407"}


def test_killed_and_run_again(tmp_path: Path) -> None:
    killed_until_done(tmp_path, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_many_times(tmp_path: Path, seed: int) -> None:
    killed_until_done(tmp_path, kills=10, seed=seed)


@pytest.mark.slow
def test_killed_while_it_is_made(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", [{"id": i, "text": f"text {i}"} for i in range(40)])
    (tmp_path / "gone.txt").write_text("")
    arguments = [str(tmp_path / name) for name in ("docs.jsonl", "db", "gone.txt")]
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03):
        attempt(arguments, delay)
    assert attempt(arguments, None)[0] == 0
    database = Database.open(tmp_path / "db")
    assert database.count() == 40
    assert {row["text"] for row in database.get("id", [str(i) for i in range(40)])} == {
        f"text {i}" for i in range(40)
    }
