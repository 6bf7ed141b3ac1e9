"""What a step minimises, from embeddings to a number and its gradient, in pieces of bounded size.

The model's graph ends at the embeddings: here they are leaves. Rows of the score matrix are taken a
few at a time, forward and backward, so the whole matrix of queries and documents in float32 never
exists, and the gradient with respect to the embeddings is all that leaves. Next file:
``training/step.py``.

Shapes: U unique texts, B queries (rows of the loss), b rows of a piece, N documents, D width, K own
candidates of a query (its positive first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvembed.data.batch import ContrastiveBatch
from nvembed.training.config import StageConfig
from nvembed.training.contrastive_loss import ScoreSums, info_nce, scores


def distillation(
    score_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float | Tensor,
    teacher_temperature: float,
    weight_B: Tensor,
) -> Tensor:
    """Weighted sum of KL(softmax(teacher / τₜ) ‖ softmax(score / τ)) over scored candidates.

    Candidates that the teacher did not score are left out of both distributions; a row with fewer
    than two scored ones adds nothing.

    Args:
        score_BK: cosines of the query and its own candidates, float32.
        teacher_BK: the teacher's scores, on any scale; nan where there is none.
        temperature: τ of the student.
        teacher_temperature: τₜ, which makes up for the teacher's scale.
        weight_B: of the rows.

    Returns:
        Scalar.
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


# Scores of one piece: 4 MB in float32, of which a few copies live at once. With pieces of 16 MB
# the allocator kept 160 MB more, and they were no faster.
PIECE_SCORES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss.

    Args:
        temperature: τ of the softmax.
        hardness: weight of hard negatives, see ``info_nce``; ``None`` is off.
        dimensions: Matryoshka: the mean of the losses of the embeddings cut to these widths (and
            set to length 1 again); ``None`` is the full width alone (arXiv 2205.13147).
        distillation_weight: of the distillation loss, added to the contrastive one; ``None`` is
            off.
        teacher_temperature: of the teacher's scores.
    """

    temperature: float
    hardness: float | None = None
    dimensions: tuple[int, ...] | None = None
    distillation_weight: float | None = None
    teacher_temperature: float = 1.0


def stage_objective(stage: StageConfig) -> Objective:
    """The objective that a stage of a recipe asks for."""
    distillation = stage.distillation
    return Objective(
        temperature=stage.temperature,
        hardness=stage.hardness,
        dimensions=stage.matryoshka,
        distillation_weight=distillation.weight if distillation else None,
        teacher_temperature=distillation.teacher_temperature if distillation else 1.0,
    )


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An objective at some embeddings.

    Args:
        loss: its value.
        gradient_UD: with respect to the embeddings, float32.
        sums: for the statistics, of the full width.
    """

    loss: float
    gradient_UD: Tensor
    sums: ScoreSums


