"""What was dropped as contaminated, from which set, by which rule, against which task.

In: the matches of ``contamination.py``, one by one; out: a JSON object with counts and samples.
"""

from __future__ import annotations

from typing import Any

from nvembed.building.contamination import Match

_LONGEST_SAMPLE = 300  # characters of a text


class ContaminationReport:
    """Counts all matches and keeps the first few of each sort, to be read by a person.

    Args:
        num_samples: kept of each set, task and rule.
    """

    def __init__(self, num_samples: int = 3) -> None:
        self._num_samples = num_samples
        self._counts: dict[tuple[str, str, str], int] = {}
        self._samples: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def add(self, dataset: str, place: str, match: Match) -> None:
        """Note that a record of a set was dropped.

        Args:
            dataset: name of the training set.
            place: of the record, such as ``file.jsonl:17``.
            match: why.
        """
        key = (dataset, match.found.task, match.rule)
        self._counts[key] = self._counts.get(key, 0) + 1
        samples = self._samples.setdefault(key, [])
        if len(samples) < self._num_samples:
            samples.append(
                {
                    "place": place,
                    "score": round(match.score, 4),
                    "training": [text[:_LONGEST_SAMPLE] for text in match.texts],
                    "evaluation": [text[:_LONGEST_SAMPLE] for text in match.found.texts],
                    "part": match.found.part,
                }
            )

    def to_json(self) -> dict[str, Any]:
        """Return ``{"dropped": count, "by": [{dataset, task, rule, dropped, samples}]}``.

        Sorted by set, then from the most dropped to the least.
        """
        order = sorted(self._counts, key=lambda key: (key[0], -self._counts[key], key))
        return {
            "dropped": sum(self._counts.values()),
            "by": [
                {
                    "dataset": dataset,
                    "task": task,
                    "rule": rule,
                    "dropped": self._counts[dataset, task, rule],
                    "samples": self._samples[dataset, task, rule],
                }
                for dataset, task, rule in order
            ],
        }
