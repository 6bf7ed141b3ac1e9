"""The training benchmarks: same texts in the same order for all sides, and their arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers.data import Pair, plan_steps, read_pairs
from peers.job import Job, JobError, run_job
from peers.report import rate, straight_line
from peers.setup import INSTRUCTION, STAGE, _order, _write_rows, prepare, train_config
from train_scaling import loss_seconds, synthetic_batch

from nvembed.core.files import write_jsonl
from nvembed.data.loading import load_mixture
from nvembed.training.stages import DataLoader


def make_pairs(count: int, *, shared_by: int = 1) -> list[Pair]:
    """Queries of which ``shared_by`` neighbours have the same document."""
    documents = [f"document {n // shared_by}" for n in range(count)]
    return [Pair(f"query {n}", d, frozenset({d})) for n, d in enumerate(documents)]


def step_rows(steps, batch_size):
    return [steps.rows[n : n + batch_size] for n in range(0, len(steps.rows), batch_size)]


def test_no_text_comes_twice_in_a_step_and_negatives_answer_nothing() -> None:
    steps = plan_steps(
        make_pairs(120, shared_by=3), steps=12, batch_size=8, num_negatives=3, seed=1
    )
    for rows in step_rows(steps, 8):
        texts = [text for row in rows for text in (row.query, row.positive, *row.negatives)]
        assert len(texts) == len(set(texts)) == 8 * 5
        assert not {row.positive for row in rows} & {n for row in rows for n in row.negatives}
    assert steps.put_off > 0
    queries = [row.query for row in steps.rows]
    assert len(set(queries)) == 96  # nothing comes again before all have come


def test_steps_are_a_function_of_the_seed() -> None:
    pairs = make_pairs(40)
    one, same, other = (
        plan_steps(pairs, steps=2, batch_size=4, num_negatives=2, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_a_step_of_all_documents_takes_each_once() -> None:
    steps = plan_steps(make_pairs(40), steps=1, batch_size=10, num_negatives=3, seed=0)
    texts = {text for row in steps.rows for text in (row.positive, *row.negatives)}
    assert texts == {f"document {n}" for n in range(40)}


def test_too_few_documents_are_told() -> None:
    with pytest.raises(ValueError, match=r"4 queries with 1 \+ 3 documents need 16 .* have 10"):
        plan_steps(make_pairs(10), steps=1, batch_size=4, num_negatives=3, seed=0)
    with pytest.raises(ValueError, match="no 8 queries with different documents"):
        plan_steps(
            [*make_pairs(20, shared_by=20), Pair("q", "d", frozenset(f"x{n}" for n in range(9)))],
            steps=1,
            batch_size=8,
            num_negatives=0,
            seed=0,
        )


def test_a_query_of_several_records_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": "a", "positive": ["x", "y"]}, {"query": "a", "positive": "z"}]
    write_jsonl(file, rows)
    assert read_pairs([file]) == [Pair("a", "x", frozenset({"x", "y"}))]


def test_our_trainer_reads_the_rows_in_the_order_of_the_steps(tmp_path: Path) -> None:
    steps = plan_steps(make_pairs(60), steps=3, batch_size=4, num_negatives=2, seed=0)
    job = Job("nvembed", str(tmp_path), "decoder", steps=3, batch_size=4, num_negatives=2)
    job = Job(**{**vars(job), "instruction": INSTRUCTION})
    _write_rows(tmp_path / "train.jsonl", steps, list(range(12)))
    _write_rows(tmp_path / "train.jsonl", steps, _order(job))
    config = train_config(job)
    assert config.stages[0].name == STAGE
    mixture = load_mixture(config.datasets, stage=1, base_dir=tmp_path)
    loader = DataLoader(mixture, config.stages[0], seed=config.seed, tokenizer=None)
    for number, rows in enumerate(step_rows(steps, 4)):
        batch = loader.batch(number)
        texts = [text for _, text in batch.texts]
        assert [texts[row] for row in batch.query_B] == [row.query for row in rows]
        documents = [texts[row] for row in batch.document_N]
        assert [documents[column] for column in batch.positive_B] == [r.positive for r in rows]
        assert set(documents) == {text for r in rows for text in (r.positive, *r.negatives)}
        assert batch.negative_BN.sum() == 4 * 11  # no negative is masked


def test_rate_leaves_the_first_steps_out() -> None:
    assert rate([100, 10, 20], [50.0, 1.0, 2.0], 1) == 10.0
    assert rate([100, 10, 20], [50.0, 1.0, 2.0], 0) == pytest.approx(130 / 53)


def test_a_straight_line_is_found_and_noise_is_told() -> None:
    x = np.arange(1.0, 9.0)
    intercept, slope, explained = straight_line(x, 0.5 + 2 * x)
    assert (intercept, slope, explained) == pytest.approx((0.5, 2.0, 1.0))
    assert straight_line(x, [1.0, -1.0] * 4)[2] < 0.2


def test_a_run_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho no such module: $2 >&2\nexit 3\n")
    interpreter.chmod(0o755)
    job = Job("FlagEmbedding", str(tmp_path), "decoder", steps=1, batch_size=2)
    with pytest.raises(JobError, match=r"(?s)ended with 3.*no such module: peers.flag_embedding"):
        run_job(job, interpreter)


def test_the_loss_of_a_made_batch_is_timed() -> None:
    batch = synthetic_batch(64)
    assert batch.negative_BN.shape == (16, 64)
    assert batch.negative_BN.sum() == 16 * 63
    assert 0 < loss_seconds(64, 1) < 5


@pytest.mark.slow
def test_all_sides_have_the_same_losses(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    steps = plan_steps(make_pairs(60), steps=4, batch_size=4, num_negatives=2, seed=0)
    job = Job(
        "nvembed",
        str(tmp_path),
        str(tiny_decoder_dir),
        steps=4,
        batch_size=4,
        num_negatives=2,
        learning_rate=1e-2,
        max_tokens=32,
        instruction="find",
        threads=1,
    )
    made = prepare(job, steps)
    assert len(made.step_tokens) == 4
    peer = "sentence-transformers"
    ours = run_job(made.job).losses
    assert len(set(ours)) == 4
    for options in ({}, {"cached": True, "mini_batch_size": 3}):
        theirs = run_job(made.job.of(peer, **options)).losses
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
