"""Intervals and tests against closed forms, scipy and simulation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hash_encoder import HashEncoder
from nvembed.core.errors import DataError
from nvembed.evaluation import significance
from nvembed.evaluation.local_scores import score_local
from nvembed.evaluation.results import Items, items_folder, read_items, write_items
from nvembed.evaluation.significance import (
    bootstrap,
    bootstrap_p,
    compare_items,
    holm,
    interval,
    mean_difference,
    sign_flip_p,
)
from nvembed.evaluation.task_files import TASK_TYPES
from nvembed.evaluation.tasks import load_task
from oracles import evaluation as oracle
from task_folders import write_task


def confidence_interval(items: Items, *, resamples: int) -> tuple[float, float, float]:
    """The main score, and the percentiles of its resamples."""
    scores, resampled = bootstrap([items], resamples)
    return float(scores[0]), *interval(resampled[0])


def values(array: np.ndarray) -> Items:
    return Items("values", "ndcg_at_10", "t", {"values_N": array})


def correlated(gold: np.ndarray, found: np.ndarray) -> Items:
    return Items("correlation", "spearman", "t", {"gold_N": gold, "similarities_N": found})


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_the_statistic_of_the_items_is_the_main_score(kind: str, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, kind))
    scored = score_local(task, HashEncoder(64))
    assert scored.items is not None
    score, low, high = confidence_interval(scored.items, resamples=200)
    assert score == pytest.approx(scored.scores[task.main_score], abs=1e-5)
    assert low <= score + 1e-9
    assert high >= low
    assert compare_items(scored.items, scored.items, resamples=200).p == 1
    write_items(tmp_path, kind, scored.items)
    back = read_items(tmp_path, kind)
    assert back is not None
    assert (back.kind, back.score, back.task_hash) == dataclasses.astuple(scored.items)[:3]
    assert all((back.arrays[key] == array).all() for key, array in scored.items.arrays.items())


@pytest.mark.parametrize("score", ["f1", "recall_weighted"])
def test_scores_of_classes(score: str, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "Classification", main_score=score))
    scored = score_local(task, HashEncoder(64))
    assert scored.items is not None
    found, low, high = confidence_interval(scored.items, resamples=100)
    assert found == pytest.approx(scored.scores[score])
    assert low < high


def test_ami_has_no_items(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "Clustering", main_score="ami"))
    assert score_local(task, HashEncoder(64)).items is None


def test_interval_of_a_mean_is_the_closed_form() -> None:
    array = np.random.default_rng(0).normal(3, 2, size=400)
    found = confidence_interval(values(array), resamples=8000)
    half = 1.96 * array.std() / 20
    assert found[1] == pytest.approx(array.mean() - half, abs=0.02)
    assert found[2] == pytest.approx(array.mean() + half, abs=0.02)
    assert found == confidence_interval(values(array), resamples=8000)


def test_interval_of_spearman_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    gold = rng.normal(size=60)
    found = gold + rng.normal(size=60)
    ours = confidence_interval(correlated(gold, found), resamples=4000)[1:]
    theirs = stats.bootstrap(
        (gold, found),
        lambda x, y: stats.spearmanr(x, y)[0],
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_sign_flips_are_all_of_them() -> None:
    differences = np.array([0.3, -0.1, 0.2, 0.0, 0.25, 0.1])
    assert sign_flip_p(differences) == pytest.approx(oracle.sign_flip_p(differences.tolist()))
    assert sign_flip_p(np.zeros(4)) == 1
    assert sign_flip_p(np.full(6, 0.5)) == 2 / 64


def test_drawn_sign_flips_are_near_those_of_scipy() -> None:
    differences = np.random.default_rng(2).normal(0.25, 1, size=60)
    ours = sign_flip_p(differences, resamples=20_000)
    theirs = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue
    assert ours == pytest.approx(theirs, abs=0.01)
    assert 0.001 < ours < 0.5


@pytest.mark.parametrize("at_once", [700, 4_000_000])
def test_drawn_sign_flips_are_counted_in_all_chunks(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty equal differences the number of plus signs is binomial."""
    monkeypatch.setattr(significance, "_NUMBERS_AT_ONCE", at_once)
    differences = np.concatenate([np.full(14, 0.5), np.full(6, -0.5), np.zeros(30)])
    wanted = 2 * stats.binom.cdf(6, 20, 0.5)
    assert sign_flip_p(differences, resamples=20_000) == pytest.approx(wanted, abs=0.01)
    # All the same way round: no drawing reaches it but the data themselves.
    assert sign_flip_p(np.full(40, 0.1), resamples=999) == 1 / 1000
    # So few differences are counted exactly, one more is drawn.
    assert sign_flip_p(np.full(14, 0.1), resamples=999) == 2 / 2**14


