from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from nvembed.core.errors import DataError
from nvembed.core.files import write_jsonl
from nvembed.data.batch import Mixture, tempered_weights
from nvembed.data.config import DatasetConfig
from nvembed.data.examples import Example, make_source
from nvembed.data.loading import load_mixture, load_source
from nvembed.data.records import PairRecord


def mixture(sizes: list[int], weights: list[float] | None = None) -> Mixture:
    sources = [
        make_source(
            [PairRecord(f"{name}-q{n}", ("p1", "p2"), ("n1", "n2", "n3")) for n in range(size)],
            "retrieval",
            name=f"set{name}",
            instruction=None,
        )
        for name, size in enumerate(sizes)
    ]
    return Mixture(sources, weights or [float(size) for size in sizes])


mixtures = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=6)
seeds = st.integers(0, 2**63 - 1)


@settings(max_examples=100, deadline=None)
@given(mixtures, seeds, st.integers(0, 2000))
def test_order_properties(sets: list[tuple[int, float]], seed: int, num_examples: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    of = mixture(sizes, weights)
    order = of.order(seed, num_examples)
    assert order.shape == (num_examples, 2)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, mixture(sizes, weights).order(seed, num_examples))
    # The order of fewer slots begins the order of more.
    np.testing.assert_array_equal(of.order(seed, num_examples // 3), order[: num_examples // 3])
    for number, (size, weight) in enumerate(sets):
        walked = order[order[:, 0] == number, 1]
        share = num_examples * weight / sum(weights)
        # The sequence of the golden ratio covers an interval to within the logarithm of the length.
        assert abs(len(walked) - share) <= 2 + math.log2(num_examples + 1)
        for start in range(0, len(walked), size):
            epoch = walked[start : start + size]
            assert len(set(epoch.tolist())) == len(epoch)
        assert set(walked.tolist()) <= set(range(size))


def test_every_stretch_is_blended() -> None:
    order = mixture([10, 10, 10], [1, 2, 7]).order(0, 10_000)
    for start in range(0, 10_000, 100):
        counts = np.bincount(order[start : start + 100, 0], minlength=3)
        assert np.abs(counts - [10, 20, 70]).max() <= 4


def test_equal_shares_finish_their_epochs_together() -> None:
    of = mixture([50, 200, 750])
    order = of.order(3, 1000)
    for number, size in enumerate([50, 200, 750]):
        walked = order[order[:, 0] == number, 1]
        assert abs(len(walked) - size) <= 3
        assert len(set(walked.tolist())) >= size - 3


def test_epochs_and_seeds_differ() -> None:
    of = mixture([100, 100])
    order = of.order(1, 400)
    first = order[order[:, 0] == 0, 1]
    assert first[:100].tolist() != sorted(first[:100].tolist())
    assert first[:100].tolist() != first[100:].tolist()
    assert first[:50].tolist() != order[order[:, 0] == 1, 1][:50].tolist()
    other = of.order(2, 400)
    assert (other[:, 0] != order[:, 0]).any()  # another seed blends otherwise
    assert other[other[:, 0] == 0, 1][:100].tolist() != first[:100].tolist()


def test_adding_a_source_does_not_reshuffle_the_others() -> None:
    two, three = mixture([40, 40]).order(7, 300), mixture([40, 40, 40]).order(7, 300)
    for number in range(2):
        walked = [order[order[:, 0] == number, 1] for order in (two, three)]
        shorter = min(map(len, walked))
        np.testing.assert_array_equal(walked[0][:shorter], walked[1][:shorter])


def test_examples_depend_on_seed_and_slot_alone() -> None:
    of = mixture([5, 5])
    order = of.order(0, 60)
    options: dict[str, Any] = {"seed": 11, "num_negatives": 2}
    whole = of.examples(order, 0, 60, **options)
    parts = [of.examples(order, start, start + 7, **options) for start in range(0, 60, 7)]
    assert [example for part in parts for example in part] == whole
    assert [(e.dataset, e.query) for e in whole] == [
        (f"set{source}", f"{source}-q{index}") for source, index in order
    ]
    assert of.examples(order, 0, 60, seed=12, num_negatives=2) != whole
    drawn = {(e.positive, e.negatives) for e in whole if e.query == whole[0].query}
    assert len(drawn) > 1  # the next epoch draws anew


@settings(max_examples=50, deadline=None)
@given(mixtures, seeds, st.integers(0, 300), st.integers(1, 12))
def test_homogeneous_runs(
    sets: list[tuple[int, float]], seed: int, num_runs: int, run_length: int
) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    of = mixture(sizes, weights)
    order = of.order(seed, num_runs * run_length, run_length=run_length)
    sources = order[:, 0].reshape(num_runs, run_length)
    assert (sources == sources[:, :1]).all()
    # The runs come as the slots of a mixed order do.
    np.testing.assert_array_equal(sources[:, 0], of.order(seed, num_runs)[:, 0])
    np.testing.assert_array_equal(
        of.order(seed, len(order) // 3, run_length=run_length), order[: len(order) // 3]
    )
    # Each source is walked in the same epochs, whatever the runs.
    mixed = of.order(seed, num_runs * run_length)
    for number, size in enumerate(sizes):
        walks = [found[found[:, 0] == number, 1] for found in (order, mixed)]
        shorter = min(map(len, walks))
        same = walks[0][: shorter // size * size], walks[1][: shorter // size * size]
        np.testing.assert_array_equal(*same)


def test_homogeneous_runs_keep_the_shares_and_walk_whole_epochs() -> None:
    order = mixture([6, 3], [2, 1]).order(0, 900, run_length=3)
    runs = order.reshape(300, 3, 2)
    assert abs((runs[:, 0, 0] == 0).sum() - 200) <= 3
    for source, per_epoch in ((0, 2), (1, 1)):
        walked = runs[runs[:, 0, 0] == source, :, 1]
        for start in range(0, len(walked) - per_epoch, per_epoch):
            epoch = walked[start : start + per_epoch].ravel().tolist()
            assert sorted(epoch) == list(range(3 * per_epoch))


def test_the_order_and_the_draws_are_those_of_earlier_versions() -> None:
    of = mixture([5, 9])
    order = of.order(3, 12)
    assert order[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0]
    assert order[:, 1].tolist() == [3, 8, 2, 2, 0, 1, 0, 7, 1, 6, 4, 4]
    drawn = of.examples(order, 0, 4, seed=3, num_negatives=2)
    assert [" ".join((e.positive, *e.negatives)) for e in drawn] == [
        "p2 n2 n1",
        "p2 n3 n2",
        "p1 n3 n2",
        "p2 n2 n3",
    ]


def test_several_positives_reach_the_examples() -> None:
    of = mixture([5, 5])
    order = of.order(0, 20)
    one = of.examples(order, 0, 20, seed=1, num_negatives=2)
    two = of.examples(order, 0, 20, seed=1, num_negatives=2, num_positives=2)
    assert [e.negatives for e in one] == [e.negatives for e in two]
    for single, double in zip(one, two, strict=True):
        assert single.further_positives == ()
        assert {double.positive, *double.further_positives} == {"p1", "p2"}
        assert double.positive == single.positive


def test_temperature_evens_out_the_sets_without_a_weight() -> None:
    assert tempered_weights([1, 100, 899], [None] * 3, 1.0) == [1.0, 100.0, 899.0]
    # Square roots 1, 10 and 30, scaled to the same sum.
    assert tempered_weights([1, 100, 900], [None] * 3, 2.0) == pytest.approx(
        [1001 / 41, 10010 / 41, 30030 / 41]
    )
    # A given weight keeps its share: 500 of 1000 before and after.
    weights = tempered_weights([100, 7, 400], [None, 500.0, None], 2.0)
    assert weights == pytest.approx([500 / 3, 500.0, 1000 / 3])
    assert tempered_weights([3], [2.0], 4.0) == [2.0]
    assert tempered_weights([3, 700], [None, None], 1e9) == pytest.approx([351.5, 351.5])


def test_an_order_of_many_slots_is_quick() -> None:
    of = mixture([3, 1000, 20_000])
    order = of.order(0, 500_000)
    assert np.bincount(order[:, 0]).tolist() == pytest.approx(
        [500_000 * size / 21_003 for size in (3, 1000, 20_000)], abs=21
    )


# --- from files -----------------------------------------------------------------------------------

PAIRS = [{"query": f"q{n}", "positive": f"p{n}"} for n in range(6)]
LABELS = [{"text": f"t{n}", "label": "abc"[n % 3]} for n in range(9)]


def dataset(name: str, **changes: Any) -> DatasetConfig:
    values = {"name": name, "path": f"{name}.jsonl", "kind": "retrieval", "instruction": None}
    return DatasetConfig(**(values | changes))


def test_loads_the_sets_of_a_stage_relative_to_the_recipe(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "pairs.jsonl.gz", PAIRS)
    write_jsonl(tmp_path / "labels.jsonl", LABELS)
    pairs = dataset("pairs", path="data/pairs.jsonl.gz", weight=2.5, instruction="find")
    labels = dataset("labels", kind="clustering", stages=(2,), max_records=4)
    of = load_mixture([pairs, labels], stage=1, base_dir=tmp_path)
    assert [source.name for source in of.sources] == ["pairs"]
    assert of.weights == [2.5]
    of = load_mixture([pairs, labels], stage=2, base_dir=tmp_path)
    assert [len(source) for source in of.sources] == [6, 4]
    assert of.weights == [2.5, 4.0]
    hot = load_mixture([pairs, labels], stage=2, base_dir=tmp_path, temperature=3.0)
    assert hot.weights == pytest.approx([2.5, 4.0])  # one set alone has nothing to even out
    assert of.sources[0].example(2, np.random.default_rng(0), 3) == Example(
        "q2", "p2", (), ("p2",), (), "find", False, "pairs"
    )
    by_label = dataset("labels", kind="clustering", conversion="label")
    example = load_source(by_label, base_dir=tmp_path).example(1, np.random.default_rng(0), 2)
    assert example.positive == "b"


def test_an_absolute_path_stays_as_it_is(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config = dataset("pairs", path=str(tmp_path / "pairs.jsonl"))
    assert len(load_source(config, base_dir=Path("/elsewhere"))) == 6


def test_all_broken_files_are_reported_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", [*PAIRS, {"query": "q"}])
    write_jsonl(tmp_path / "two.jsonl", PAIRS)
    configs = [dataset("one"), dataset("two"), dataset("three")]
    with pytest.raises(DataError) as caught:
        load_mixture(configs, stage=1, base_dir=tmp_path)
    text = str(caught.value)
    assert text.startswith("2 data sets cannot be used: ")
    assert f'{tmp_path}/one.jsonl:7: missing "positive"' in text
    assert f"{tmp_path}/three.jsonl: no such file" in text
    with pytest.raises(DataError) as caught:
        load_mixture(configs[:2], stage=1, base_dir=tmp_path)
    assert caught.value.where == f"{tmp_path}/one.jsonl:7"


@pytest.mark.parametrize(
    "change",
    [
        {"path": ""},
        {"kind": "pairs"},
        {"weight": 0},
        {"weight": float("inf")},
        {"max_records": 0},
        {"stages": ()},
        {"stages": (0,)},
        {"conversion": "label"},
        {"format": "jsonl"},
    ],
)
def test_refuses_configurations_that_mean_nothing(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        dataset("pairs", **change)


def test_a_source_without_a_weight_weighs_its_queries(shared: Any) -> None:
    folder = shared("data/train")
    config = dataset("stsb", path="stsb.jsonl.gz", kind="sts", instruction="match")
    of = load_mixture([config], stage=1, base_dir=folder)
    assert of.weights == [2.0 * 91]  # 91 pairs score 4 or more
    examples = of.examples(of.order(0, 182), 0, 182, seed=0, num_negatives=7)
    assert all(len(set(example.negatives)) == 7 for example in examples)
    assert len({example.query for example in examples}) > 150
