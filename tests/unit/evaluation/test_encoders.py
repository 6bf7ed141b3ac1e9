"""Encoders around encoders: what is kept is equal and asked for once; processes give the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hash_encoder import HashEncoder
from noting import Counting
from nvembed.core.errors import DataError, ModelError, UserError
from nvembed.evaluation import encoders as module
from nvembed.evaluation.encoders import CachedEncoder, shared_encoder, shares
from nvembed.evaluation.session import Settings, run_session
from nvembed.evaluation.tasks import load_tasks
from nvembed.model.encoder import load_encoder
from task_folders import write_task

# --- vectors on disk ------------------------------------------------------------------------------


def test_texts_are_told_apart_by_model_side_instruction_and_themselves(tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedEncoder(inner, tmp_path, "one")
    texts = ["a cat", "a dog"]
    plain = HashEncoder(64).encode_query(texts, task="find")
    for _ in range(2):
        assert np.array_equal(cached.encode_query(texts, task="find"), plain)
    assert len(inner.asked) == 2
    cached.encode_query(texts)  # another instruction
    cached.encode_document(texts, task="find")  # another side
    CachedEncoder(inner, tmp_path, "two").encode_query(texts, task="find")  # another model
    assert len(inner.asked) == 8
    cached.encode_query(["a dog ", "a cat", "a dog"], task="find")  # another text
    assert inner.asked[8:] == [("query", "a dog ", "find")]
    assert cached.encode_query([]).shape == (0, 64)


@pytest.mark.parametrize("seed", range(5))
def test_any_batches_give_the_encoders_vectors_and_ask_once(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_TEXTS", 7)
    draw, inner, plain = random.Random(seed), Counting(), HashEncoder(64)
    pool = [f"text {number} é" for number in range(60)]
    encoders = [CachedEncoder(inner, tmp_path, "m") for _ in range(3)]  # as other processes have
    for _ in range(40):
        texts = draw.choices(pool, k=draw.randint(0, 30))
        task = draw.choice([None, "find"])
        found = draw.choice(encoders).encode_document(texts, task=task)
        assert np.array_equal(found, plain.encode_document(texts, task=task))
    assert len(inner.asked) == len(set(inner.asked))
    before = len(inner.asked)
    again = CachedEncoder(inner, tmp_path, "m")
    known = [text for side, text, task in inner.asked if task is None]
    draw.shuffle(known)
    assert np.array_equal(again.encode_document(known), plain.encode_document(known))
    assert len(inner.asked) == before
    assert not list(tmp_path.rglob(".*"))


def test_one_changed_document_costs_one_text(tmp_path: Path) -> None:
    inner = Counting()
    texts = [f"document {number}" for number in range(3000)]
    CachedEncoder(inner, tmp_path, "m").encode_document(texts)
    assert len(inner.asked) == 3000
    texts[1234] += " changed"
    CachedEncoder(inner, tmp_path, "m").encode_document(texts[::-1])
    assert [text for _, text, _ in inner.asked[3000:]] == ["document 1234 changed"]


def test_what_is_damaged_or_wrong_is_told(tmp_path: Path) -> None:
    inner = Counting()
    CachedEncoder(inner, tmp_path, "one").encode_query(["a", "b"])
    with pytest.raises(DataError, match=r"holds vectors of shape \(2, 64\).*is 32.*disagree"):
        CachedEncoder(HashEncoder(32), tmp_path, "one").encode_query(["a"])
    (vectors,), (keys,) = tmp_path.rglob("vectors-*.npy"), tmp_path.rglob("keys-*.npy")
    vectors.write_bytes(vectors.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"vectors-\w+\.npy: cannot be read .*embedded again"):
        CachedEncoder(inner, tmp_path, "one").encode_query(["a"])
    keys.unlink()  # as if killed between the two files: both are made again
    again = CachedEncoder(inner, tmp_path, "one").encode_query(["a", "b"])
    assert np.array_equal(again, HashEncoder(64).encode_query(["a", "b"]))


def test_vectors_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Broken(HashEncoder):
        def encode_query(self, texts: object, *, task: str | None = None) -> np.ndarray:
            return np.full((1, 64), np.nan, dtype=np.float32)

    with pytest.raises(ModelError, match="NaN"):
        CachedEncoder(Broken(64), tmp_path, "m").encode_query(["a"])
    assert not list(tmp_path.rglob("*.npy"))
    assert not list(tmp_path.rglob(".*"))


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_even_and_hold_every_text_once(seed: int) -> None:
    draw = random.Random(seed)
    texts = ["x" * draw.randint(0, 500) for _ in range(draw.randint(3, 200))]
    parts = shares(texts, 3)
    assert sorted(row for part in parts for row in part) == list(range(len(texts)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    lengths = [sum(len(texts[row]) for row in part) for part in parts]
    assert max(lengths) - min(lengths) <= 500  # one text
    assert shares(["a"], 3) == [[0]]
    assert shares([], 3) == []


@pytest.mark.slow
def test_one_task_is_shared_and_a_death_is_told(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    name = str(tiny_decoder_dir)
    texts = [f"a cat {'and a dog ' * (number % 7)}{number}" for number in range(50)]
    with shared_encoder(name, None, 2) as shared:
        found = shared.encode_document(texts, task="find")
        expected = load_encoder(name, None).encode_document(texts, task="find")
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert shared.encode_query([]).shape == (0, shared.dimension)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].join(10)
        for _ in range(2):
            with pytest.raises(UserError, match="a process died"):
                shared.encode_query(texts)
    with pytest.raises(ModelError), shared_encoder(str(tmp_path / "none"), None, 2):
        pass


@pytest.mark.slow
def test_scores_on_two_processes(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    for name, kind in (("find", "Retrieval"), ("similar", "STS")):
        write_task(tmp_path / "tasks" / name, kind)
    model, tasks = str(tiny_decoder_dir), load_tasks([tmp_path / "tasks"])
    alone = run_session(Settings(model, tmp_path / "a.json"), tasks)
    both = run_session(Settings(model, tmp_path / "b.json", cache=tmp_path), tasks, processes=2)
    assert {n: r.scores for n, r in both.results.items()} == {
        n: pytest.approx(r.scores, abs=1e-6) for n, r in alone.results.items()
    }


DRIVER = """
import multiprocessing, sys, time
from nvembed.evaluation.encoders import shared_encoder

if __name__ == "__main__":
    with shared_encoder(sys.argv[1], None, 2) as shared:
        shared.encode_query(["a", "b"])
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_the_processes_die_with_the_one_that_started_them(
    tmp_path: Path, tiny_decoder_dir: Path
) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tiny_decoder_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # What is left over after the kill is told on stderr by the resource tracker.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_lives(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        # A zombie that nobody waits for counts as dead.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
