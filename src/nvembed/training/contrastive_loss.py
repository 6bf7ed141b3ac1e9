"""The loss of a batch of embeddings: InfoNCE over index matrices, and other losses.

In-batch negatives, mined negatives and all masks are entries of ``negative_BN``. The matrix of all
queries times all documents is never held: a piece is computed, sent back and forgotten. Shapes: B
queries (b of a piece), N unique documents, U texts, K own candidates, D width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from nvembed.core.errors import ConfigError
from nvembed.data.batch import ContrastiveBatch
from nvembed.training.config import StageConfig
from nvembed.training.loss_config import CosentConfig, SpreadConfig, TeacherConfig
from nvembed.training.text_losses import (
    Rounding,
    View,
    cosent,
    distance_of_vectors,
    distillation,
    similarities_of_texts,
    spread_terms,
    views_of,
)

# Scores of one piece: 4 MB in float32, of which a few copies live at once. With pieces of 16 MB
# the allocator kept 160 MB more, and they were no faster.
PIECE_SCORES = 1024 * 1024

MIN_TEMPERATURE = 0.005
"""A learned temperature goes no lower."""


def info_nce(
    score_BN: Tensor,
    positive_B: Tensor,
    negative_BN: Tensor,
    *,
    temperature: float | Tensor,
    hardness: float | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Mean over queries of the cross entropy of the positive among positive and negatives.

        −log( exp(q·d⁺/τ) / (exp(q·d⁺/τ) + Σ_{n negative of q} exp(q·dₙ/τ)) )

    ``positive_B`` are columns of ``score_BN``, ``negative_BN`` says which are negatives; a query
    without any has the loss 0 and counts in the mean. ``hardness`` α multiplies a negative's share
    in the sum by ``exp(α · score)``, the score a constant (LLaVE, arXiv 2503.04812 s3). With
    ``weight_B`` the result is the sum of losses times weights. Source: NV-Embed s2.2 and s3.3.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}", expected="a number above 0")
    logit_BN = score_BN / temperature
    if hardness is not None:
        logit_BN = logit_BN + (hardness * score_BN.detach()).masked_fill(~negative_BN, 0.0)
    candidate_BN = negative_BN.scatter(1, positive_B[:, None], True)
    # Every row keeps its positive, so no row is all -inf and the softmax never divides 0 by 0.
    logit_BN = logit_BN.masked_fill(~candidate_BN, float("-inf"))
    if weight_B is None:
        return cross_entropy(logit_BN, positive_B)
    return (cross_entropy(logit_BN, positive_B, reduction="none") * weight_B).sum()


def scores(query_BD: Tensor, document_ND: Tensor) -> Tensor:
    """Dot products ``(B, N)`` in float32 or wider: bfloat16 ones are off by 0.2 in the exponent."""
    dtype = torch.promote_types(query_BD.dtype, torch.float32)
    with torch.autocast(query_BD.device.type, enabled=False):
        return query_BD.to(dtype) @ document_ND.to(dtype).T


@dataclass(frozen=True, slots=True)
class ContrastiveStatistics:
    """How well a batch is told apart; None without any query, the last three without negatives."""

    positive_similarity: float | None  # mean cosine of queries and their positives
    hardest_negative_similarity: float | None  # of queries and the negative nearest to each
    margin: float | None  # of positive minus hardest negative
    accuracy: float | None  # share of positives strictly above all negatives of their query


@dataclass(frozen=True, slots=True)
class ScoreSums:
    """Counts and sums that the statistics are made of; those of the parts of a batch add up."""

    queries: int = 0
    contrasted: int = 0  # queries that have negatives, over which the last three are summed
    positive: float = 0.0
    hardest: float = 0.0
    margin: float = 0.0
    hits: int = 0

    @classmethod
    @torch.no_grad()
    def of_scores(cls, score_BN: Tensor, positive_B: Tensor, negative_BN: Tensor) -> ScoreSums:
        """Sum over the rows of a score matrix."""
        positive_score_B = score_BN.gather(1, positive_B[:, None])[:, 0]
        contrasted_B = negative_BN.any(dim=1)
        hardest_B = score_BN.masked_fill(~negative_BN, float("-inf")).amax(dim=1)[contrasted_B]
        margin_B = positive_score_B[contrasted_B] - hardest_B
        return cls(
            queries=len(score_BN),
            contrasted=int(contrasted_B.sum()),
            positive=float(positive_score_B.sum()),
            hardest=float(hardest_B.sum()),
            margin=float(margin_B.sum()),
            hits=int((margin_B > 0).sum()),
        )

    def __add__(self, other: ScoreSums) -> ScoreSums:
        return ScoreSums(*map(operator.add, astuple(self), astuple(other)))

    def means(self) -> ContrastiveStatistics:
        """The statistics of all rows."""
        sums = (self.hardest, self.margin, self.hits)
        means = [total / self.contrasted if self.contrasted else None for total in sums]
        positive = self.positive / self.queries if self.queries else None
        return ContrastiveStatistics(positive, *means)


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss; ``None`` is off."""

    temperature: float
    hardness: float | None = None  # α of ``info_nce``
    # Matryoshka (arXiv 2205.13147): the mean of the losses at these widths.
    dimensions: tuple[int, ...] | None = None
    distillation_weight: float | None = None  # of the loss added to the contrastive one
    teacher_temperature: float = 1.0
    contrastive: float | None = 1.0  # weight
    teacher: TeacherConfig | None = None
    cosent: CosentConfig | None = None
    spread: SpreadConfig | None = None
    rounded: tuple[Rounding, ...] | None = None  # besides the plain vectors; see ``text_losses.py``

    @classmethod
    def of_stage(cls, stage: StageConfig) -> Objective:
        """The objective that a stage of a recipe asks for."""
        taught = stage.distillation
        return cls(
            stage.temperature,
            stage.hardness,
            stage.matryoshka,
            taught.weight if taught else None,
            taught.teacher_temperature if taught else 1.0,
            stage.contrastive,
            stage.teacher if stage.teacher and stage.teacher.of_texts else None,
            stage.cosent,
            stage.spread,
            stage.rounded,
        )

    @property
    def contrasts(self) -> bool:
        """Whether queries are held against documents."""
        return self.contrastive is not None or self.distillation_weight is not None

    @property
    def coupled(self) -> bool:
        """Whether a loss depends on all texts of a step together."""
        ranges = self.rounded is not None and "int8" in self.rounded
        return ranges or (self.teacher, self.cosent, self.spread) != (None, None, None)