def evaluate_objective(
    objective: Objective,
    embedding_UD: Tensor,
    batch: ContrastiveBatch,
    *,
    total_weight: float,
    log_temperature: Tensor | None = None,
    piece_scores: int = PIECE_SCORES,
) -> Evaluated:
    """Value and gradient of the loss of a batch, or of a part of one.

    Args:
        objective: what to compute.
        embedding_UD: embeddings of the batch's texts, of length 1; not changed, no graph needed.
        batch: who stands against whom.
        total_weight: of all rows of the step, so that parts of a step add up to its mean.
        log_temperature: log τ where it is learned; its gradient is added to ``.grad``.
        piece_scores: most scores held at once.
    """
    device = embedding_UD.device
    dtype = torch.promote_types(embedding_UD.dtype, torch.float32)
    leaf_UD = embedding_UD.detach().to(dtype)
    query_row_B = torch.as_tensor(batch.query_B, device=device)
    document_row_N = torch.as_tensor(batch.document_N, device=device)
    positive_B = torch.as_tensor(batch.positive_B, device=device)
    weight_B = torch.as_tensor(batch.weight_B, device=device).to(dtype) / total_weight
    gradient_UD = torch.zeros_like(leaf_UD)
    document_ND = leaf_UD[document_row_N].requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums = ScoreSums()
    rows = max(1, piece_scores // len(batch.document_N))
    for start in range(0, len(batch.query_B), rows):
        piece = slice(start, start + rows)
        query_bD = leaf_UD[query_row_B[piece]].requires_grad_()
        part = _Part(
            positive_B[piece],
            torch.as_tensor(batch.negative_BN[piece], device=device),
            weight_B[piece],
            *_teacher(batch, piece, device, dtype),
        )
        with torch.enable_grad():
            value, score_bN = _part_loss(
                objective, query_bD, document_ND, part, _temperature(objective, log_temperature)
            )
            value.backward()
        assert query_bD.grad is not None
        gradient_UD.index_add_(0, query_row_B[piece], query_bD.grad)
        loss += value.detach().double()
        sums += ScoreSums.of_scores(score_bN, part.positive_b, part.negative_bN)
    assert document_ND.grad is not None
    gradient_UD.index_add_(0, document_row_N, document_ND.grad)
    return Evaluated(float(loss), gradient_UD, sums)


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one piece."""

    positive_b: Tensor
    negative_bN: Tensor
    weight_b: Tensor
    candidate_bK: Tensor | None
    teacher_bK: Tensor | None


def _part_loss(
    objective: Objective,
    query_bD: Tensor,
    document_ND: Tensor,
    part: _Part,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss of one piece, and its scores at full width."""
    full_bN = scores(query_bD, document_ND)
    width = query_bD.shape[1]
    widths = objective.dimensions or (width,)
    total = full_bN.new_zeros(())
    for cut in widths:
        score_bN = full_bN if cut >= width else scores(_cut(query_bD, cut), _cut(document_ND, cut))
        total = total + info_nce(
            score_bN,
            part.positive_b,
            part.negative_bN,
            temperature=temperature,
            hardness=objective.hardness,
            weight_B=part.weight_b,
        )
        if objective.distillation_weight is not None and part.candidate_bK is not None:
            assert part.teacher_bK is not None
            own_bK = score_bN.gather(1, part.candidate_bK.clamp(min=0))
            total = total + objective.distillation_weight * distillation(
                own_bK,
                part.teacher_bK,
                temperature=temperature,
                teacher_temperature=objective.teacher_temperature,
                weight_B=part.weight_b,
            )
    return total / len(widths), full_bN.detach()


def _cut(embedding_ND: Tensor, width: int) -> Tensor:
    return torch.nn.functional.normalize(embedding_ND[:, :width], dim=1)


def _temperature(objective: Objective, log_temperature: Tensor | None) -> float | Tensor:
    return objective.temperature if log_temperature is None else log_temperature.exp()


def _teacher(
    batch: ContrastiveBatch, piece: slice, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Own candidates and the teacher's scores of a piece, nan where there is no candidate."""
    if batch.teacher is None:
        return None, None
    column_bK = torch.as_tensor(batch.teacher.column_BK[piece], device=device)
    score_bK = torch.as_tensor(batch.teacher.score_BK[piece], device=device).to(dtype)
    return column_bK, score_bK.masked_fill(column_bK < 0, float("nan"))


MIN_TEMPERATURE = 0.005
"""A learned temperature goes no lower."""


def new_temperature(stage: StageConfig | None, device: torch.device) -> nn.Parameter | None:
    """Log τ to be learned, if the stage wants it."""
    if stage is None or not stage.learn_temperature:
        return None
    return nn.Parameter(torch.tensor(math.log(stage.temperature), device=device))


@torch.no_grad()
def bounded(log_temperature: nn.Parameter | None) -> float | None:
    """Keep a learned τ from running to zero, and return it."""
    if log_temperature is None:
        return None
    log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
    return float(log_temperature.exp())
