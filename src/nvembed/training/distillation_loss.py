"""Distillation: the student's ranking of a query's own candidates is drawn to a teacher's.

Shapes: B queries, K own candidates of a query (its positive first).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
