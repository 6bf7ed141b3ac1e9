"""Texts that are ready for a model; free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
"""First and last-plus-one character of a chunk in its text."""


@dataclass(frozen=True, slots=True)
class Work:
    """Some texts that are ready for the model.

    Attributes:
        launch: runs the model and returns a function that gives the vectors ``(N, D)`` once they
            have arrived: float32, chunks of a text one after the other. On a GPU the next work may
            be launched before.
        tokens: that the model reads; None where nobody counts.
        spans: chunks of each text; None where a text has one vector.
    """

    launch: Callable[[], Callable[[], NDArray[np.float32]]]
    tokens: int | None = None
    spans: Sequence[tuple[Span, ...]] | None = None
