"""The losses of a step beside the contrastive one, and the vectors that any of them sees.

These are embeddings, or views of them: cut to widths (Matryoshka) and rounded as they are kept.
Rounded ones have the values that ``encode(precision=…)`` gives, and their gradient passes straight
through the rounding (arXiv 1308.3432), which itself has none. Shapes: B queries, K own candidates,
U texts of a step (u of a piece), N some of them, P pairs, D width, E the teacher's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from nvembed.model.encoding import calibration, numbered
from nvembed.training.loss_config import TeacherConfig


def distillation(
    score_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float | Tensor,
    teacher_temperature: float,
    weight_B: Tensor,
) -> Tensor:
    """Weighted sum of KL(softmax(teacher / τₜ) ‖ softmax(score / τ)) over scored candidates.

    Candidates with nan are left out; a row with fewer than two scored ones adds nothing.
    """
    scored_BK = teacher_BK.isfinite()
    used_B = scored_BK.sum(dim=1) > 1
    if not used_B.any():
        return score_BK.sum() * 0.0
    scored_BK = scored_BK[used_B]
    teacher = teacher_BK[used_B].nan_to_num(0.0) / teacher_temperature
    target_BK = teacher.masked_fill(~scored_BK, float("-inf")).softmax(dim=1)
    student = score_BK[used_B] / temperature
    log_student_BK = student.masked_fill(~scored_BK, float("-inf")).log_softmax(dim=1)
    # 0 · -inf is nan, so what was left out of both is left out of the product as well.
    cross_B = -(target_BK * log_student_BK.masked_fill(~scored_BK, 0.0)).sum(dim=1)
    entropy_B = torch.special.entr(target_BK).sum(dim=1)
    return ((cross_B - entropy_B) * weight_B[used_B]).sum()


def similarities_of_texts(
    embedding_UD: Tensor, teacher_UE: Tensor, rows: slice, settings: TeacherConfig
) -> Tensor:
    """The share of some rows in the mean over the texts of the KL of their cosines to all others.

    Both are of length 1. sentence-transformers' ``DistillKLDivLoss``, with every text once as the
    query and all others as its documents, is this times its temperature squared.
    """
    score_uU = embedding_UD[rows] @ embedding_UD.T
    teacher_uU = teacher_UE[rows] @ teacher_UE.T
    itself_uU = torch.eye(len(embedding_UD), dtype=torch.bool, device=score_uU.device)[rows]
    return distillation(
        score_uU,
        teacher_uU.masked_fill(itself_uU, float("nan")),
        temperature=settings.temperature,
        teacher_temperature=settings.teacher_temperature or settings.temperature,
        weight_B=score_uU.new_full((len(score_uU),), 1 / len(embedding_UD)),
    )


def distance_of_vectors(
    embedding_UD: Tensor, teacher_UE: Tensor, projection_ED: Tensor | None
) -> Tensor:
    """Mean of 1 − cosine of own and teacher's vector, own ones behind the projection if there is.

    That is sentence-transformers' ``EmbedDistillLoss`` (cosine), and E / 2 times its mean squared
    error of vectors of length 1. Source: EmbedDistill (arXiv 2301.12005).
    """
    if projection_ED is not None:
        embedding_UD = embedding_UD @ projection_ED.to(embedding_UD.dtype).T
    return (1 - cosine_similarity(embedding_UD, teacher_UE, dim=1)).mean()


def cosent(cosine_P: Tensor, score_P: Tensor, *, temperature: float) -> Tensor:
    """log(1 + Σ exp((cosine of i − cosine of j) / τ)) over pairs i with a lower score than j.

    Source: CoSENT (IEEE TASLP 2024); sentence-transformers' ``CoSENTLoss`` with scale 1 / τ.
    """
    logit_PP = (cosine_P[:, None] - cosine_P[None, :]) / temperature
    logits = logit_PP[score_P[:, None] < score_P[None, :]]
    return torch.cat([logits.new_zeros(1), logits]).logsumexp(dim=0)


def spread_terms(embedding_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine squared, and how far the mean squared cosine is above 1 / D, of different texts.

    Random directions have the values 0 and 0. Source: Global Orthogonal Regularization (arXiv
    1708.06320); the sums over all pairs are those of a vector and of a matrix ``(D, D)``.
    """
    count, width = embedding_ND.shape
    pairs = max(1, count * (count - 1))
    length_N = embedding_ND.square().sum(dim=1)
    total = embedding_ND.sum(dim=0).square().sum() - length_N.sum()
    squares = (embedding_ND.T @ embedding_ND).square().sum() - length_N.square().sum()
    return (total / pairs).square(), (squares / pairs - 1 / width).relu()


# --- Views ----------------------------------------------------------------------------------------

Rounding = Literal["int8", "binary"]
View = Callable[[Tensor], Tensor]
"""Rows of embeddings ``(N, D)`` as they are scored, at length 1."""


def views_of(
    embedding_UD: Tensor, widths: Sequence[int] | None, rounded: Sequence[Rounding] | None
) -> list[View]:
    """At each width (``None`` is the full one) the plain vectors, then each rounding of them.

    The ranges of int8 are those of ``embedding_UD``, the texts of a step.
    """
    found: list[View] = []
    for width in widths or (embedding_UD.shape[1],):
        found.append(_cut(width))
        for rounding in rounded or ():
            if rounding == "binary":
                found.append(_signs(width))
            else:
                ranges = calibration(cut_to(embedding_UD.detach(), width))
                found.append(_steps(width, *ranges))
    return found


def cut_to(embedding_ND: Tensor, width: int) -> Tensor:
    """The first dimensions of embeddings, at length 1 again."""
    cut = width < embedding_ND.shape[1]
    return normalize(embedding_ND[:, :width], dim=1) if cut else embedding_ND


def straight_through(value: Tensor, instead: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return instead + (value - instead).detach()


def _cut(width: int) -> View:
    return lambda embedding_ND: cut_to(embedding_ND, width)


def _signs(width: int) -> View:
    """Vectors of ±1 at length 1, whose dot product is 1 − 2 · Hamming distance / width."""

    def view(embedding_ND: Tensor) -> Tensor:
        cut_ND = cut_to(embedding_ND, width)
        sign_ND = torch.where(cut_ND > 0, 1.0, -1.0).to(cut_ND.dtype)
        return straight_through(sign_ND / math.sqrt(width), cut_ND)

    return view


def _steps(width: int, least_D: Tensor, step_D: Tensor) -> View:
    """Vectors of whole numbers from −128 to 127, at length 1; the ranges are constants."""

    def view(embedding_ND: Tensor) -> Tensor:
        cut_ND = cut_to(embedding_ND, width)
        exact_ND = (cut_ND - least_D) / step_D
        number_ND = straight_through(numbered(cut_ND, least_D, step_D), exact_ND)
        return normalize(number_ND - 128, dim=1)

    return view
