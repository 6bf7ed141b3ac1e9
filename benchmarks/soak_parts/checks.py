"""What is judged after a soak, as pure functions: is a curve flat, is every document there once."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


def drift(values: Sequence[float]) -> float:
    """How far the least-squares line through the second half of a curve rises from end to end."""
    half = list(values[len(values) // 2 :])
    if len(half) < 2:
        return 0.0
    middle, mean = (len(half) - 1) / 2, statistics.fmean(half)
    covariance = sum((at - middle) * (value - mean) for at, value in enumerate(half))
    slope = covariance / sum((at - middle) ** 2 for at in range(len(half)))
    return slope * (len(half) - 1)


@dataclass(frozen=True)
class Bound:
    """How far a curve may rise in its second half: a share of its median there, or ``least``."""

    share: float
    least: float

    def of(self, values: Sequence[float]) -> float:
        """The bound in the unit of the values."""
        return max(self.share * statistics.median(values[len(values) // 2 :]), self.least)


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Milliseconds within which 50, 95 and 99 % are; None where there is nothing."""
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        name: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
        for name, share in shares.items()
    }


@dataclass
class Accounts:
    """Where a database differs from what must be in it."""

    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # there with another text

    @property
    def right(self) -> bool:
        """Whether nothing differs."""
        return not (self.lost or self.twice or self.extra or self.changed)


def account(expected: Mapping[str, str], found: Iterable[tuple[str, str]]) -> Accounts:
    """Compare the texts that must be there, by place, with the (place, text) that are."""
    rows = list(found)
    counts = Counter(place for place, _ in rows)
    return Accounts(
        sorted(expected.keys() - counts.keys()),
        sorted(place for place, count in counts.items() if count > 1),
        sorted(counts.keys() - expected.keys()),
        sorted({place for place, text in rows if expected.get(place, text) != text}),
    )