@dataclass(slots=True)
class Evaluated:
    """An objective at some embeddings: its gradient (float32), the parts of its value, and sums."""

    gradient_UD: Tensor
    parts: dict[str, float] = field(default_factory=dict)  # by name; they add up to the loss
    sums: ScoreSums = ScoreSums()

    @property
    def loss(self) -> float:
        """The value."""
        return sum(self.parts.values())

    def send_back(self, parts: Mapping[str, Tensor]) -> None:
        """Add the values of some parts, and take their gradients."""
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + float(value.detach())
        if parts:
            torch.stack(list(parts.values())).sum().backward()


def evaluate_objective(
    objective: Objective,
    embedding_UD: Tensor,
    batch: ContrastiveBatch,
    *,
    total_weight: float,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
    piece_scores: int = PIECE_SCORES,
) -> Evaluated:
    """Value and gradient of the loss of a batch, or of a part of a step of ``total_weight``.

    No more than ``piece_scores`` scores are held. The gradients of log τ and of the ``projection``
    (E, D) to the teacher's width are added to their ``.grad``.
    """
    leaf_UD = embedding_UD.detach().to(torch.promote_types(embedding_UD.dtype, torch.float32))
    found = Evaluated(torch.zeros_like(leaf_UD))
    views: list[View] = [lambda embedding_ND: embedding_ND]  # all that is seen, at full width
    if objective.dimensions or objective.rounded:
        views = views_of(leaf_UD, objective.dimensions, objective.rounded)
    with torch.enable_grad(), torch.autocast(embedding_UD.device.type, enabled=False):
        if len(batch.query_B) and objective.contrasts:
            tau = objective.temperature if log_temperature is None else log_temperature
            _contrast(objective, leaf_UD, views, batch, tau, total_weight, piece_scores, found)
        if objective.coupled:
            leaf_UD.requires_grad_()
            if objective.teacher is not None and batch.teacher_UE is not None:
                taught = batch.teacher_UE
                _follow(objective, leaf_UD, views, taught, projection, piece_scores, found)
            found.send_back(_parts_of_texts(objective, leaf_UD, views, batch, total_weight))
            if leaf_UD.grad is not None:
                found.gradient_UD += leaf_UD.grad
    return found


