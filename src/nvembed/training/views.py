"""The vectors that a loss sees: embeddings cut to widths (Matryoshka) and rounded as they are kept.

Rounded ones have the values that ``encode(precision=…)`` gives, and their gradient passes straight
through the rounding (arXiv 1308.3432), which itself has none. Letters: U texts, N some of them, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nvembed.model.encoding import calibration, numbered

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
