"""Graded pairs and spread: values and gradients of sentence-transformers, and a run with both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    GlobalOrthogonalRegularizationLoss,
)
from torch.nn.functional import normalize

from nvembed.core.files import write_jsonl
from nvembed.data.batch import ContrastiveBatch, build_batch
from nvembed.data.examples import Example, make_source
from nvembed.data.records import PairRecord, StsRecord
from nvembed.model.encoder import load_encoder
from nvembed.training.config import StageConfig, TrainConfig
from nvembed.training.contrastive_loss import Evaluated, Objective, evaluate_objective
from nvembed.training.loss_config import CosentConfig, SpreadConfig
from nvembed.training.trainer import train

WIDTH = 6
SCORES = [0.0, 5.0, 2.5, 2.5, 3.8, 1.0]
RECORDS = [StsRecord(f"a cat {i}", f"one dog {i}", score) for i, score in enumerate(SCORES)]


def batch_of(*examples: Example) -> ContrastiveBatch:
    return build_batch(examples, in_batch_negatives=True)


def graded() -> ContrastiveBatch:
    source = make_source(RECORDS, "sts", name="sts", instruction="like", graded=True)
    rng = np.random.default_rng(0)
    return batch_of(*(source.example(row, rng, 3) for row in range(len(source))))


def embeddings(batch: ContrastiveBatch) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch.texts), WIDTH)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return normalize(drawn + 1.0, dim=1)


def evaluated(objective: Objective, batch: ContrastiveBatch) -> Evaluated:
    return evaluate_objective(objective, embeddings(batch), batch, total_weight=batch.labelled)


def test_all_pairs_are_used_as_they_are() -> None:
    batch = graded()
    assert len(batch.query_B) == 0
    assert {prompt for prompt, _ in batch.texts} == {"Instruct: like\nQuery: "}
    assert batch.graded is not None
    rows_P2 = batch.graded.rows_2P.T.tolist()
    found = [tuple(batch.texts[row][1] for row in pair) for pair in rows_P2]
    assert found == [(record.sentence1, record.sentence2) for record in RECORDS]
    assert batch.graded.score_P.tolist() == pytest.approx(SCORES)
    # The paper's way: both directions of the one pair that scores 4 or more.
    assert len(make_source(RECORDS, "sts", name="sts", instruction="like")) == 2


@pytest.mark.parametrize("dimensions", [None, (2, 6)])
def test_cosent_equals_theirs(dimensions: tuple[int, ...] | None) -> None:
    batch = graded()
    assert batch.graded is not None
    objective = Objective(
        0.1, dimensions=dimensions, cosent=CosentConfig(weight=0.7, temperature=0.2)
    )
    found = evaluated(objective, batch)
    leaf_UD = embeddings(batch).requires_grad_()
    oracle: Any = CoSENTLoss(torch.nn.Identity(), scale=5.0)  # type: ignore[arg-type]
    first_P, second_P = batch.graded.rows_2P
    widths = dimensions or (WIDTH,)
    expected = sum(
        oracle.compute_loss_from_embeddings(
            [leaf_UD[first_P, :width], leaf_UD[second_P, :width]], torch.tensor(SCORES)
        )
        for width in widths
    )
    expected = 0.7 * expected / len(widths)
    expected.backward()
    assert expected.item() > 0.5
    assert found.parts == {"cosent": pytest.approx(expected.item(), rel=1e-9)}
    assert_tangential(found.gradient_UD, leaf_UD)


@pytest.mark.parametrize("queries", [1, 18])
def test_a_graded_pair_weighs_as_much_as_a_query(queries: int) -> None:
    records = [PairRecord(f"q{i}", (f"p{i}", f"r{i}"), (f"n{i}",)) for i in range(queries)]
    source = make_source(records, "retrieval", name="pairs", instruction="find")
    rng, alone = np.random.default_rng(0), graded()
    pairs = make_source(RECORDS, "sts", name="sts", instruction="like", graded=True)
    examples = [pairs.example(row, rng, 3) for row in range(len(pairs))]
    mixed = batch_of(*examples, *(source.example(row, rng, 1, 2) for row in range(queries)))
    assert len(mixed.query_B) == 2 * queries  # rows; the two of a query weigh as one
    assert [text for text in mixed.texts if text in alone.texts] == list(alone.texts)
    leaf_UD, rows = embeddings(mixed), [mixed.texts.index(text) for text in alone.texts]
    pairs_alone = Objective(0.1, contrastive=None, cosent=CosentConfig(temperature=0.2))
    of_pairs = evaluate_objective(pairs_alone, leaf_UD[rows], alone, total_weight=len(SCORES))
    of_queries = evaluate_objective(Objective(0.1), leaf_UD, mixed, total_weight=queries)
    found = evaluated(replace(pairs_alone, contrastive=1.0), mixed)
    share = len(SCORES) / (len(SCORES) + queries)
    assert min(of_pairs.loss, of_queries.loss) > 0.1
    assert found.parts == {
        "contrastive": pytest.approx((1 - share) * of_queries.loss, rel=1e-6),
        "cosent": pytest.approx(share * of_pairs.loss, rel=1e-9),
    }
    expected_UD = (1 - share) * of_queries.gradient_UD
    expected_UD[rows] += share * of_pairs.gradient_UD
    torch.testing.assert_close(found.gradient_UD, expected_UD, rtol=1e-6, atol=1e-9)


def assert_tangential(gradient_UD: torch.Tensor, leaf_UD: torch.Tensor) -> None:
    """Gradients are equal but for that of the length, which is 1 for us and divided out there."""
    unit_UD = leaf_UD.detach()
    assert leaf_UD.grad is not None
    along_U = (gradient_UD * unit_UD).sum(dim=1, keepdim=True)
    mine_UD = gradient_UD - along_U * unit_UD
    assert mine_UD.abs().max() > 1e-3
    torch.testing.assert_close(mine_UD, leaf_UD.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mean", [None, 0.5])
@pytest.mark.parametrize("second", [None, 2.0])
def test_spread_equals_theirs(mean: float | None, second: float | None) -> None:
    if mean is second is None:
        with pytest.raises(ValueError, match="both off"):
            SpreadConfig(mean=None, second_moment=None)
        return
    records = [PairRecord(f"q{i}", (f"p{i}",), (f"n{i}",)) for i in range(5)]
    source = make_source(records, "retrieval", name="pairs", instruction="find")
    rng = np.random.default_rng(0)
    batch = batch_of(*(source.example(row, rng, 1) for row in range(5)))
    spread = SpreadConfig(mean=mean, second_moment=second)
    found = evaluated(Objective(0.1, contrastive=None, spread=spread), batch)
    leaf_UD = embeddings(batch).requires_grad_()
    oracle: Any = GlobalOrthogonalRegularizationLoss(
        torch.nn.Identity(),  # type: ignore[arg-type]
        mean_weight=mean,
        second_moment_weight=second,
    )
    sides = [leaf_UD[torch.as_tensor(rows)] for rows in (batch.query_B, batch.document_N)]
    parts = oracle.compute_loss_from_embeddings(sides)
    sum(parts.values()).backward()
    expected = {name.replace("gor", "spread"): value.item() for name, value in parts.items()}
    assert all(value > 1e-3 for value in expected.values())
    assert found.parts == pytest.approx(expected, rel=1e-9)
    assert_tangential(found.gradient_UD, leaf_UD)


def test_one_text_of_a_side_is_no_error() -> None:
    source = make_source([PairRecord("q", ("p",))], "retrieval", name="one", instruction="find")
    batch = batch_of(source.example(0, np.random.default_rng(0), 1))
    found = evaluated(Objective(0.1, spread=SpreadConfig()), batch)
    assert found.loss == 0.0
    assert torch.isfinite(found.gradient_UD).all()


def test_a_run_orders_graded_pairs(tmp_path: Path, tiny_decoder_dir: Path) -> None:
    colours = ["red", "blue", "green", "fox", "owl", "cat", "tree", "lake"]
    pairs = [
        {
            "sentence1": f"a {one}",
            "sentence2": f"the {other}",
            "score": float(5 * (i == j) + (i < j)),
        }
        for i, one in enumerate(colours)
        for j, other in enumerate(colours)
    ]
    write_jsonl(tmp_path / "sts.jsonl", pairs)
    dataset = {"name": "sts", "path": "sts.jsonl", "kind": "sts", "instruction": "like"}
    stage: dict[str, Any] = {"name": "one", "steps": 30, "batch_size": 32, "learning_rate": 3e-3}
    stage |= {"in_batch_negatives": False, "cosent": {"temperature": 0.1}, "spread": {"mean": 0.1}}
    stage |= {"warmup_steps": 1}
    config = TrainConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"backbone": str(tiny_decoder_dir), "pooling": {"kind": "mean"}},
            "lora": None,
            "datasets": [{**dataset, "stages": [1]}],
            "stages": [stage],
            "precision": "float32",
        }
    )
    folder = train(config, base_dir=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert set(rows[0]["parts"]) == {"cosent", "spread_mean", "spread_second_moment"}
    assert rows[-1]["parts"]["cosent"] < 0.6 * rows[0]["parts"]["cosent"]
    model = load_encoder(str(folder))
    first, second = (
        model.encode_query([row[key] for row in pairs], task="like")
        for key in ("sentence1", "sentence2")
    )
    cosines, scores = (first * second).sum(axis=1), np.array([row["score"] for row in pairs])
    assert np.corrcoef(cosines, scores)[0, 1] > 0.6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spread": {"mean": None, "second_moment": None}}, "both off"),
        ({"contrastive": None, "spread": {}}, "nothing to learn"),
    ],
)
def test_contradictions_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StageConfig.model_validate(
            {"name": "one", "steps": 1, "in_batch_negatives": True, **changes}
        )
