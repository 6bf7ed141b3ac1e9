"""Problems of many rows, each kind told once: its first row, how many others, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# What differs between two rows with one problem: numbers, and the user's values in single quotes.
_VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\d+")
_MAX_KINDS = 1000  # more kinds than that are counted together
_MAX_RANGES = 10


@dataclass
class ProblemKind:
    """The rows that have one problem.

    Attributes:
        place: of the first row: ``file:line``.
        text: what is wrong with it.
        count: number of rows.
        ranges: [first, last] line of the other rows of the same file, as far as they are kept.
    """

    place: str
    text: str
    count: int = 1
    ranges: list[list[int]] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count another row."""
        self.count += 1
        file, _, line = place.rpartition(":")
        if file != self.place.rpartition(":")[0] or not line.isdecimal():
            return
        number = int(line)
        if self.ranges and self.ranges[-1][1] == number - 1:
            self.ranges[-1][1] = number
        elif len(self.ranges) <= _MAX_RANGES:
            self.ranges.append([number, number])

    @property
    def message(self) -> str:
        """The problem, and how many other rows have it."""
        if self.count == 1:
            return self.text
        ranges = self.ranges[:_MAX_RANGES]
        lines = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
        lines += ["…"] if len(self.ranges) > _MAX_RANGES else []
        named = f": line{'' if lines == [str(ranges[0][0])] else 's'} " if lines else ""
        return f"{self.text} ({self.count - 1:,} more like it{named}{', '.join(lines)})"

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ProblemCounts:
    """Problems by kind, in the order in which the kinds were met.

    Two rows have one problem when what is said of them differs in numbers and in values in single
    quotes only. Memory does not grow with the number of rows.

    Args:
        problems: (place, text) of those to begin with.
        by_value: values in quotes tell kinds apart, as names of classes do.
    """

    def __init__(self, problems: Iterable[tuple[str, str]] = (), *, by_value: bool = False) -> None:
        self.count = 0
        self._by_value = by_value
        self._kinds: dict[str, ProblemKind] = {}
        for place, text in problems:
            self.add(place, text)

    @property
    def kinds(self) -> list[ProblemKind]:
        """The kinds that were met."""
        return list(self._kinds.values())

    def add(self, place: str, text: str, *, by_value: bool | None = None) -> None:
        """Count a problem.

        Args:
            place: ``file:line`` of the row.
            text: what is wrong with it.
            by_value: as of the whole; ``None`` is what was said there.
        """
        self.count += 1
        exact = self._by_value if by_value is None else by_value
        key = _VARYING.sub(lambda found: found[0] if exact and found[0][0] == "'" else "#", text)
        if key not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            key, text = "", "other problems"
        if (kind := self._kinds.get(key)) is not None:
            kind.add(place)
        else:
            self._kinds[key] = ProblemKind(place, text)

    def summary(self, most: int) -> str:
        """Say everything in one line, but for the place of the first problem.

        Args:
            most: number of kinds that are described.
        """
        first, *others = self.kinds[:most]
        file = first.place.rpartition(":")[0]
        parts = [first.message]
        for kind in others:
            own_file, _, line = kind.place.rpartition(":")
            place = f"line {line}" if own_file == file and line.isdecimal() else kind.place
            parts.append(f"{place}: {kind.message}")
        beyond = sum(kind.count for kind in self.kinds[most:])
        parts += [f"and {beyond:,} more problem{'s' if beyond > 1 else ''}"] if beyond else []
        return "; ".join(parts)