def test_resamples_in_chunks_are_as_many_and_vary_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 100))
    pair = values(one), values(two + 0.2)
    error = (two - one).std() / 10
    for at_once in (250, 4_000_000):  # two resamples at a time, or all
        monkeypatch.setattr(significance, "_NUMBERS_AT_ONCE", at_once)
        found = compare_items(*pair, resamples=1001)
        assert len(found.resampled_B) == 1001
        assert found.resampled_B.std() == pytest.approx(error, rel=0.1)
        assert found.resampled_B.mean() == pytest.approx(found.value, abs=error / 5)
        assert len(set(found.resampled_B.tolist())) > 990  # every chunk is drawn anew


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_p_counts_the_smaller_side_twice() -> None:
    assert bootstrap_p(np.array([1.0] * 97 + [-1.0] * 2)) == pytest.approx(2 * 3 / 100)
    assert bootstrap_p(np.zeros(50)) == 1


@pytest.mark.parametrize("kind", ["values", "correlation"])
def test_equal_models_are_rarely_told_apart_and_unequal_ones_are(kind: str) -> None:
    rng = np.random.default_rng(3)
    false, trials = 0, 300
    for trial in range(trials):
        gold = rng.normal(size=80)
        one, two = gold + rng.normal(size=(2, 80))
        if kind == "values":
            pair = values(one), values(two)
        else:
            pair = correlated(gold, one), correlated(gold, two)
        false += compare_items(*pair, resamples=400, seed=trial).p < 0.05
    assert 0.01 < false / trials < 0.09  # 5 % wanted; the standard error is 1.3 %
    better = gold + 0.3 * rng.normal(size=80)
    if kind == "correlation":
        found = compare_items(correlated(gold, one), correlated(gold, better))
    else:
        found = compare_items(values(one), values(one + 0.5 + 0.1 * gold))
    assert found.p < 0.01
    assert 0 < found.low < found.value < found.high


def test_pairing_helps() -> None:
    hard = np.random.default_rng(4).normal(size=200)  # most of the spread is the queries' own
    noise = np.random.default_rng(5).normal(size=200)
    found = compare_items(values(hard), values(hard + 0.05 + 0.1 * noise))
    assert found.high - found.low < 0.05
    assert found.p < 0.01


def test_an_average_varies_less_than_its_tasks() -> None:
    rng = np.random.default_rng(6)
    pairs = [rng.normal(size=(2, 100)) for _ in range(4)]
    found = [
        compare_items(*(Items("values", "map", str(n), {"values_N": v}) for v in pair))
        for n, pair in enumerate(pairs)
    ]
    mean, low, high = mean_difference(found)
    assert mean == pytest.approx(np.mean([one.value for one in found]))
    widths = [one.high - one.low for one in found]
    assert high - low == pytest.approx(np.mean(widths) / 2, rel=0.15)


def test_items_of_other_tasks_are_refused() -> None:
    other = dataclasses.replace(values(np.ones(3)), task_hash="u")
    with pytest.raises(ValueError, match="different tasks"):
        compare_items(values(np.ones(3)), other)


def test_item_files(tmp_path: Path) -> None:
    folder = items_folder(tmp_path / "a.json")
    assert folder == tmp_path / "a.items"
    assert read_items(folder, "group/task") is None
    write_items(folder, "group/task", values(np.ones(3)))
    file = folder / "group%2Ftask.npz"
    assert file.is_file()
    for content in (b"", b"PK no", file.read_bytes()[:-40]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not items of an evaluation"):
            read_items(folder, "group/task")
    np.savez(file, kind=np.array("values"), score=np.array("map"), task_hash=np.array("t"))
    with pytest.raises(DataError, match="evaluate the task again"):
        read_items(folder, "group/task")
