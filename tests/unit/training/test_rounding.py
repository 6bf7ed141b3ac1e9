"""Losses over rounded vectors: values are those of ``encode``, gradients pass straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings
from torch.nn.functional import normalize

from nvembed.data.batch import ContrastiveBatch
from nvembed.model.encoding import quantize
from nvembed.training.config import StageConfig
from nvembed.training.contrastive_loss import Objective, evaluate_objective
from nvembed.training.loss_config import SpreadConfig, TeacherConfig
from nvembed.training.text_losses import views_of

TEXTS, WIDTH = 12, 8


def embeddings(count: int = TEXTS, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(
        torch.randn(count, width, generator=generator, dtype=torch.float64)
        * torch.linspace(0.2, 2, width),
        dim=1,
    )


def pairs(count: int) -> ContrastiveBatch:
    """Each of the first texts asks for one of the others, and all of them are its documents."""
    return ContrastiveBatch(
        texts=tuple(("", str(row)) for row in range(2 * count)),
        query_B=np.arange(count),
        document_N=np.arange(count, 2 * count),
        positive_B=np.arange(count),
        negative_BN=~np.eye(count, dtype=np.bool_),
        weight_B=np.ones(count, dtype=np.float32),
        mentioned=2 * count,
    )


@pytest.mark.parametrize("width", [WIDTH, 5])
def test_values_are_those_of_encode(width: int) -> None:
    embedding_UD = embeddings().float()
    plain, int8, binary = (
        view(embedding_UD) for view in views_of(embedding_UD, (width,), ("int8", "binary"))
    )
    cut_UD = normalize(embedding_UD[:, :width], dim=1)
    torch.testing.assert_close(plain, cut_UD)
    torch.testing.assert_close(int8, normalize(quantize(cut_UD, "int8").float(), dim=1))
    theirs = quantize_embeddings(cut_UD.numpy(), "int8").astype(np.float32)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(int8.numpy(), theirs, atol=1e-6)
    bits_UD = np.unpackbits(quantize(cut_UD, "ubinary").numpy(), axis=1)[:, :width].astype(float)
    np.testing.assert_allclose(binary.numpy(), (2 * bits_UD - 1) / width**0.5, atol=1e-6)


def test_dot_products_of_binary_vectors_are_hamming_distances() -> None:
    embedding_UD = embeddings()
    binary = views_of(embedding_UD, None, ("binary",))[1](embedding_UD)
    bits_UD = embedding_UD > 0
    different_UU = (bits_UD[:, None] != bits_UD[None]).sum(dim=2)
    torch.testing.assert_close(binary @ binary.T, 1 - 2 * different_UU.double() / WIDTH)


def sent_through(embedding_UD: torch.Tensor, gradient_UD: torch.Tensor, kind: str) -> torch.Tensor:
    """A gradient at rounded vectors, sent straight through the rounding to the plain ones."""
    if kind in ("plain", "binary"):
        return gradient_UD
    least_D, greatest_D = embedding_UD.amin(dim=0), embedding_UD.amax(dim=0)
    step_D = (greatest_D - least_D) / 255
    number_UD = ((embedding_UD - least_D) / step_D).floor().clamp(0, 255) - 128
    length_U = number_UD.norm(dim=1, keepdim=True)
    unit_UD = number_UD / length_U
    along_U = (gradient_UD * unit_UD).sum(dim=1, keepdim=True)
    return (gradient_UD - along_U * unit_UD) / length_U / step_D


@pytest.mark.parametrize("piece_scores", [1, 10_000])
@pytest.mark.parametrize("kind", ["contrastive", "teacher", "spread"])
def test_the_objective_is_the_mean_over_plain_and_rounded(kind: str, piece_scores: int) -> None:
    """Value and gradient: those of the loss at the rounded vectors, by the chain rule."""
    settings = {
        "contrastive": {},
        "teacher": {"contrastive": None, "teacher": TeacherConfig(model="t", temperature=0.2)},
        "spread": {"contrastive": None, "spread": SpreadConfig()},
    }[kind]
    embedding_UD, batch = embeddings(), pairs(TEXTS // 2)
    if kind == "teacher":
        taught = embeddings(width=5, seed=1).numpy().astype(np.float16)
        batch = ContrastiveBatch(
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__}
            | {"teacher_UE": taught}
        )

    def evaluated(vectors_UD: torch.Tensor, rounded: tuple[str, ...] | None):
        objective = Objective(0.2, rounded=rounded, **settings)
        return evaluate_objective(
            objective, vectors_UD, batch, total_weight=6.0, piece_scores=piece_scores
        )

    found = evaluated(embedding_UD, ("int8", "binary"))
    values, gradient_UD = [], torch.zeros_like(embedding_UD)
    views = views_of(embedding_UD, None, ("int8", "binary"))
    for name, view in zip(("plain", "int8", "binary"), views, strict=True):
        alone = evaluated(view(embedding_UD), None)
        values.append(alone.loss)
        gradient_UD += sent_through(embedding_UD, alone.gradient_UD, name) / 3
    assert len({round(value, 4) for value in values}) == 3
    assert found.loss == pytest.approx(np.mean(values), rel=1e-6)
    assert gradient_UD.abs().max() > 1e-3
    torch.testing.assert_close(found.gradient_UD, gradient_UD, rtol=1e-6, atol=1e-9)


def test_every_width_is_rounded() -> None:
    embedding_UD, batch = embeddings(), pairs(TEXTS // 2)
    both = Objective(0.2, dimensions=(4, 8), rounded=("binary",))
    losses = [
        evaluate_objective(Objective(0.2), view(embedding_UD), batch, total_weight=6.0).loss
        for view in views_of(embedding_UD, (4, 8), ("binary",))
    ]
    assert len(losses) == len({round(loss, 4) for loss in losses}) == 4
    found = evaluate_objective(both, embedding_UD, batch, total_weight=6.0)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_a_stage_asks_for_it() -> None:
    values = {"name": "one", "steps": 1, "in_batch_negatives": False}
    assert not Objective.of_stage(StageConfig(**values)).coupled
    for rounded, coupled in ((("binary",), False), (("int8", "binary"), True)):
        objective = Objective.of_stage(StageConfig(**values, rounded=rounded))
        assert (objective.rounded, objective.coupled) == (rounded, coupled)


def test_binary_vectors_keep_more_of_the_order_after_equal_steps() -> None:
    """Free vectors of 16 dimensions, 60 steps: which of 48 documents is nearest by their bits?"""
    count, width = 48, 16
    batch, shares = pairs(count), {}
    for rounded in (None, ("binary",)):
        torch.manual_seed(0)
        free_UD = torch.nn.Parameter(torch.randn(2 * count, width))
        optimizer = torch.optim.Adam([free_UD], lr=0.03)
        for _ in range(60):
            vectors_UD = normalize(free_UD, dim=1)
            objective = Objective(0.1, rounded=rounded)
            found = evaluate_objective(objective, vectors_UD, batch, total_weight=float(count))
            vectors_UD.backward(found.gradient_UD)
            optimizer.step()
            optimizer.zero_grad()
        bits_UD = (free_UD > 0).float() * 2 - 1
        score_BN = bits_UD[:count] @ bits_UD[count:].T
        positive_B = score_BN.diagonal().clone()
        score_BN.fill_diagonal_(-width)
        shares[rounded] = float((positive_B > score_BN.amax(dim=1)).float().mean())
    assert shares["binary",] > shares[None] + 0.1, shares
