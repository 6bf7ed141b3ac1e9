"""The objective in pieces: value and gradient of the written-out loss, whatever the piece size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvembed.data.batch import ContrastiveBatch, TeacherScores
from nvembed.training.contrastive_loss import (
    Objective,
    evaluate_objective,
    info_nce,
    scores,
)
from nvembed.training.text_losses import distillation

QUERIES, DOCUMENTS, WIDTH = 7, 11, 6


def case(seed: int = 0, *, teacher: bool = False) -> tuple[torch.Tensor, ContrastiveBatch]:
    """Embeddings of length 1 in float64 and a batch in which texts are shared."""
    rng = np.random.default_rng(seed)
    texts = QUERIES + DOCUMENTS
    embedding_UD = torch.from_numpy(rng.standard_normal((texts, WIDTH)))
    embedding_UD = torch.nn.functional.normalize(embedding_UD, dim=1)
    rows = rng.permutation(texts)
    query_B = rows[:QUERIES].copy()
    query_B[1] = query_B[0]  # two queries of one text
    document_N = rows[QUERIES - 1 :][:DOCUMENTS]  # the last query is a document as well
    positive_B = rng.integers(DOCUMENTS, size=QUERIES)
    negative_BN = rng.random((QUERIES, DOCUMENTS)) < 0.6
    negative_BN[3] = False
    negative_BN[np.arange(QUERIES), positive_B] = False
    scores = None
    if teacher:
        column_BK = np.stack([rng.permutation(DOCUMENTS)[:4] for _ in range(QUERIES)])
        score_BK = rng.standard_normal((QUERIES, 4)).astype(np.float32) * 3
        column_BK[2, 3] = -1
        score_BK[4] = np.nan
        score_BK[5, 1] = np.nan
        scores = TeacherScores(column_BK, score_BK)
    weight_B = rng.random(QUERIES).astype(np.float32)
    batch = ContrastiveBatch(
        tuple(("", str(row)) for row in range(texts)),
        query_B,
        document_N,
        positive_B,
        negative_BN,
        weight_B,
        texts,
        scores,
    )
    return embedding_UD, batch


def written_out(
    objective: Objective, embedding_UD: torch.Tensor, batch: ContrastiveBatch, temperature
) -> torch.Tensor:
    """The definition, one query and one candidate at a time."""
    total = embedding_UD.new_zeros(())
    widths = objective.dimensions or (embedding_UD.shape[1],)
    for width in widths:
        cut = embedding_UD
        if width < embedding_UD.shape[1]:
            cut = torch.nn.functional.normalize(embedding_UD[:, :width], dim=1)
        for b in range(len(batch.query_B)):
            query = cut[batch.query_B[b]]

            def score(n: int, query=query, cut=cut) -> torch.Tensor:
                return query @ cut[batch.document_N[n]]

            up = torch.exp(score(batch.positive_B[b]) / temperature)
            down = up
            for n in np.flatnonzero(batch.negative_BN[b]):
                weight = math.exp((objective.hardness or 0.0) * score(n).item())
                down = down + weight * torch.exp(score(n) / temperature)
            loss = -torch.log(up / down)
            if objective.distillation_weight is not None and batch.teacher is not None:
                own = [
                    (score(n), float(taught))
                    for n, taught in zip(
                        batch.teacher.column_BK[b], batch.teacher.score_BK[b], strict=True
                    )
                    if n >= 0 and np.isfinite(taught)
                ]
                if len(own) > 1:
                    student = torch.stack([s for s, _ in own]) / temperature
                    target = torch.tensor([t for _, t in own], dtype=torch.float64)
                    target = (target / objective.teacher_temperature).softmax(0)
                    loss = loss + objective.distillation_weight * torch.nn.functional.kl_div(
                        student.log_softmax(0), target, reduction="sum"
                    )
            total = total + float(batch.weight_B[b]) * loss
    return total / len(widths) / float(batch.weight_B.sum())


OBJECTIVES = {
    "plain": Objective(0.1),
    "hardness": Objective(0.2, hardness=3.0),
    "matryoshka": Objective(0.1, dimensions=(2, 4, 6)),
    "distillation": Objective(0.1, distillation_weight=0.7, teacher_temperature=2.0),
    "all": Objective(0.3, 2.0, (3, 6), 0.5, 1.5),
}


@pytest.mark.parametrize("piece_scores", [1, 25, 10_000])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_definition(name: str, piece_scores: int) -> None:
    objective = OBJECTIVES[name]
    embedding_UD, batch = case(teacher=objective.distillation_weight is not None)
    found = evaluate_objective(
        objective,
        embedding_UD,
        batch,
        total_weight=float(batch.weight_B.sum()),
        piece_scores=piece_scores,
    )
    leaf_UD = embedding_UD.clone().requires_grad_()
    expected = written_out(objective, leaf_UD, batch, objective.temperature)
    expected.backward()
    assert expected.item() > 0.3
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    assert leaf_UD.grad is not None
    assert leaf_UD.grad.abs().max() > 1e-2
    torch.testing.assert_close(found.gradient_UD, leaf_UD.grad, rtol=1e-6, atol=1e-8)
    assert found.sums.queries == QUERIES
    assert found.sums.contrasted == QUERIES - 1


def test_the_options_change_the_loss() -> None:
    losses = set()
    for objective in OBJECTIVES.values():
        embedding_UD, batch = case(teacher=True)
        found = evaluate_objective(objective, embedding_UD, batch, total_weight=1.0)
        losses.add(round(found.loss, 6))
    assert len(losses) == len(OBJECTIVES)


@pytest.mark.parametrize("piece_scores", [1, 10_000])
def test_the_temperature_can_be_learned(piece_scores: int) -> None:
    objective = OBJECTIVES["all"]
    embedding_UD, batch = case(teacher=True)
    log_temperature = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    evaluate_objective(
        objective,
        embedding_UD,
        batch,
        total_weight=float(batch.weight_B.sum()),
        log_temperature=log_temperature,
        piece_scores=piece_scores,
    )
    other = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    written_out(objective, embedding_UD, batch, other.exp()).backward()
    assert log_temperature.grad is not None
    assert other.grad is not None
    assert other.grad.abs() > 0.1
    torch.testing.assert_close(log_temperature.grad, other.grad, rtol=1e-6, atol=0)


def test_hardness_of_zero_is_info_nce() -> None:
    embedding_UD, batch = case()
    arguments = (
        scores(embedding_UD[batch.query_B], embedding_UD[batch.document_N]),
        torch.from_numpy(batch.positive_B),
        torch.from_numpy(batch.negative_BN),
    )
    plain = info_nce(*arguments, temperature=0.1)
    assert info_nce(*arguments, temperature=0.1, hardness=0.0) == plain
    assert info_nce(*arguments, temperature=0.1, hardness=1.0) > plain


def test_nothing_to_distil_is_zero_with_a_gradient_of_zero() -> None:
    score_BK = torch.randn(2, 3, requires_grad=True)
    teacher_BK = torch.full((2, 3), float("nan"))
    teacher_BK[0, 1] = 1.0
    loss = distillation(
        score_BK, teacher_BK, temperature=0.1, teacher_temperature=1.0, weight_B=torch.ones(2)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert score_BK.grad is not None
    assert torch.equal(score_BK.grad, torch.zeros(2, 3))


def test_memory_of_the_loss_is_that_of_a_piece() -> None:
    """No tensor of all queries times all documents is ever saved for the backward pass."""
    queries, documents = 400, 900
    embedding_UD = torch.nn.functional.normalize(torch.randn(queries + documents, 8), dim=1)
    batch = ContrastiveBatch(
        tuple(("", str(row)) for row in range(queries + documents)),
        np.arange(queries),
        np.arange(queries, queries + documents),
        np.arange(queries),
        ~np.eye(queries, documents, dtype=bool),
        np.ones(queries, dtype=np.float32),
        queries + documents,
    )
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        whole = evaluate_objective(Objective(0.1), embedding_UD, batch, total_weight=queries)
        assert max(sizes) == queries * documents
        sizes.clear()
        pieces = evaluate_objective(
            Objective(0.1), embedding_UD, batch, total_weight=queries, piece_scores=10 * documents
        )
        assert max(sizes) <= 10 * documents
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(pieces.gradient_UD, whole.gradient_UD, rtol=1e-4, atol=1e-7)