def _contrast(
    objective: Objective,
    leaf_UD: Tensor,
    views: Sequence[View],
    batch: ContrastiveBatch,
    temperature: float | Tensor,
    total_weight: float,
    piece_scores: int,
    found: Evaluated,
) -> None:
    """Add what queries have against their documents; a temperature that is learned is log τ."""
    device = leaf_UD.device
    query_row_B = torch.as_tensor(batch.query_B, device=device)
    document_row_N = torch.as_tensor(batch.document_N, device=device)
    weight_B = torch.as_tensor(batch.weight_B, device=device).to(leaf_UD.dtype) / total_weight
    document_ND = leaf_UD[document_row_N].requires_grad_()
    rows = max(1, piece_scores // len(batch.document_N))
    for start in range(0, len(batch.query_B), rows):
        piece = slice(start, start + rows)
        query_bD = leaf_UD[query_row_B[piece]].requires_grad_()
        tau = temperature.exp() if isinstance(temperature, Tensor) else temperature
        parts, sums = _piece_parts(
            objective, query_bD, document_ND, views, batch, piece, weight_B[piece], tau
        )
        found.send_back(parts)
        if query_bD.grad is not None:
            found.gradient_UD.index_add_(0, query_row_B[piece], query_bD.grad)
        found.sums += sums
    if document_ND.grad is not None:
        found.gradient_UD.index_add_(0, document_row_N, document_ND.grad)


def _piece_parts(
    objective: Objective,
    query_bD: Tensor,
    document_ND: Tensor,
    views: Sequence[View],
    batch: ContrastiveBatch,
    piece: slice,
    weight_b: Tensor,
    temperature: float | Tensor,
) -> tuple[dict[str, Tensor], ScoreSums]:
    """Losses of the rows of one piece, with their graph, and their sums at full width."""
    device = query_bD.device
    positive_b = torch.as_tensor(batch.positive_B[piece], device=device)
    negative_bN = torch.as_tensor(batch.negative_BN[piece], device=device)
    full_bN = scores(query_bD, document_ND)
    parts: dict[str, Tensor] = {}
    for view in views:
        seen_bD = view(query_bD)
        score_bN = full_bN if seen_bD is query_bD else scores(seen_bD, view(document_ND))
        if objective.contrastive is not None:
            contrastive = objective.contrastive * info_nce(
                score_bN,
                positive_b,
                negative_bN,
                temperature=temperature,
                hardness=objective.hardness,
                weight_B=weight_b,
            )
            parts["contrastive"] = parts.get("contrastive", 0.0) + contrastive
        if objective.distillation_weight is not None and batch.teacher is not None:
            column_bK = torch.as_tensor(batch.teacher.column_BK[piece], device=device)
            teacher_bK = torch.as_tensor(batch.teacher.score_BK[piece], device=device)
            taught = objective.distillation_weight * distillation(
                score_bN.gather(1, column_bK.clamp(min=0)),
                teacher_bK.to(query_bD.dtype).masked_fill(column_bK < 0, float("nan")),
                temperature=temperature,
                teacher_temperature=objective.teacher_temperature,
                weight_B=weight_b,
            )
            parts["distillation"] = parts.get("distillation", 0.0) + taught
    sums = ScoreSums.of_scores(full_bN.detach(), positive_b, negative_bN)
    return {name: value / len(views) for name, value in parts.items()}, sums


def _follow(
    objective: Objective,
    leaf_UD: Tensor,
    views: Sequence[View],
    teacher: NDArray[np.float16],
    projection_ED: Tensor | None,
    piece_scores: int,
    found: Evaluated,
) -> None:
    """Add what the teacher's vectors teach about all texts."""
    settings = objective.teacher
    assert settings is not None
    taught_UE = torch.as_tensor(teacher, device=leaf_UD.device).to(leaf_UD.dtype)
    taught_UE = normalize(taught_UE, dim=1)  # 16 bit have moved it
    rows = max(1, piece_scores // len(leaf_UD))
    if settings.similarities is not None:
        for start in range(0, len(leaf_UD), rows):
            piece = slice(start, start + rows)
            values = [
                similarities_of_texts(view(leaf_UD), taught_UE, piece, settings) for view in views
            ]
            found.send_back({"similarities": settings.similarities * torch.stack(values).mean()})
    if settings.vectors is not None:
        distance = distance_of_vectors(leaf_UD, taught_UE, projection_ED)
        found.send_back({"vectors": settings.vectors * distance})


def _parts_of_texts(
    objective: Objective,
    leaf_UD: Tensor,
    views: Sequence[View],
    batch: ContrastiveBatch,
    total_weight: float,
) -> dict[str, Tensor]:
    """Losses of graded pairs, by their share of ``total_weight``, and of texts by themselves."""
    device, found = leaf_UD.device, dict[str, list[Tensor]]()
    for cut_UD in (view(leaf_UD) for view in views):
        if objective.cosent is not None and (pairs := batch.graded) is not None:
            first_P, second_P = (torch.as_tensor(rows, device=device) for rows in pairs.rows_2P)
            cosine_P = (cut_UD[first_P] * cut_UD[second_P]).sum(dim=1)
            score_P = torch.as_tensor(pairs.score_P, device=device)
            value = cosent(cosine_P, score_P, temperature=objective.cosent.temperature)
            # A sum over pairs of pairs and no mean: two of them would outweigh a step of 64.
            share = len(score_P) / total_weight
            found.setdefault("cosent", []).append(objective.cosent.weight * share * value)
        if (spread := objective.spread) is not None:
            asks_U = torch.zeros(len(leaf_UD), dtype=torch.bool, device=device)
            asks_U[torch.as_tensor(batch.query_B, device=device)] = True
            terms = [spread_terms(cut_UD[side_U]) for side_U in (asks_U, ~asks_U)]
            for name, weight, values in zip(
                ("spread_mean", "spread_second_moment"),
                (spread.mean, spread.second_moment),
                zip(*terms, strict=True),
                strict=True,
            ):
                if weight is not None:
                    found.setdefault(name, []).append(weight * torch.stack(values).mean())
    return {name: torch.stack(values).mean() for name, values in found.items()}


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
